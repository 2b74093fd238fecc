"""Random crops and views of a case.

The supervised recipe is nnU-Net v2's (Isensee et al. 2021, supplementary note 4; batchgeneratorsv2). Pairs of a weak
and a strong view follow FixMatch (Sohn et al. 2020), with the strong view in the weak one's geometry; cut-out is
DeVries & Taylor 2017.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor, get_track_meta, set_track_meta
from monai.transforms import (
    AffineGrid,
    ClassesToIndicesd,
    Compose,
    CopyItemsd,
    EnsureTyped,
    MapTransform,
    RandAdjustContrastd,
    RandAffined,
    RandAffineGrid,
    RandCoarseDropoutd,
    RandCropByLabelClassesd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandSimulateLowResolutiond,
    RandSpatialCropd,
    RandZoom,
    RandZoomd,
    SpatialPadd,
)

from ..data.units import LENGTHS
from ..errors import BadInput
from ..targets import is_dense

__all__ = ["crop", "crop_indices", "supervised_augmentation", "weak_and_strong"]

_INDICES_A_CLASS = 10_000  # as nnU-Net keeps; all of them would take eight bytes a voxel of each cached case
_NOT_MAPS = ("image", "strong", "label")


class _Untracked(Compose):
    """A ``Compose`` whose steps write no record of what they did, which takes them half of their time.

    Whether MONAI's transforms do is one switch for a whole process. It is only touched in the main thread: where a
    server trains in another one, others may be reading images, whose spacing must not be forgotten.
    """

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return super().__call__(*inputs, **options)
        tracked = get_track_meta()
        set_track_meta(False)
        try:
            return super().__call__(*inputs, **options)
        finally:
            set_track_meta(tracked)


def crop_indices(
    patch_size: Sequence[int],
    num_classes: int | None,
    keys: Sequence[str] = ("image", "label"),
    targets: Sequence[Mapping[str, Any]] = (),
) -> Compose:
    """The deterministic half of :func:`crop`, which a ``CacheDataset`` does once a case: pad, and find the classes.

    Args:
        patch_size: voxels a spatial axis; a smaller case is padded to it, with 0, a dense target with its ``missing``.
        num_classes: K; None for cases without labels.
        keys: what is padded.
        targets: descriptions of the regression targets; case-level ones are left alone.
    """
    maps, missing = _maps(keys, targets)
    steps: list[Callable] = [
        SpatialPadd(key, spatial_size=patch_size, mode="constant", value=missing.get(key, 0.0), allow_missing_keys=True)
        for key in maps
    ]
    if num_classes is not None:
        steps.append(ClassesToIndicesd("label", num_classes=num_classes, max_samples_per_class=_INDICES_A_CLASS))
    return Compose(steps)


def crop(
    patch_size: Sequence[int],
    num_classes: int | None,
    keys: Sequence[str] = ("image", "label"),
    foreground: float = 0.33,
    targets: Sequence[Mapping[str, Any]] = (),
) -> Compose:
    """A random patch of a case, smaller cases padded first.

    Args:
        patch_size: voxels a spatial axis.
        num_classes: K for labelled cases; None for cases without labels, cropped anywhere with equal probability.
        keys: what is cropped.
        foreground: share of the patches centred on a voxel of a structure, those that a case has equally often; the
            others are centred on background.
        targets: descriptions of the regression targets.

    Raises:
        BadInput: ``foreground`` is no share, or K is below 2.
    """
    maps, _ = _maps(keys, targets)
    prepare = crop_indices(patch_size, num_classes, keys, targets)
    if num_classes is None:
        cut: Callable = RandSpatialCropd(maps, roi_size=patch_size, random_size=False, allow_missing_keys=True)
    else:
        if not 0 <= foreground <= 1:
            raise BadInput(f"`foreground` is {foreground}; expected a share from 0 to 1")
        if num_classes < 2:
            raise BadInput(f"there are {num_classes} classes; expected background and at least one structure")
        cut = _CropByPresentClassesd(
            maps,
            foreground,
            label_key="label",
            indices_key="label_cls_indices",
            spatial_size=patch_size,
            num_classes=num_classes,
            num_samples=1,
            allow_missing_keys=True,
            warn=False,
        )
    return Compose([*prepare.transforms, _Untracked([cut, _CopyPatchd(maps, allow_missing_keys=True)])])


class _CropByPresentClassesd(RandCropByLabelClassesd):
    """MONAI's crop with a share of foreground that stays the same where a case lacks structures, or does not know them.

    MONAI's ratios are of all classes; those that a case lacks go to the others, background included.

    Args:
        keys: what is cropped.
        foreground: share of the patches centred on a structure.
        options: of MONAI's transform.
    """

    def __init__(self, keys: Sequence[str], foreground: float, **options: Any) -> None:
        super().__init__(keys, **options)
        self.foreground = foreground

    def randomize(self, label: Any, indices: Any = None, image: Any = None) -> None:
        present = sum(len(found) > 0 for found in indices[1:])
        shares = [1 - self.foreground] + [self.foreground / max(present, 1)] * (len(indices) - 1)
        # Never quite 0, or a case that has only the classes of ratio 0 could not be cropped.
        self.cropper.ratios = [max(share, 1e-9) for share in shares]
        super().randomize(label, indices, image)


class _CopyPatchd(MapTransform):
    """Gives a patch its own memory, so that a ``CacheDataset`` need not copy whole volumes (``copy_cache=False``)."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        patch = dict(data)
        for key in self.key_iterator(patch):
            value = patch[key]
            # Plain, because what is drawn at random is never inverted, and metadata slows each step that follows.
            plain = value.as_tensor() if isinstance(value, MetaTensor) else torch.as_tensor(value)
            patch[key] = plain.clone(memory_format=torch.contiguous_format)
        return patch


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
    maps, missing = _maps(keys, targets)
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
        steps.append(_affine(maps, rank, probability=0.2, rotation=rotation, axes=axes, spacing=spacing))
    if scale is not None:
        if lengths:
            raise BadInput(
                f"`scale` {list(scale)} magnifies the image but not the lengths in {lengths}; set it to null"
            )
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise BadInput(f"`scale` is {list(scale)}; expected the smallest and the largest magnification, or null")
        steps.append(_RandZoomd(maps, scale=scale, probability=0.2, thick_axis=thick))
    if intensity:
        steps += _intensity("image", rank, thick)
    steps += _mirroring(maps, rank, mirror_axes)
    steps.append(_typed(maps))
    return _Untracked(steps)


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
    maps, _ = _maps(keys, targets)
    rank = len(patch_size)
    thick = thick_axis % rank if thick_axis is not None and rank == 3 else None
    shift = [0.0 if axis == thick else translation * size for axis, size in enumerate(patch_size)]
    axes = range(3) if thick is None else (thick,)
    steps: list[Callable] = list(_mirroring(maps, rank, mirror_axes))
    if rotation or translation:
        steps.append(_affine(maps, rank, weak_probability, rotation, axes, shift, spacing))
    steps += [_typed(maps), CopyItemsd("image", names="strong")]
    steps += _intensity("strong", rank, thick, strong_probability)
    if cutout is not None:
        size = [max(1, round(cutout * side)) for side in patch_size]
        steps.append(
            RandCoarseDropoutd("strong", holes=holes, spatial_size=size, fill_value=0.0, prob=strong_probability)
        )
    steps.append(_typed(["strong"]))
    return _Untracked(steps)


