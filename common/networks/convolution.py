"""Convolutions that can be trusted in half precision on CPUs, too, where an axis is shorter than the kernel.

oneDNN, which convolves for PyTorch on a CPU, goes wrong there in bf16 where the processor has AVX-512: it takes memory
that nobody has written for the result, mostly for the weights' gradients, and for some shapes writes past its own. A
training on thin stacks or small patches then diverges, learns noise, or crashes. Such features are small, so that
float32 costs next to nothing. ``docs/performance.md`` says which shapes they are, and how they were found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.blocks import Convolution
from torch import Tensor, nn

__all__ = ["Conv2d", "Conv3d", "ConvolutionBlock", "half_precision_fails", "precision_of"]


def precision_of(x: Tensor) -> torch.dtype:
    """What ``x`` is convolved in: autocast's number format, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def half_precision_fails(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether ``x`` (B, C, *spatial) would be convolved in half precision on a CPU, and this can't be trusted.

    So it is where an axis is shorter than the kernel, or the stride leaves one voxel of it.
    """
    if x.device.type != "cpu" or precision_of(x) not in (torch.bfloat16, torch.float16):
        return False
    axes = zip(x.shape[2:], kernel_size, stride, strict=True)
    return any(size < kernel or (step > 1 and size <= step) for size, kernel, step in axes)


def _convolve(convolution: Conv2d | Conv3d, x: Tensor) -> Tensor:
    weight, bias = convolution.weight, convolution.bias
    if not half_precision_fails(x, convolution.kernel_size, convolution.stride):
        return convolution._conv_forward(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        result = convolution._conv_forward(x.float(), weight.float(), None if bias is None else bias.float())
    return result.to(precision_of(x))


class Conv2d(nn.Conv2d):
    """PyTorch's, but in float32 where half precision fails; the result is in half precision all the same."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return _convolve(self, x)
        return self._conv_forward(x, self.weight, self.bias)


class Conv3d(nn.Conv3d):
    """As :class:`Conv2d`, of volumes."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return _convolve(self, x)
        return self._conv_forward(x, self.weight, self.bias)


class ConvolutionBlock(Convolution):
    """MONAI's, with these convolutions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Not new ones, which would draw other weights from the same seed.
        if type(self.conv) is nn.Conv2d:
            self.conv.__class__ = Conv2d
        elif type(self.conv) is nn.Conv3d:
            self.conv.__class__ = Conv3d
