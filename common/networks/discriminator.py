"""A network that judges a probability map together with its image.

Lei et al., "Semi-Supervised Medical Image Segmentation Using Adversarial Consistency Learning and Dynamic Convolution
Network" (ASE-Net), IEEE TMI 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from monai.networks.blocks import ADN
from torch import Tensor, nn

from ..errors import BadInput
from .convolution import Conv2d, Conv3d, ConvolutionBlock
from .dynamic_convolution import make_dynamic
from .unet import PerAxis, full_precision, per_axis

__all__ = ["Discriminator"]

ACTIVATION = ("leakyrelu", {"negative_slope": 0.2, "inplace": True})
# Over all channels and voxels of a sample. The released code has batch norm, by which real and fake samples would be
# told apart by the statistics of the batch that they come in; Gulrajani et al., NeurIPS 2017, have this in its place.
NORM = ("group", {"num_groups": 1})


class Discriminator(nn.Module):
    """Two stems, one for the map and one for the image, summed; blocks; the mean over voxels; two logits.

    The stems and the blocks are strided. With one entry a strided stage of a segmentation network, anisotropic ones
    included, it sees a crop as that network's encoder does. Crops may have any size.

    Args:
        spatial_dims: 2 or 3.
        num_classes: K, channels of the probability map.
        in_channels: C, channels of the image.
        features: channels of the stems, then of each block.
        kernel_sizes: odd kernel size of the stems, then of each block, an integer or one an axis.
        strides: likewise the stride.
        dynamic: make the blocks, not the stems, of :class:`~common.networks.dynamic_convolution.DyBAC`.
        dropout: probability of dropping a channel after the stems and after each block.

    Raises:
        BadInput: when the lists disagree in length or a value is impossible; in use, when map and image don't fit.
    """

    def __init__(
        self,
        spatial_dims: int,
        num_classes: int,
        in_channels: int,
        features: Sequence[int] = (64, 128, 256, 512),
        kernel_sizes: Sequence[PerAxis] = (3, 3, 3, 3),
        strides: Sequence[PerAxis] = (2, 2, 2, 2),
        dynamic: bool = False,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if not len(features) == len(kernel_sizes) == len(strides) or not features:
            raise BadInput(
                f"features, kernel_sizes and strides of the discriminator: found {len(features)}, {len(kernel_sizes)} "
                f"and {len(strides)} entries, expected the same number in each, at least 1."
            )
        kernels = [per_axis(k, spatial_dims, f"kernel_sizes[{i}]") for i, k in enumerate(kernel_sizes)]
        steps = [per_axis(s, spatial_dims, f"strides[{i}]") for i, s in enumerate(strides)]
        for index, kernel in enumerate(kernels):
            if any(k % 2 == 0 for k in kernel):
                raise BadInput(f"kernel_sizes[{index}]: found {kernel}, expected odd sizes: 1, 3, 5 ...")

        def stem(channels: int) -> nn.Module:
            padding = tuple(k // 2 for k in kernels[0])
            convolution: Callable[..., nn.Module] = Conv3d if spatial_dims == 3 else Conv2d
            return convolution(channels, features[0], tuple(kernels[0]), tuple(steps[0]), padding)

        shared: dict[str, Any] = {"act": ACTIVATION, "dropout": dropout or None, "dropout_dim": spatial_dims}
        self.map_stem = stem(num_classes)
        self.image_stem = stem(in_channels)
        self.activation = ADN("AD", **shared)
        self.blocks = nn.Sequential(
            *(
                ConvolutionBlock(spatial_dims, before, after, stride, kernel, adn_ordering="NAD", norm=NORM, **shared)
                for before, after, stride, kernel in zip(
                    features[:-1], features[1:], steps[1:], kernels[1:], strict=True
                )
            )
        )
        if dynamic:
            for block in self.blocks:
                make_dynamic(block)
        self.verdict = nn.Linear(features[-1], 2)

    def forward(self, probabilities: Tensor, image: Tensor) -> Tensor:
        """Logits (B, 2) in float32, the second one for "real".

        Args:
            probabilities: (B, K, *spatial).
            image: (B, C, *spatial), what the map was predicted from.
        """
        if probabilities.shape[2:] != image.shape[2:] or len(probabilities) != len(image):
            raise BadInput(
                f"discriminator: found a map of shape {tuple(probabilities.shape)} and an image of "
                f"{tuple(image.shape)}, expected the same batch and spatial size."
            )
        x = self.blocks(self.activation(self.map_stem(probabilities) + self.image_stem(image)))
        return full_precision(self.verdict(x.flatten(2).mean(2)))