def _maps(keys: Sequence[str], targets: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, float]]:
    """The keys that are maps, and of the dense targets among them the value that says "missing"."""
    described = {target["name"]: target for target in targets}
    maps = [key for key in keys if is_dense(described.get(key, {}))]
    return maps, {key: float(described[key].get("missing", 0)) for key in maps if key in described}


def _modes(maps: Sequence[str], smooth: str, nearest: str) -> list[str]:
    return [smooth if key == "image" else nearest for key in maps]


def _typed(maps: Sequence[str]) -> EnsureTyped:
    types = [torch.int64 if key == "label" else torch.float32 for key in maps]
    return EnsureTyped(maps, dtype=types, track_meta=False, allow_missing_keys=True)


class _AffineGridInPhysicalSpace(RandAffineGrid):
    """``RandAffineGrid`` whose matrix acts in physical space.

    Args:
        voxel: the voxel's sides, in any unit, which is that of ``translate_range``, too.
        ranges: as those of ``RandAffineGrid``.
    """

    def __init__(self, voxel: Sequence[float], **ranges: Any) -> None:
        super().__init__(**ranges)
        self.voxel = torch.tensor([*voxel, 1.0])

    def __call__(
        self,
        spatial_size: Sequence[int] | None = None,
        grid: NdarrayOrTensor | None = None,
        randomize: bool = True,
        lazy: bool | None = None,
    ) -> torch.Tensor:
        assert isinstance(grid, torch.Tensor)  # RandAffine gives it
        super().__call__(grid.shape[1:], randomize=randomize, lazy=True)
        assert self.affine is not None
        # S^-1 A S with the voxel's sides in the diagonal of S; formed so, equal sides change no bit of A.
        matrix = self.affine * (self.voxel[None] / self.voxel[:, None]).to(self.affine)
        moved, self.affine = AffineGrid(affine=matrix, device=self.device, dtype=self.dtype)(grid=grid)
        assert moved is not None
        return moved


