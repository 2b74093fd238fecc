"""nnU-Net v2's plain-convolution U-Net, as an encoder and a decoder that other networks reuse.

Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
Nature Methods 2021. Every stage is convolution, (dropout,) instance norm, leaky ReLU; the encoder goes down by strided
convolutions, the decoder goes up by transposed ones; one 1x1 head a decoder stage serves deep supervision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from ..errors import BadInput
from .convolution import ConvolutionBlock
from .layout import NORM_NAME, ChannelsLast

__all__ = ["Decoder", "Encoder", "SegmentationNetwork", "full_precision", "initialise", "per_axis"]

PerAxis = int | Sequence[int]

NEGATIVE_SLOPE = 0.01
NORM = (NORM_NAME, {"affine": True, "eps": 1e-5})
ACTIVATION = ("leakyrelu", {"negative_slope": NEGATIVE_SLOPE, "inplace": True})
INTERPOLATION = {2: "bilinear", 3: "trilinear"}


def per_axis(value: PerAxis, spatial_dims: int, name: str) -> list[int]:
    """One positive integer a spatial axis.

    Args:
        value: an integer for all axes, or one an axis.
        spatial_dims: 2 or 3.
        name: what the value is called in the error message.

    Raises:
        BadInput: when the number of axes is another one, or a value isn't a positive integer.
    """
    values = [value] * spatial_dims if isinstance(value, int) else list(value)
    if len(values) != spatial_dims or not all(isinstance(v, int) and v > 0 for v in values):
        raise BadInput(
            f"{name}: found {value}, expected a positive integer or {spatial_dims} of them (spatial_dims is "
            f"{spatial_dims}). Give one value an axis."
        )
    return values


def full_precision(x: Tensor) -> Tensor:
    """``x`` as float32 where mixed precision left it in half precision, else unchanged."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return x.float()
    return x


