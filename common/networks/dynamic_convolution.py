"""Convolution whose kernel follows the image, and nnU-Net's U-Net and the literature's V-Net made of it.

DyBAC: Lei et al., "Semi-Supervised Medical Image Segmentation Using Adversarial Consistency Learning and Dynamic
Convolution Network" (ASE-Net), IEEE TMI 2023. Its parts: spatial squeeze and excitation (Roy, Navab & Wachinger,
MICCAI 2018), and dynamic convolution with a softmax temperature that is annealed (Chen et al., "Dynamic Convolution:
Attention over Convolution Kernels", CVPR 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from ..errors import BadInput
from .convolution import half_precision_fails, precision_of
from .depthwise import DepthwiseConvolution
from .unet import PerAxis, SegmentationNetwork, full_precision, initialise, per_axis
from .vnet import CONVOLUTIONS, FEATURES, VNet

__all__ = ["DyBAC", "DyBACNetwork", "DyBACVNet", "anneal", "make_dynamic"]

SPATIAL_REDUCTION = 16
KERNEL_REDUCTION = 4


class DyBAC(nn.Module):
    """Dynamic convolution with bidirectional attention, in the place of a convolution of the same sizes.

    1. Spatial attention: each voxel is multiplied by ``sigmoid(norm(conv(conv(x))))``, 1x1 convolutions to C/16
       channels and to one, normalised over the map of each sample.
    2. A depthwise convolution with the kernel ``sum_n a_n W_n`` of N learnt ones. Its attention over kernels, for each
       sample, is ``a = softmax(linear(relu(linear(mean over voxels))) / temperature)``, of what step 1 gave.
    3. A 1x1 convolution to the output's channels.

    The weights a start near 1/N, at a high temperature, so that all kernels learn, and get sharper as :func:`anneal`
    lowers it to 1.

    The released code has batch norm in step 1; a norm of each sample's map gives the same result in training and in
    inference, whatever else is in the batch, as does the instance norm of the rest of the network.

    Args:
        spatial_dims: 2 or 3.
        in_channels: C.
        out_channels: channels of the output.
        kernel_size: odd, an integer or one an axis.
        stride: an integer or one an axis.
        bias: of the last 1x1 convolution.
        kernels: N.
        temperature: where annealing starts, at least 1.

    Raises:
        BadInput: a value is impossible.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        kernel_size: PerAxis = 3,
        stride: PerAxis = 1,
        bias: bool = True,
        kernels: int = 4,
        temperature: float = 34.0,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise BadInput(f"spatial_dims: found {spatial_dims}, expected 2 or 3.")
        if kernels < 1:
            raise BadInput(f"kernels: found {kernels}, expected 1 or more, such as 4.")
        if not temperature >= 1:
            raise BadInput(f"temperature: found {temperature}, expected 1 or more, such as 34.")
        size = per_axis(kernel_size, spatial_dims, "kernel_size")
        if any(k % 2 == 0 for k in size):
            raise BadInput(f"kernel_size: found {size}, expected odd sizes: 1, 3, 5 ...")
        self.spatial_dims = spatial_dims
        self.stride = per_axis(stride, spatial_dims, "stride")
        self.padding = [k // 2 for k in size]
        self.initial_temperature = float(temperature)
        # A buffer, so that a resumed run and the deployed weights have the temperature that the training was at.
        # Annotated here and not in the class, where TorchScript would read it.
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(self.initial_temperature))

        pointwise = Conv[Conv.CONV, spatial_dims]
        squeezed = max(in_channels // SPATIAL_REDUCTION, 1)
        # Without biases, which the norm would take away again.
        self.spatial_excitation = nn.Sequential(
            pointwise(in_channels, squeezed, 1, bias=False), pointwise(squeezed, 1, 1, bias=False)
        )
        self.spatial_scale = nn.Parameter(torch.ones(()))
        self.spatial_shift = nn.Parameter(torch.zeros(()))
        hidden = in_channels // KERNEL_REDUCTION + 1
        self.kernel_excitation = nn.Sequential(
            nn.Linear(in_channels, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, kernels, bias=False)
        )
        self.kernels = nn.Parameter(torch.empty(kernels, in_channels, *size))
        self.output = pointwise(in_channels, out_channels, 1, bias=bias)
        initialise(self)
        self.reset_parameters()

    @torch.jit.unused
    def reset_parameters(self) -> None:
        """Draw the kernels anew."""
        nn.init.normal_(self.kernels, std=math.prod(self.kernels.shape[2:]) ** -0.5)

    def extra_repr(self) -> str:
        """What a printed network says of this block."""
        return f"kernels={tuple(self.kernels.shape)}, stride={self.stride}, temperature={float(self.temperature):g}"

    @torch.jit.unused
    def set_progress(self, fraction: float) -> None:
        """Lower the temperature, on the line from its first value at ``fraction`` 0 to 1 at ``fraction`` 1 and after.

        It is never raised: weights that were trained before start where they are.
        """
        self.temperature.clamp_(max=1.0 + (self.initial_temperature - 1.0) * (1.0 - min(max(fraction, 0.0), 1.0)))

    def kernel_attention(self, x: Tensor) -> Tensor:
        """The weights (B, N) of the kernels for each sample of ``x`` (B, C, *spatial); each sample's sum to 1."""
        each = x.flatten(2).transpose(1, 2)
        if x.device.type == "cpu":
            # As a product, whose gradient lies in memory as x does, to which it is added.
            share = each.new_full((each.shape[0], 1, each.shape[1]), 1 / each.shape[1])
            mean = torch.matmul(share, each).squeeze(1)
        else:
            mean = each.mean(1, dtype=torch.float32)
        return torch.softmax(full_precision(self.kernel_excitation(mean)) / self.temperature, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *spatial) to (B, out_channels, *spatial), each axis divided by its stride and rounded up."""
        excitation = self.spatial_excitation(x)
        excitation = F.layer_norm(excitation, excitation.shape[1:]) * self.spatial_scale + self.spatial_shift
        x = x * torch.sigmoid(excitation).to(x.dtype)
        kernels = torch.einsum("bn,nc...->bc...", self.kernel_attention(x), self.kernels)
        return self.output(self._depthwise(x, kernels.unsqueeze(2)))

    def _depthwise(self, x: Tensor, kernels: Tensor) -> Tensor:
        """Each sample of ``x`` (B, C, *spatial) with its own ``kernels`` (B, C, 1, *size)."""
        traced = torch.jit.is_tracing()
        if not torch.jit.is_scripting() and not traced and x.device.type == "cpu" and torch.is_grad_enabled():
            precision, kernels = precision_of(x), kernels.squeeze(2)
            if half_precision_fails(x, kernels.shape[2:], self.stride):
                with torch.autocast("cpu", enabled=False):
                    return DepthwiseConvolution.apply(x.float(), kernels.float(), self.stride).to(precision)
            return DepthwiseConvolution.apply(x.to(precision), kernels.to(precision), self.stride)
        samples: list[Tensor] = []
        # Not in one convolution with the samples as groups: that would leave the order in memory.
        for sample, kernel in zip(x.split(1), kernels.unbind()):  # noqa: B905 (TorchScript)
            if self.spatial_dims == 2:
                samples.append(F.conv2d(sample, kernel, None, self.stride, self.padding, 1, kernel.shape[0]))
            else:
                samples.append(F.conv3d(sample, kernel, None, self.stride, self.padding, 1, kernel.shape[0]))
        return torch.cat(samples)


def make_dynamic(block: nn.Module) -> None:
    """Put a :class:`DyBAC` in the place of the convolution inside a MONAI block; norm and activation stay."""
    conv = block.get_submodule("conv")
    assert isinstance(conv, nn.Conv2d | nn.Conv3d)
    block.conv = DyBAC(
        spatial_dims=len(conv.kernel_size),
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel_size=conv.kernel_size,
        stride=conv.stride,
        bias=conv.bias is not None,
    )


def _make_stages_dynamic(network: SegmentationNetwork | VNet) -> None:
    """All stages' convolutions of an odd size but the very first; those of an even one halve or double the axes."""
    stages = [*network.encoder.stages, *network.segmentation_decoder.stages]
    blocks = [block for stage in stages for block in stage.children()]
    for block in blocks[1:]:
        if all(size % 2 for size in block.get_submodule("conv").kernel_size):
            make_dynamic(block)


def anneal(network: nn.Module, fraction: float, leave: Iterable[nn.Module] = ()) -> None:
    """Call :meth:`DyBAC.set_progress` of every such block in ``network``, but for those in the modules to ``leave``."""
    left = {module for root in leave for module in root.modules()}
    for module in network.modules():
        if isinstance(module, DyBAC) and module not in left:
            module.set_progress(fraction)


class DyBACNetwork(SegmentationNetwork):
    """nnU-Net's U-Net with :class:`DyBAC` in the place of every stage's convolutions but the very first.

    The first one stays as it is, since a depthwise convolution of a single image channel would see too little. So do
    the transposed convolutions and the heads.

    Args:
        spatial_dims, in_channels, out_channels, features, kernel_sizes, strides, convolutions_per_stage, dropout: see
            :class:`~common.networks.SegmentationNetwork`.
        channels_last: as there.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int],
        kernel_sizes: Sequence[PerAxis],
        strides: Sequence[PerAxis],
        convolutions_per_stage: int = 2,
        dropout: float = 0.0,
        channels_last: bool | None = None,
    ) -> None:
        super().__init__(
            *(spatial_dims, in_channels, out_channels, features, kernel_sizes, strides),
            *(convolutions_per_stage, dropout, channels_last),
        )
        _make_stages_dynamic(self)


class DyBACVNet(VNet):
    """The literature's V-Net with :class:`DyBAC` in the place of its convolutions of 3 voxels but the very first.

    Those of 2 voxels, which halve or double the axes, stay as they are, and so does the head.

    Args:
        spatial_dims, in_channels, out_channels, features, convolutions, dropout, channels_last: see
            :class:`~common.networks.vnet.VNet`.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int] = FEATURES,
        convolutions: Sequence[int] = CONVOLUTIONS,
        dropout: float = 0.5,
        channels_last: bool | None = None,
    ) -> None:
        super().__init__(spatial_dims, in_channels, out_channels, features, convolutions, dropout, channels_last)
        _make_stages_dynamic(self)