def _affine(
    maps: Sequence[str],
    rank: int,
    probability: float,
    rotation: float,
    axes: Sequence[int],
    translation: Sequence[float] | None = None,
    spacing: Sequence[float] | None = None,
) -> RandAffined:
    """Rotation about some ``axes`` by degrees, and ``translation`` in voxels."""
    spacing = [1.0] * rank if spacing is None else [float(size) for size in spacing]
    if len(spacing) != rank or min(spacing) <= 0:
        raise BadInput(f"`spacing` is {spacing}; expected {rank} positive numbers of mm, as `patch_size` has axes")
    angle = math.radians(rotation)
    voxel = [size / min(spacing) for size in spacing]
    transform = RandAffined(
        maps,
        prob=probability,
        mode=_modes(maps, "bilinear", "nearest"),
        # The same for all keys: what comes in from outside the patch has the label of the voxel it was mirrored from.
        padding_mode="reflection",
        allow_missing_keys=True,
    )
    transform.rand_affine.rand_affine_grid = _AffineGridInPhysicalSpace(
        voxel,
        rotate_range=[angle] if rank == 2 else [angle if axis in axes else 0.0 for axis in range(3)],
        translate_range=None if translation is None else [t * side for t, side in zip(translation, voxel, strict=True)],
    )
    return transform


def _mirroring(maps: Sequence[str], rank: int, axes: Sequence[int] | None) -> list[Callable]:
    axes = range(rank) if axes is None else axes
    return [RandFlipd(maps, prob=0.5, spatial_axis=axis, allow_missing_keys=True) for axis in axes]


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


class _InPlaneZoom(RandZoom):
    """Magnifies all axes alike but for one."""

    thick_axis: int | None = None

    def randomize(self, img: Any) -> None:
        super().randomize(img)
        if self._do_transform and self.thick_axis is not None:
            self._zoom = [1.0 if axis == self.thick_axis else zoom for axis, zoom in enumerate(self._zoom)]


class _RandZoomd(RandZoomd):
    """``RandZoomd`` with a magnification that leaves the thick axis alone."""

    def __init__(self, maps: Sequence[str], scale: Sequence[float], probability: float, thick_axis: int | None) -> None:
        super().__init__(
            maps,
            prob=probability,
            min_zoom=scale[0],
            max_zoom=scale[1],
            mode=_modes(maps, "bilinear", "nearest-exact"),
            padding_mode="reflect",
            align_corners=[False if key == "image" else None for key in maps],
            allow_missing_keys=True,
        )
        self.rand_zoom = _InPlaneZoom(prob=1.0, min_zoom=scale[0], max_zoom=scale[1], keep_size=True)
        self.rand_zoom.thick_axis = thick_axis


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