def initialise(network: nn.Module) -> None:
    """He initialisation for leaky ReLU and zero biases, for every (transposed) convolution inside ``network``."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, a=NEGATIVE_SLOPE)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _stage(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    kernel_size: list[int],
    stride: list[int],
    convolutions: int,
    dropout: float,
) -> nn.Sequential:
    """Convolution blocks in a row, the first of them strided."""
    return nn.Sequential(
        *(
            ConvolutionBlock(
                spatial_dims,
                in_channels if index == 0 else out_channels,
                out_channels,
                strides=stride if index == 0 else 1,
                kernel_size=kernel_size,
                adn_ordering="DNA",
                act=ACTIVATION,
                norm=NORM,
                dropout=dropout or None,
                dropout_dim=spatial_dims,
                bias=True,
            )
            for index in range(convolutions)
        )
    )


class _Sized(Protocol):
    """What :meth:`Encoder.check_size` reads."""

    spatial_dims: int
    in_channels: int
    divisor: list[int]


class Encoder(nn.Module):
    """The contracting half: returns the features of all its stages.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        features: channels of each stage, highest resolution first.
        kernel_sizes: odd kernel size of each stage, an integer or one an axis.
        strides: stride of each stage's first convolution, an integer or one an axis. ``strides[0]`` is usually 1.
        convolutions_per_stage: convolution blocks in a stage.
        dropout: probability of dropping a channel after a convolution. 0 leaves dropout out.
        channels_last: the order of features in memory, see :class:`.layout.ChannelsLast`.

    Raises:
        BadInput: when the lists disagree in length or a value is impossible.

    Attributes:
        features, kernel_sizes, strides: as given, the latter two one value an axis.
        divisor: what the size of an image must be a multiple of, an axis.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        features: Sequence[int],
        kernel_sizes: Sequence[PerAxis],
        strides: Sequence[PerAxis],
        convolutions_per_stage: int = 2,
        dropout: float = 0.0,
        channels_last: bool | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims not in INTERPOLATION:
            raise BadInput(f"spatial_dims: found {spatial_dims}, expected 2 or 3.")
        if isinstance(kernel_sizes, int) or isinstance(strides, int):
            raise BadInput(
                f"kernel_sizes and strides: found {kernel_sizes} and {strides}, expected lists with one entry for each "
                f"of the {len(features)} stages."
            )
        if not len(features) == len(kernel_sizes) == len(strides) or len(features) < 2:
            raise BadInput(
                f"features, kernel_sizes and strides: found {len(features)}, {len(kernel_sizes)} and {len(strides)} "
                "entries, expected the same number in each, at least 2. Give one entry a stage, highest resolution "
                "first."
            )
        if convolutions_per_stage < 1:
            raise BadInput(f"convolutions_per_stage: found {convolutions_per_stage}, expected 1 or more.")
        self.lay_out = ChannelsLast(channels_last)
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.features = list(features)
        self.kernel_sizes = [per_axis(k, spatial_dims, f"kernel_sizes[{i}]") for i, k in enumerate(kernel_sizes)]
        self.strides = [per_axis(s, spatial_dims, f"strides[{i}]") for i, s in enumerate(strides)]
        self.divisor = [math.prod(axis) for axis in zip(*self.strides, strict=True)]
        for index, kernel in enumerate(self.kernel_sizes):
            if any(k % 2 == 0 for k in kernel):
                raise BadInput(f"kernel_sizes[{index}]: found {kernel}, expected odd sizes: 1, 3, 5 ...")
        channels = [in_channels, *self.features]
        self.stages = nn.ModuleList(
            _stage(spatial_dims, before, after, kernel, stride, convolutions_per_stage, dropout)
            for before, after, kernel, stride in zip(
                channels, self.features, self.kernel_sizes, self.strides, strict=False
            )
        )
        initialise(self)

    @torch.jit.unused
    def check_size(self: _Sized, x: Tensor) -> None:
        """Raise :class:`BadInput` when this encoder and its decoders can't take the batch ``x`` (B, C, *spatial)."""
        if x.dim() != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            raise BadInput(
                f"network input: found shape {tuple(x.shape)}, expected (batch, {self.in_channels}, "
                f"{self.spatial_dims} spatial axes). Check the image's channels and the network's in_channels and "
                "spatial_dims."
            )
        size, divisor = list(x.shape[2:]), self.divisor
        if any(s == 0 or s % d for s, d in zip(size, divisor, strict=True)):
            raise BadInput(
                f"network input: found spatial size {size}, expected a multiple of {divisor}. Choose such a "
                "patch_size, or pad the image to one."
            )
        if size == divisor:
            raise BadInput(
                f"network input: found spatial size {size}, of which the network's strides leave a single voxel that "
                "can't be normalised. Choose a larger patch_size or a network with fewer stages."
            )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of all stages, high to low resolution, from an image (B, C, *spatial)."""
        x = self.lay_out(x)
        features: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class Decoder(nn.Module):
    """The expanding half for an :class:`Encoder`: returns the features of all its stages.

    Args:
        encoder: gives the channels, kernel sizes and strides. It is only read, not kept.
        out_channels: channels of the heads.
        convolutions_per_stage: convolution blocks in a stage.
        dropout: probability of dropping a channel after a convolution. 0 leaves dropout out.
        deep_supervision: whether every stage gets a head, or the last one only.
        width: channels of a stage as a share of the encoder's, at least 1 channel.
        last_stage: the stage to end at, 0 the full resolution; the outputs of a coarser one are interpolated.
    """

    def __init__(
        self,
        encoder: Encoder,
        out_channels: int,
        convolutions_per_stage: int = 2,
        dropout: float = 0.0,
        deep_supervision: bool = True,
        width: float = 1.0,
        last_stage: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= last_stage < len(encoder.features) - 1:
            raise BadInput(
                f"last stage of a decoder: found {last_stage}, expected 0 (full resolution) to "
                f"{len(encoder.features) - 2} in a network of {len(encoder.features)} stages."
            )
        if not 0 < width <= 1:
            raise BadInput(f"width of a decoder: found {width}, expected a share of the encoder's above 0, at most 1.")
        if convolutions_per_stage < 1:
            raise BadInput(f"convolutions of a decoder's stage: found {convolutions_per_stage}, expected 1 or more.")
        dims = encoder.spatial_dims
        features = [max(1, round(width * channels)) for channels in encoder.features[:-1]] + encoder.features[-1:]
        transposed, pointwise = Conv[Conv.CONVTRANS, dims], Conv[Conv.CONV, dims]
        levels = list(reversed(range(last_stage, len(features) - 1)))
        # From low to high resolution, as they are run.
        self.upsampling = nn.ModuleList(
            transposed(
                features[level + 1],
                features[level],
                kernel_size=tuple(encoder.strides[level + 1]),
                stride=tuple(encoder.strides[level + 1]),
                bias=True,
            )
            for level in levels
        )
        self.stages = nn.ModuleList(
            _stage(
                dims,
                features[level] + encoder.features[level],
                features[level],
                encoder.kernel_sizes[level],
                [1] * dims,
                convolutions_per_stage,
                dropout,
            )
            for level in levels
        )
        self.heads = nn.ModuleList(
            pointwise(features[level], out_channels, kernel_size=1, bias=True)
            for level in (levels if deep_supervision else levels[-1:])
        )
        self.features = [features[level] for level in levels]
        # An encoder that strides at once leaves even the first stage below the image's resolution.
        self.last_scale = [float(math.prod(axis)) for axis in zip(*encoder.strides[: last_stage + 1], strict=True)]
        self.reaches_full_resolution = all(scale == 1 for scale in self.last_scale)
        self.interpolation = INTERPOLATION[dims]
        initialise(self)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Decoded features, low to high resolution, from an encoder's features (high to low)."""
        x = features[-1]
        decoded: list[Tensor] = []
        for index, (upsample, stage) in enumerate(zip(self.upsampling, self.stages)):  # noqa: B905 (TorchScript)
            x = stage(self.join(upsample(x), features[-2 - index]))
            decoded.append(x)
        return decoded

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """What comes up from the stage below, and the encoder's features of this stage, as a stage's input."""
        return torch.cat([x, skip], dim=1)

    def full_resolution(self, decoded: list[Tensor]) -> Tensor:
        """The last stage's head at the image's resolution, (B, out_channels, *spatial), in float32 or better."""
        x = full_precision(self.heads[-1](decoded[-1]))
        if not self.reaches_full_resolution:
            x = F.interpolate(x, scale_factor=self.last_scale, mode=self.interpolation, align_corners=False)
        return x

    def logits(self, decoded: list[Tensor]) -> list[Tensor]:
        """The heads' outputs, high to low resolution, from the decoded features; one where only the last has a head."""
        outputs = [self.full_resolution(decoded)]
        lower: list[Tensor] = []
        for index, head in enumerate(self.heads):
            if index < len(self.heads) - 1:
                lower.append(full_precision(head(decoded[index])))
        lower.reverse()
        outputs.extend(lower)
        return outputs


