"""Random patches of a case, and what of that is found once a case."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import (
    ClassesToIndicesd,
    Compose,
    MapTransform,
    RandCropByLabelClassesd,
    RandSpatialCropd,
    SpatialPadd,
)

from ..errors import BadInput
from .geometry import Untracked, dense_maps

__all__ = ["crop", "crop_indices"]

_INDICES_A_CLASS = 10_000  # as nnU-Net keeps; all of them would take eight bytes a voxel of each cached case


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
    maps, missing = dense_maps(keys, targets)
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
    maps, _ = dense_maps(keys, targets)
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
    return Compose([*prepare.transforms, Untracked([cut, _CopyPatchd(maps, allow_missing_keys=True)])])


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
