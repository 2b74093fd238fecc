"""V-Net in the form of the semi-supervised literature on the left atrium.

Milletari, Navab & Ahmadi, "V-Net: fully convolutional neural networks for volumetric medical image segmentation", 3DV
2016, as UA-MT (Yu et al., MICCAI 2019), DTC, MC-Net, SS-Net and BCP use it: kernels of 3 in place of 5, batch norm and
ReLU in place of PReLU, no residual sums inside a stage, two classes by softmax. A stage's skip is added to what comes
up from below, not concatenated. Convolutions keep PyTorch's own initialisation, as there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from monai.networks.layers.factories import Conv, Dropout
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import BadInput
from .convolution import ConvolutionBlock
from .layout import ChannelsLast
from .unet import Encoder, full_precision

__all__ = ["VNet", "VNetDecoder", "VNetEncoder", "without_running_statistics"]

FEATURES = (16, 32, 64, 128, 256)
CONVOLUTIONS = (1, 2, 3, 3, 3)


def _block(spatial_dims: int, before: int, after: int, stride: int = 1, transposed: bool = False) -> ConvolutionBlock:
    """Convolution, batch norm, ReLU: of 3 at stride 1, else of the stride's own size, so that windows don't overlap."""
    return ConvolutionBlock(
        spatial_dims,
        before,
        after,
        strides=stride,
        kernel_size=3 if stride == 1 else stride,
        padding=1 if stride == 1 else 0,
        output_padding=0 if transposed else None,
        is_transposed=transposed,
        adn_ordering="NA",
        act=("relu", {"inplace": True}),
        norm="batch",
        bias=True,
    )


def _blocks(spatial_dims: int, channels: int, count: int) -> list[nn.Module]:
    return [_block(spatial_dims, channels, channels) for _ in range(count)]


class VNetEncoder(nn.Module):
    """The contracting half: returns the features of all its stages.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        features: channels of each stage, highest resolution first; every further stage halves all axes.
        convolutions: convolutions of each stage, not counting the strided one before it.
        dropout: probability of dropping a channel of the last stage. 0 leaves dropout out.
        channels_last: the order of features in memory, see :class:`.layout.ChannelsLast`.

    Raises:
        BadInput: when the lists disagree in length or a value is impossible.

    Attributes:
        features, convolutions, strides: one entry a stage.
        divisor: what the size of an image must be a multiple of, an axis.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        features: Sequence[int] = FEATURES,
        convolutions: Sequence[int] = CONVOLUTIONS,
        dropout: float = 0.5,
        channels_last: bool | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise BadInput(f"spatial_dims: found {spatial_dims}, expected 2 or 3.")
        if len(features) != len(convolutions) or len(features) < 2:
            raise BadInput(
                f"features and convolutions: found {len(features)} and {len(convolutions)} entries, expected the same "
                "number in both, at least 2. Give one entry a stage, highest resolution first."
            )
        if min(convolutions) < 1:
            raise BadInput(f"convolutions: found {list(convolutions)}, expected 1 or more in each stage.")
        if not 0 <= dropout < 1:
            raise BadInput(f"dropout: found {dropout}, expected a probability from 0 to below 1.")
        self.lay_out = ChannelsLast(channels_last)
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.features = list(features)
        self.convolutions = list(convolutions)
        self.strides = [[1] * spatial_dims] + [[2] * spatial_dims for _ in features[1:]]
        self.divisor = [2 ** (len(features) - 1)] * spatial_dims
        first = [
            _block(spatial_dims, in_channels, features[0]),
            *_blocks(spatial_dims, features[0], convolutions[0] - 1),
        ]
        self.stages = nn.ModuleList([nn.Sequential(*first)])
        for before, after, count in zip(features[:-1], features[1:], convolutions[1:], strict=True):
            down = _block(spatial_dims, before, after, stride=2)
            self.stages.append(nn.Sequential(down, *_blocks(spatial_dims, after, count)))
        self.dropout = Dropout[Dropout.DROPOUT, spatial_dims](dropout) if dropout else nn.Identity()

    check_size = Encoder.check_size

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of all stages, high to low resolution, from an image (B, C, *spatial)."""
        x = self.lay_out(x)
        features: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        features[-1] = self.dropout(x)
        return features


class VNetDecoder(nn.Module):
    """The expanding half for a :class:`VNetEncoder`: returns the features of all its stages.

    Args:
        encoder: gives the channels and the convolutions a stage. It is only read, not kept.
        out_channels: channels of the head, of which there is one, at full resolution.
        dropout: probability of dropping a channel before the head. 0 leaves dropout out.
    """

    def __init__(self, encoder: VNetEncoder, out_channels: int, dropout: float = 0.5) -> None:
        super().__init__()
        dims, features = encoder.spatial_dims, encoder.features
        levels = list(reversed(range(len(features) - 1)))
        # From low to high resolution, as they are run.
        self.upsampling = nn.ModuleList(
            _block(dims, features[level + 1], features[level], stride=2, transposed=True) for level in levels
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*_blocks(dims, features[level], encoder.convolutions[level])) for level in levels
        )
        self.dropout = Dropout[Dropout.DROPOUT, dims](dropout) if dropout else nn.Identity()
        self.heads = nn.ModuleList([Conv[Conv.CONV, dims](features[0], out_channels, kernel_size=1)])
        self.features = [features[level] for level in levels]

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
        return x + skip

    def full_resolution(self, decoded: list[Tensor]) -> Tensor:
        """The head's output (B, out_channels, *spatial), in float32 or better."""
        return full_precision(self.heads[-1](self.dropout(decoded[-1])))

    def logits(self, decoded: list[Tensor]) -> list[Tensor]:
        """The head's output as a list of one: this network has no deep supervision."""
        return [self.full_resolution(decoded)]


class VNet(nn.Module):
    """The literature's V-Net: ``encoder`` and ``segmentation_decoder``, 9.45 M weights as it stands.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: number of classes K, background included.
        features: channels of each stage, highest resolution first.
        convolutions: convolutions of each stage of the encoder; the decoder has the same, but for the lowest stage.
        dropout: probability of dropping a channel after the lowest stage and before the head.
        channels_last: see :class:`VNetEncoder`.

    Raises:
        BadInput: when the lists disagree in length or a value is impossible; in use, when the image's size isn't a
            multiple of ``divisor``.
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
        super().__init__()
        self.encoder = VNetEncoder(spatial_dims, in_channels, features, convolutions, dropout, channels_last)
        self.divisor = self.encoder.divisor
        self.segmentation_decoder = VNetDecoder(self.encoder, out_channels, dropout)

    def forward_all(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """For training: the encoder's features, high to low resolution, and the logits as a list of one."""
        if not torch.jit.is_scripting():
            self.encoder.check_size(x)
        features = self.encoder(x)
        return features, self.segmentation_decoder.logits(self.segmentation_decoder(features))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, *spatial) of an image (B, C, *spatial)."""
        return self.forward_all(x)[1][0]


@contextmanager
def without_running_statistics(network: nn.Module) -> Iterator[None]:
    """Batch norms inside ``network`` normalise as ever, and learn nothing for their use in inference."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    training = [norm for norm in norms if norm.training and norm.track_running_stats]
    # Not by a momentum of 0, with which a batch that overflows would leave NaN.
    for norm in training:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in training:
            norm.track_running_stats = True