class SegmentationNetwork(nn.Module):
    """nnU-Net's U-Net: ``encoder`` and ``segmentation_decoder``.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: number of classes K, background included.
        features: channels of each stage, highest resolution first.
        kernel_sizes: odd kernel size of each stage, an integer or one an axis.
        strides: stride of each stage's first convolution, an integer or one an axis.
        convolutions_per_stage: convolution blocks in a stage, in encoder and decoder.
        dropout: probability of dropping a channel after a convolution.
        channels_last: the order of features in memory, see :class:`.layout.ChannelsLast`.

    Raises:
        BadInput: when the lists disagree in length or a value is impossible; in use, when the image's size isn't a
            multiple of ``divisor``.
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
        super().__init__()
        self.encoder = Encoder(
            spatial_dims, in_channels, features, kernel_sizes, strides, convolutions_per_stage, dropout, channels_last
        )
        self.divisor = self.encoder.divisor
        self.segmentation_decoder = Decoder(self.encoder, out_channels, convolutions_per_stage, dropout)

    def forward_all(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """For training: the encoder's features and the logits of all decoder stages, both high to low resolution."""
        if not torch.jit.is_scripting():
            self.encoder.check_size(x)
        features = self.encoder(x)
        return features, self.segmentation_decoder.logits(self.segmentation_decoder(features))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, *spatial) of an image (B, C, *spatial)."""
        return self.forward_all(x)[1][0]
