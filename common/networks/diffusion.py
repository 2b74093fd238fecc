"""A segmentation network with a denoising branch beside it: one encoder, two stems, three decoders.

The network of "Towards Generic Semi-Supervised Framework for Volumetric Medical Image Segmentation" (Wang & Li, NeurIPS
2023) on nnU-Net's encoder and decoder, or on the V-Net's, which the paper has; the step embedding is that of denoising
diffusion (Ho, Jain & Abbeel, NeurIPS 2020).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import Tensor, nn

from .unet import Decoder, SegmentationNetwork, initialise
from .vnet import VNet, VNetDecoder, VNetEncoder, without_running_statistics

__all__ = ["AggregatingDecouplingNetwork", "StepEmbedding"]


_Part = TypeVar("_Part", bound=nn.Module)


class StepEmbedding(nn.Module):
    """A diffusion step as a vector: sinusoids, then two linear layers.

    Args:
        sinusoids: length of the sinusoidal embedding.
        channels: length of the vector.
    """

    def __init__(self, sinusoids: int = 128, channels: int = 512) -> None:
        super().__init__()
        self.sinusoids = sinusoids
        self.layers = nn.Sequential(nn.Linear(sinusoids, channels), nn.SiLU(), nn.Linear(channels, channels), nn.SiLU())

    def forward(self, step: Tensor) -> Tensor:
        """(B, channels) of the steps (B,)."""
        return self.layers(get_timestep_embedding(step, self.sinusoids))


class AggregatingDecouplingNetwork(nn.Module):
    """Three decoders on one encoder.

    - ``segmentation_decoder`` (theta), the one for inference, and
    - ``difficulty_decoder`` (psi) read the image's features;
    - ``diffusion_decoder`` (xi) reads the features of the image together with a noisy label, which enter by a stem of
      their own, ``noisy_stem``, and under a diffusion step.

    ``encoder`` and ``segmentation_decoder`` are those of the network that is given, shared and not copied, so training
    this network trains that one, and their weights have its names. The other parts start from random weights.

    Batch norms, which the V-Net has, keep the running statistics of images alone: the deployed network never sees a
    noisy label.

    The step moves each stage's first block, in encoder and diffusion decoder, by a shift a channel *between* its norm
    and its activation. Behind the activation it would be lost: what is constant over the volume passes a convolution as
    a constant, which the next norm takes away.

    Args:
        network: gives encoder and segmentation decoder, and the settings of the other parts.
        diffusion: False leaves the denoising branch out.
        embedding: length of the step's embedding.
    """

    def __init__(self, network: SegmentationNetwork | VNet, diffusion: bool = True, embedding: int = 512) -> None:
        super().__init__()
        encoder, decoder = network.encoder, network.segmentation_decoder
        self.num_classes = decoder.heads[-1].get_parameter("weight").shape[0]
        self.encoder = encoder
        self.segmentation_decoder = decoder
        self.difficulty_decoder = _anew(decoder)
        self.diffusion_decoder = _anew(decoder) if diffusion else None
        if diffusion:
            self.noisy_stem = _wider(encoder.stages[0].get_submodule("0"), self.num_classes)
            self.step_embedding = StepEmbedding(channels=embedding)
            self.encoder_shifts = nn.ModuleList(nn.Linear(embedding, width) for width in encoder.features)
            self.decoder_shifts = nn.ModuleList(nn.Linear(embedding, width) for width in decoder.features)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Features of all stages, high to low resolution, of an image (B, C, *spatial).

        Raises:
            BadInput: the image's size or channels don't fit the encoder.
        """
        self.encoder.check_size(image)
        return self.encoder(image)

    def denoise(self, image: Tensor, noisy: Tensor, step: Tensor) -> list[Tensor]:
        """Logits of the clean label at all decoder stages, high to low resolution.

        Args:
            image: (B, C, *spatial).
            noisy: (B, K, *spatial), the label in -1 to 1 under noise.
            step: (B,), integers, how far the noise has gone.
        """
        self.encoder.check_size(image)
        decoder = self.diffusion_decoder
        assert decoder is not None, "it was made without the denoising branch"
        with without_running_statistics(self):
            return self._denoise(decoder, torch.cat([image, noisy.to(image.dtype)], dim=1), self.step_embedding(step))

    def _denoise(self, decoder: Decoder | VNetDecoder, x: Tensor, embedding: Tensor) -> list[Tensor]:
        x = self.encoder.lay_out(x)
        features: list[Tensor] = []
        for index, (stage, shift) in enumerate(zip(self.encoder.stages, self.encoder_shifts, strict=True)):
            blocks = list(stage.children())
            if index == 0:
                blocks[0] = self.noisy_stem
            x = _shifted(blocks, x, shift(embedding))
            features.append(x)
        if isinstance(self.encoder, VNetEncoder):
            features[-1] = x = self.encoder.dropout(x)
        decoded: list[Tensor] = []
        stages = zip(decoder.upsampling, decoder.stages, self.decoder_shifts, reversed(features[:-1]), strict=True)
        for upsample, stage, shift, skip in stages:
            x = _shifted(list(stage.children()), decoder.join(upsample(x), skip), shift(embedding))
            decoded.append(x)
        return decoder.logits(decoded)

    def forward(self, image: Tensor) -> Tensor:
        """The segmentation decoder's logits (B, K, *spatial) of an image (B, C, *spatial)."""
        return self.segmentation_decoder.logits(self.segmentation_decoder(self.encode(image)))[0]


def _anew(part: _Part) -> _Part:
    """A part of the same shape with random weights."""
    part = copy.deepcopy(part)
    for module in part.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    initialise(part)
    return part


def _wider(block: nn.Module, channels: int) -> nn.Module:
    """A convolution block like ``block`` that takes ``channels`` more."""
    block, conv = _anew(block), block.get_submodule("conv")
    assert isinstance(conv, nn.Conv2d | nn.Conv3d)
    same_kind: Callable[..., nn.Module] = type(conv)
    block.conv = same_kind(
        conv.in_channels + channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=True
    )
    initialise(block)
    return block


def _shifted(blocks: Sequence[nn.Module], x: Tensor, shift: Tensor) -> Tensor:
    """A stage whose first block's norm is followed by a shift (B, channels)."""
    x = blocks[0].get_submodule("conv")(x)
    for name, layer in blocks[0].get_submodule("adn").named_children():
        x = layer(x)
        if name == "N":
            x = x + shift.reshape(*shift.shape, *[1] * (x.dim() - 2))
    for block in blocks[1:]:
        x = block(x)
    return x
