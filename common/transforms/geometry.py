"""What moves the maps of a patch together, without a record of it: rotation, shift, magnification and mirroring."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from monai.config import NdarrayOrTensor
from monai.data import get_track_meta, set_track_meta
from monai.transforms import (
    AffineGrid,
    Compose,
    EnsureTyped,
    RandAffined,
    RandAffineGrid,
    RandFlipd,
    RandZoom,
    RandZoomd,
)

from ..errors import BadInput
from ..targets import is_dense

__all__ = ["RandInPlaneZoomd", "Untracked", "dense_maps", "mirroring", "modes", "random_affine", "typed"]


class Untracked(Compose):
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


def dense_maps(keys: Sequence[str], targets: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, float]]:
    """The keys that are maps, and of the dense targets among them the value that says "missing"."""
    described = {target["name"]: target for target in targets}
    maps = [key for key in keys if is_dense(described.get(key, {}))]
    return maps, {key: float(described[key].get("missing", 0)) for key in maps if key in described}


def modes(maps: Sequence[str], smooth: str, nearest: str) -> list[str]:
    return [smooth if key == "image" else nearest for key in maps]


def typed(maps: Sequence[str]) -> EnsureTyped:
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


def random_affine(
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
        mode=modes(maps, "bilinear", "nearest"),
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


class _InPlaneZoom(RandZoom):
    """Magnifies all axes alike but for one."""

    thick_axis: int | None = None

    def randomize(self, img: Any) -> None:
        super().randomize(img)
        if self._do_transform and self.thick_axis is not None:
            self._zoom = [1.0 if axis == self.thick_axis else zoom for axis, zoom in enumerate(self._zoom)]


class RandInPlaneZoomd(RandZoomd):
    """``RandZoomd`` with a magnification that leaves the thick axis alone."""

    def __init__(self, maps: Sequence[str], scale: Sequence[float], probability: float, thick_axis: int | None) -> None:
        super().__init__(
            maps,
            prob=probability,
            min_zoom=scale[0],
            max_zoom=scale[1],
            mode=modes(maps, "bilinear", "nearest-exact"),
            padding_mode="reflect",
            align_corners=[False if key == "image" else None for key in maps],
            allow_missing_keys=True,
        )
        self.rand_zoom = _InPlaneZoom(prob=1.0, min_zoom=scale[0], max_zoom=scale[1], keep_size=True)
        self.rand_zoom.thick_axis = thick_axis


def mirroring(maps: Sequence[str], rank: int, axes: Sequence[int] | None) -> list[Callable]:
    axes = range(rank) if axes is None else axes
    return [RandFlipd(maps, prob=0.5, spatial_axis=axis, allow_missing_keys=True) for axis in axes]
