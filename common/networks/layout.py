"""The order of features in memory: the channels of a voxel side by side (PyTorch's ``channels_last``) on CPUs.

Convolutions there work in that order and otherwise copy their result back, which costs up to twice what they compute.
The networks' encoders bring the image into it, and their layers hand it on. ``docs/performance.md`` has what it is
worth. A network that is traced, exported or compiled takes its image as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Norm
from torch import Tensor, nn

__all__ = ["NORM_NAME", "ChannelsLast", "InstanceNorm2d", "InstanceNorm3d", "channels_side_by_side"]


def channels_side_by_side(x: Tensor) -> Tensor:
    """``x`` (B, C, *spatial), in PyTorch's ``channels_last`` or ``channels_last_3d``, an image of one channel included.

    Of one channel both orders are the same memory, so PyTorch's own conversion leaves it as it is, and convolutions go
    on in the default order.
    """
    if x.shape[1] > 1:
        return x.contiguous(memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last)
    strides = list(x.contiguous().stride())
    strides[1] = 1
    return x.contiguous().as_strided(x.shape, strides)


class ChannelsLast(nn.Module):
    """Brings an image into the order in memory that is faster, and leaves its values as they are.

    Args:
        channels_last: whether the channels of a voxel lie side by side; None is on CPUs alone.
    """

    def __init__(self, channels_last: bool | None = None) -> None:
        super().__init__()
        self.on_cpu = channels_last is not False
        self.elsewhere = channels_last is True

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and (torch.jit.is_tracing() or torch.compiler.is_compiling()):
            return x
        wanted = self.on_cpu if x.device.type == "cpu" else self.elsewhere
        return channels_side_by_side(x) if wanted else x


def _instance_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    if x.shape[1] == 1 or x.stride(1) != 1:
        return F.instance_norm(x, weight=weight, bias=bias, eps=epsilon)
    # PyTorch's own would copy to the default order and stay there. Batch norm of one sample is the same.
    samples = [F.batch_norm(sample, None, None, weight, bias, training=True, eps=epsilon) for sample in x.split(1)]
    return torch.cat(samples) if len(samples) > 1 else samples[0]


class InstanceNorm2d(nn.InstanceNorm2d):
    """PyTorch's, but that keeps features in the order in memory in which it gets them; without running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return _instance_norm(x, self.weight, self.bias, self.eps)


class InstanceNorm3d(nn.InstanceNorm3d):
    """As :class:`InstanceNorm2d`, of volumes."""

    def forward(self, x: Tensor) -> Tensor:
        return _instance_norm(x, self.weight, self.bias, self.eps)


#: in MONAI's factory, where a packed bundle's copy of this module must not take its place: what it defines goes with it
NORM_NAME = f"instance_keeping_order_of_{__name__.replace('.', '_')}"


@Norm.factory_function(NORM_NAME)
def _of_dimension(spatial_dims: int) -> type[nn.Module]:
    return InstanceNorm3d if spatial_dims == 3 else InstanceNorm2d
