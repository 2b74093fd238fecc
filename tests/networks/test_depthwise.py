"""Depthwise convolution: the result and the gradients of PyTorch's own convolution, sample by sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.networks.depthwise import DepthwiseConvolution

SHAPES = ([7, 6, 5], [1, 4, 8], [8, 8, 2], [2, 3, 9])


def by_pytorch(x: Tensor, kernels: Tensor, stride: list[int]) -> Tensor:
    convolve = F.conv3d if len(stride) == 3 else F.conv2d
    padding = [size // 2 for size in kernels.shape[2:]]
    return torch.cat(
        [
            convolve(image[None], kernel[:, None], None, stride, padding, 1, len(kernel))
            for image, kernel in zip(x, kernels, strict=True)
        ]
    )


@pytest.mark.parametrize("stride", [[1, 1, 1], [2, 2, 2], [2, 2, 1], [1, 1, 2], [3, 1, 2]])
@pytest.mark.parametrize("size", [[3, 3, 3], [3, 3, 1], [1, 3, 3], [5, 3, 3], [1, 1, 1]])
@pytest.mark.parametrize("dims", [2, 3])
def test_it_is_pytorchs_convolution(dims: int, size: list[int], stride: list[int]) -> None:
    size, stride = size[-dims:], stride[-dims:]
    for shape in SHAPES:
        x = torch.randn(2, 3, *shape[-dims:], dtype=torch.double, requires_grad=True)
        kernels = torch.randn(2, 3, *size, dtype=torch.double, requires_grad=True)
        found, expected = DepthwiseConvolution.apply(x, kernels, stride), by_pytorch(x, kernels, stride)
        torch.testing.assert_close(found, expected)
        direction = torch.randn_like(expected)
        gradients = torch.autograd.grad(found, (x, kernels), direction)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, (x, kernels), direction))


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone(which: int) -> None:
    tensors = [torch.randn(1, 2, 4, 4, 4), torch.randn(1, 2, 3, 3, 3)]
    tensors[which].requires_grad_()
    found = DepthwiseConvolution.apply(*tensors, [1, 1, 1])
    expected = by_pytorch(*tensors, [1, 1, 1])
    gradient, wanted = (torch.autograd.grad(y.square().sum(), tensors[which])[0] for y in (found, expected))
    torch.testing.assert_close(gradient, wanted)


def test_order_in_memory_and_reduced_precision_are_kept() -> None:
    x = torch.randn(2, 4, 6, 6, 6).to(torch.bfloat16, memory_format=torch.channels_last_3d).requires_grad_()
    kernels = torch.randn(2, 4, 3, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    result = DepthwiseConvolution.apply(x, kernels, [1, 1, 1])
    assert result.dtype == torch.bfloat16
    assert result.is_contiguous(memory_format=torch.channels_last_3d)
    result.sum().backward()
    exact = [tensor.detach().float().requires_grad_() for tensor in (x, kernels)]
    by_pytorch(*exact, [1, 1, 1]).sum().backward()
    for tensor, wanted in zip((x, kernels), exact, strict=True):
        assert tensor.grad is not None
        assert wanted.grad is not None
        assert tensor.grad.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.grad.float(), wanted.grad, rtol=0.02, atol=0.2)


def test_it_can_be_compiled() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x: Tensor, kernels: Tensor) -> Tensor:
        return DepthwiseConvolution.apply(x, kernels, [2, 2, 1])

    x = torch.randn(2, 2, 5, 4, 3, requires_grad=True)
    kernels = torch.randn(2, 2, 3, 3, 3, requires_grad=True)
    found, expected = compiled(x, kernels), by_pytorch(x, kernels, [2, 2, 1])
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected.square().sum(), (x, kernels))
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), (x, kernels)), wanted)
