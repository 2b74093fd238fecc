"""Convolution of each channel of each sample with a kernel of its own, whose gradients a CPU computes fast, too.

oneDNN, which convolves for PyTorch on a CPU, has no fast depthwise gradients in three dimensions: they take forty times
as long as the convolution, in bf16 two hundred times. Here the gradient of the images is such a convolution itself, and
that of a kernel is put together from gradients in two dimensions, which are fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["DepthwiseConvolution"]


class DepthwiseConvolution(torch.autograd.Function):
    """``apply(x, kernels, stride)``: each sample and channel of ``x`` with its own kernel, padded by half its size.

    Of images (B, C, *spatial) and kernels (B, C, *size) of odd sizes, in 2D or 3D and of one dtype, it makes
    (B, C, *spatial), each axis divided by its stride and rounded up. The gradients are those of
    :func:`torch.nn.functional.conv3d`; they can't be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor, stride: Sequence[int]) -> Tensor:
        """The convolved images."""
        ctx.save_for_backward(x, kernels)
        ctx.stride = stride
        return _convolve(x, kernels, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The gradients of the images and of the kernels."""
        x, kernels = ctx.saved_tensors
        of_images = of_kernels = None
        if ctx.needs_input_grad[0]:
            spread = gradient
            if any(step > 1 for step in ctx.stride):
                spread = torch.zeros_like(x)
                reached = [slice(None, None, step) for step in (1, 1, *ctx.stride)]
                spread[tuple(reached)] = gradient
            of_images = _convolve(spread, kernels.flip(list(range(2, kernels.dim()))), [1] * len(ctx.stride))
        if ctx.needs_input_grad[1]:
            each = zip(x, kernels, gradient, strict=True)
            of_kernels = torch.stack([_gradient_of_kernel(*sample, ctx.stride) for sample in each])
        return of_images, of_kernels, None


def _convolve(x: Tensor, kernels: Tensor, stride: Sequence[int]) -> Tensor:
    """Sample by sample, since samples taken for groups of one convolution would have to be laid out anew."""
    convolve = F.conv3d if len(stride) == 3 else F.conv2d
    padding = [size // 2 for size in kernels.shape[2:]]
    reached = [slice(None, None, step) for step in (1, 1, *stride)]
    out = torch.empty_like(x[tuple(reached)])  # which has the order in memory, too
    for index, kernel in enumerate(kernels):
        sample = x[index : index + 1]
        out[index : index + 1] = convolve(sample, kernel.unsqueeze(1), None, stride, padding, 1, kernel.shape[0])
    return out


def _gradient_of_kernel(x: Tensor, kernel: Tensor, gradient: Tensor, stride: Sequence[int]) -> Tensor:
    """(C, *size), of one sample (C, *spatial)."""
    if len(stride) == 2:
        return _in_plane(x.unsqueeze(0), kernel, gradient.unsqueeze(0), stride)
    # Slices along the first axis are the samples of a batch; each tap along it joins other ones.
    x, gradient = x.transpose(0, 1), gradient.transpose(0, 1)
    taps = []
    for tap, part in enumerate(kernel.unbind(1)):
        shift = tap - kernel.shape[1] // 2
        first = max(0, -(shift // stride[0]))  # the first output that has an input there
        joined = x[first * stride[0] + shift :: stride[0]]
        count = max(0, min(len(joined), len(gradient) - first))
        if count == 0:
            taps.append(torch.zeros_like(part))
        else:
            taps.append(_in_plane(joined[:count], part, gradient[first : first + count], stride[1:]))
    return torch.stack(taps, 1)


def _in_plane(x: Tensor, kernel: Tensor, gradient: Tensor, stride: Sequence[int]) -> Tensor:
    """Of images (B, C, H, W) with one kernel (C, h, w): its gradient."""
    kernel, channels = kernel.unsqueeze(1), kernel.shape[0]
    padding = [size // 2 for size in kernel.shape[2:]]
    mask = [False, True, False]
    plain = (list(stride), padding, [1, 1], False, [0, 0], channels)
    result = torch.ops.aten.convolution_backward(gradient, x, kernel, None, *plain, mask)[1]
    assert result is not None
    return result.squeeze(1)
