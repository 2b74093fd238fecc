"""Random views of a patch.

The supervised recipe is nnU-Net v2's (Isensee et al. 2021, supplementary note 4; batchgeneratorsv2). Pairs of a weak
and a strong view follow FixMatch (Sohn et al. 2020), with the strong view in the weak one's geometry; cut-out is
DeVries & Taylor 2017.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from monai.transforms import (
    Compose,
    CopyItemsd,
    RandAdjustContrastd,
    RandCoarseDropoutd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandSimulateLowResolutiond,
)

from ..data.units import LENGTHS
from ..errors import BadInput
from .geometry import RandInPlaneZoomd, Untracked, dense_maps, mirroring, random_affine, typed

__all__ = ["supervised_augmentation", "weak_and_strong"]


def supervised_augmentation(
    patch_size: Sequence[int],
    keys: Sequence[str] = ("image", "label"),
    targets: Sequence[Mapping[str, Any]] = (),
    spacing: Sequence[float] | None = None,
    thick_axis: int | None = None,
    scale: Sequence[float] | None = (0.7, 1.4),
    rotation: float | None = None,
    rotation_axes: Sequence[int] | None = None,
    mirror_axes: Sequence[int] | None = None,
    intensity: bool = True,
) -> Compose:
    """nnU-Net v2's augmentation of patches of ``patch_size``, but for rotations, which are in mm rather than in voxels.

    Args:
        patch_size: voxels a spatial axis.
        keys: ``image``, ``label`` and dense targets move together; only ``image`` changes its intensities.
        targets: descriptions of the regression targets.
        spacing: voxel size in mm, one number a spatial axis, so that what is rotated keeps its shape and its lengths;
            None takes voxels for cubes.
        thick_axis: the axis along which voxels are much thicker, if any: no rotation out of its plane, nor scaling or
            low-resolution simulation along it.
        scale: smallest and largest magnification, probability 0.2; None for none, as targets in mm need, since a
            magnified wall would be thicker than its map says.
        rotation: largest angle in degrees, probability 0.2; by default 30, and 180 in 2D and with a ``thick_axis``.
            0 for none.
        rotation_axes: the axes to rotate about in 3D; by default all three, or only a ``thick_axis``, or for lengths
            that are measured slice by slice only that of the largest ``spacing``.
        mirror_axes: the axes to mirror, each with probability 0.5; by default all. Leave out left-right (0 in RAS)
            where sides are told apart.
        intensity: whether to change intensities.

    Returns:
        A transform of a patch; labels come out as int64, maps and images as float32.

    Raises:
        BadInput: along with a dense target that is a length ``scale`` is given, or ``rotation`` without ``spacing``;
            or one of these makes no sense.
    """
    maps, missing = dense_maps(keys, targets)
    of_length = [t for t in targets if t["name"] in missing and t.get("unit", "") in LENGTHS]
    lengths = [target["name"] for target in of_length]
    rank = len(patch_size)
    thick = thick_axis % rank if thick_axis is not None and rank == 3 else None
    if rotation is None:
        rotation = 30.0 if rank == 3 and thick is None else 180.0
    steps: list[Callable] = []
    if rotation:
        if lengths and spacing is None:
            raise BadInput(
                f"`spacing` is null, so rotations would change the lengths in {lengths} wherever voxels are no cubes; "
                "give the voxel size, or set `rotation` to 0"
            )
        if rotation_axes is not None:
            axes = rotation_axes
        elif thick is not None:
            axes = (thick,)
        elif rank == 3 and spacing is not None and any(target.get("slicewise") for target in of_length):
            # What is measured in slices would change out of their plane; of equal spacings none tells which it is.
            axes = [axis for axis in range(3) if spacing[axis] > max(spacing[axis - 1], spacing[axis - 2])]
        else:
            axes = range(3)
        steps.append(random_affine(maps, rank, probability=0.2, rotation=rotation, axes=axes, spacing=spacing))
    if scale is not None:
        if lengths:
            raise BadInput(
                f"`scale` {list(scale)} magnifies the image but not the lengths in {lengths}; set it to null"
            )
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise BadInput(f"`scale` is {list(scale)}; expected the smallest and the largest magnification, or null")
        steps.append(RandInPlaneZoomd(maps, scale=scale, probability=0.2, thick_axis=thick))
    if intensity:
        steps += _intensity("image", rank, thick)
    steps += mirroring(maps, rank, mirror_axes)
    steps.append(typed(maps))
    return Untracked(steps)


def weak_and_strong(
    patch_size: Sequence[int],
    keys: Sequence[str] = ("image",),
    spacing: Sequence[float] | None = None,
    rotation: float = 10.0,
    translation: float = 0.05,
    thick_axis: int | None = None,
    mirror_axes: Sequence[int] | None = None,
    weak_probability: float = 0.5,
    strong_probability: float = 0.5,
    cutout: float | None = 0.25,
    holes: int = 3,
    targets: Sequence[Mapping[str, Any]] = (),
) -> Compose:
    """Two views of a patch whose voxels correspond: ``image``, moved a little, and ``strong``, a disturbed copy of it.

    Args:
        patch_size: voxels a spatial axis.
        keys: what moves with ``image``: labels and dense targets where there are any.
        spacing: voxel size in mm, one number a spatial axis; None takes voxels for cubes.
        rotation: largest angle of the weak view in degrees.
        translation: largest shift of the weak view, as a share of the patch.
        thick_axis: the axis along which voxels are much thicker, if any: it is not rotated out of its plane, nor
            shifted along it.
        mirror_axes: the axes to mirror, each with probability 0.5; by default all.
        weak_probability: of the weak view's rotation and shift.
        strong_probability: of each disturbance of the strong view: noise, blur, brightness, contrast, low resolution,
            gamma and cut-out. At 0 the two views are the same.
        cutout: side of the boxes that are cut out, as a share of the patch's; None for none. Filled with the mean, 0.
        holes: number of boxes.
        targets: descriptions of the regression targets among ``keys``.

    Returns:
        A transform of a patch that adds ``strong``, float32, of the image's shape.
    """
    maps, _ = dense_maps(keys, targets)
    rank = len(patch_size)
    thick = thick_axis % rank if thick_axis is not None and rank == 3 else None
    shift = [0.0 if axis == thick else translation * size for axis, size in enumerate(patch_size)]
    axes = range(3) if thick is None else (thick,)
    steps: list[Callable] = list(mirroring(maps, rank, mirror_axes))
    if rotation or translation:
        steps.append(random_affine(maps, rank, weak_probability, rotation, axes, shift, spacing))
    steps += [typed(maps), CopyItemsd("image", names="strong")]
    steps += _intensity("strong", rank, thick, strong_probability)
    if cutout is not None:
        size = [max(1, round(cutout * side)) for side in patch_size]
        steps.append(
            RandCoarseDropoutd("strong", holes=holes, spatial_size=size, fill_value=0.0, prob=strong_probability)
        )
    steps.append(typed(["strong"]))
    return Untracked(steps)


def _intensity(key: str, rank: int, thick: int | None, probability: float | None = None) -> list[Callable]:
    """nnU-Net v2's intensity transforms; with one ``probability`` for each, and stronger, for a strong view."""
    strong = probability is not None

    def chance(value: float) -> float:
        return value if probability is None else probability

    sigma = (0.5, 1.5 if strong else 1.0)
    factor = 0.4 if strong else 0.25
    gamma = (0.6, 1.6) if strong else (0.7, 1.5)
    common: dict[str, Any] = {"allow_missing_keys": True}
    steps: list[Callable] = [
        RandGaussianNoised(key, prob=chance(0.1), std=0.2 if strong else 0.1, **common),
        RandGaussianSmoothd(key, prob=chance(0.2), sigma_x=sigma, sigma_y=sigma, sigma_z=sigma, **common),
        RandScaleIntensityd(key, prob=chance(0.15), factors=factor, **common),
        RandScaleIntensityFixedMeand(key, prob=chance(0.15), factors=factor, preserve_range=True, **common),
        _RandLowResolutiond(key, probability=chance(0.25), rank=rank, thick_axis=thick),
    ]
    if not strong:
        steps.append(RandAdjustContrastd(key, prob=0.1, gamma=gamma, invert_image=True, retain_stats=True, **common))
    steps.append(RandAdjustContrastd(key, prob=chance(0.3), gamma=gamma, retain_stats=True, **common))
    return steps


class _RandLowResolutiond(RandSimulateLowResolutiond):
    """``RandSimulateLowResolutiond`` for 2D and 3D that leaves the thick axis alone."""

    def __init__(self, key: str, probability: float, rank: int, thick_axis: int | None) -> None:
        flat = rank == 2 or thick_axis is not None
        super().__init__(
            key,
            prob=probability,
            downsample_mode="nearest-exact",
            upsample_mode="bilinear" if flat else "trilinear",
            zoom_range=(0.5, 1.0),
            allow_missing_keys=True,
        )
        self.thick_axis = thick_axis

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        if self.thick_axis is None:
            return super().__call__(data)
        # Slices become channels, and each is resampled as a 2D image.
        folded, shapes = dict(data), {}
        for key in self.key_iterator(folded):
            moved = folded[key].movedim(self.thick_axis + 1, 1)
            shapes[key] = moved.shape
            folded[key] = moved.flatten(0, 1)
        folded.update(super().__call__(folded))
        for key, shape in shapes.items():
            folded[key] = folded[key].unflatten(0, shape[:2]).movedim(1, self.thick_axis + 1)
        return folded
