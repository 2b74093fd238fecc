"""Augmentation by a few operations drawn at random, alike for labelled and unlabelled crops.

The sampling-based volumetric augmentation of Wang & Li, "Towards Generic Semi-Supervised Framework for Volumetric
Medical Image Segmentation", NeurIPS 2023. By default magnification is from 0.7 to 1.3 and rotation about every axis;
the released code has 0.7 to 1 and the first axis alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from monai.transforms import (
    Compose,
    Identityd,
    OneOf,
    RandAdjustContrastd,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandSpatialCropd,
    Resized,
    SomeOf,
)

from ..errors import BadInput
from .geometry import RandInPlaneZoomd, Untracked, modes, random_affine, typed

__all__ = ["sampled_augmentation"]


def sampled_augmentation(
    patch_size: Sequence[int],
    keys: Sequence[str] = ("image", "label"),
    operations: int = 3,
    probability: float = 0.7,
    crop: float = 0.7,
    rotation: float = 15.0,
    scale: Sequence[float] = (0.7, 1.3),
    sigma: Sequence[float] = (0.7, 1.3),
    factor: float = 0.3,
    gamma: Sequence[float] = (0.7, 1.3),
    spacing: Sequence[float] | None = None,
    thick_axis: int | None = None,
) -> Compose:
    """Some of seven operations, in random order: crop and resize, rotation, scaling, Gaussian blur, brightness,
    contrast, gamma.

    Args:
        patch_size: voxels a spatial axis.
        keys: ``image``, ``label`` and dense maps move together, labels and maps by the nearest voxel; only ``image``
            changes its intensities.
        operations: how many are drawn, without repetition; 0 for no augmentation.
        probability: of a drawn operation to be done.
        crop: smallest side of a crop, as a share of the patch's; it is resized to the patch.
        rotation: largest angle in degrees, about every axis.
        scale: smallest and largest magnification.
        sigma: smallest and largest standard deviation of the blur in voxels.
        factor: brightness and contrast are multiplied by 1 - ``factor`` to 1 + ``factor``.
        gamma: smallest and largest exponent.
        spacing: voxel size in mm, one number an axis, with which rotations keep shapes; None takes voxels for cubes.
        thick_axis: the axis along which voxels are much thicker, if any: neither cropped nor scaled, nor rotated out of
            its plane.

    Returns:
        A transform of a patch; labels come out as int64, maps and images as float32.

    Raises:
        BadInput: more operations than there are, or a share outside 0 to 1.
    """
    rank = len(patch_size)
    thick = thick_axis % rank if thick_axis is not None and rank == 3 else None
    for name, value, lowest in (("probability", probability, 0.0), ("crop", crop, 1e-6)):
        if not lowest <= value <= 1:
            raise BadInput(f"`{name}` is {value}; expected a share from 0 to 1")
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise BadInput(f"`scale` is {list(scale)}; expected the smallest and the largest magnification")
    blur, exponents = cast("list[tuple[float, float]]", [sigma, gamma])  # MONAI takes any pair
    pool: list[Callable] = [
        _crop_and_resize(keys, patch_size, crop, probability, thick),
        random_affine(keys, rank, probability, rotation, range(3) if thick is None else (thick,), spacing=spacing),
        RandInPlaneZoomd(keys, scale, probability, thick),
        RandGaussianSmoothd("image", prob=probability, sigma_x=blur, sigma_y=blur, sigma_z=blur),
        RandScaleIntensityd("image", prob=probability, factors=factor),
        RandScaleIntensityFixedMeand("image", prob=probability, factors=factor, preserve_range=True),
        RandAdjustContrastd("image", prob=probability, gamma=exponents, retain_stats=True),
    ]
    if not 0 <= operations <= len(pool):
        raise BadInput(f"`operations` is {operations}; expected 0 to {len(pool)}")
    return Untracked([SomeOf(pool, num_transforms=operations), typed(keys)])


def _crop_and_resize(
    keys: Sequence[str], patch_size: Sequence[int], share: float, probability: float, thick_axis: int | None
) -> Callable:
    smallest = [side if axis == thick_axis else max(1, round(share * side)) for axis, side in enumerate(patch_size)]
    steps = [
        RandSpatialCropd(keys, roi_size=smallest, random_size=True, allow_missing_keys=True),
        Resized(
            keys,
            spatial_size=patch_size,
            mode=modes(keys, "bilinear" if len(patch_size) == 2 else "trilinear", "nearest-exact"),
            allow_missing_keys=True,
        ),
    ]
    nothing = Identityd(keys, allow_missing_keys=True)
    return OneOf([Compose(steps), nothing], weights=[probability, 1 - probability])
