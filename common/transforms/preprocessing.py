"""From a case's files to the grid and intensities a network takes, and back through ``monai.transforms.Invertd``."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import AFFINE_TOL
from monai.transforms import (
    Compose,
    EnsureTyped,
    MapTransform,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityRanged,
    SpatialResample,
)
from monai.transforms import Spacingd as MonaiSpacingd
from monai.utils import TraceKeys, get_torch_dtype_from_string

from ..errors import BadInput
from ..switches import is_on
from ..targets import dense_names, is_dense
from .familiarity import MeasureImaged
from .loading import LoadCased

__all__ = ["Spacingd", "air", "chain", "preprocessing"]

AXES = ("RL", "AP", "SI")
VOXELS_RESAMPLED_AT_ONCE = 128**3
#: HU that blocks of air with its noise stay below
AIR = -900.0


class Spacingd(MonaiSpacingd):
    """MONAI's ``Spacingd`` for entries that hold plain values under ``image_*``, as those of MONAI Label do.

    The original takes every such entry for a dictionary of metadata and updates it, which fails on a path.

    Raises:
        BadInput: when called, if the voxels are more than ``MOST_GROWTH`` times as large as wanted. Nothing of use
            could be seen in them; they come of a wrong header, and resampling would take hours or all memory.
    """

    MOST_GROWTH = 1000

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """Resample ``data`` to the wanted spacing."""
        for key in self.key_iterator(data):
            self._check_growth(key, data[key])
        prefixes = tuple(f"{key}_" for key in self.keys)
        hidden: dict[Hashable, Any] = {
            key: value
            for key, value in data.items()
            if isinstance(key, str)
            and key.startswith(prefixes)
            and key not in self.keys
            and not isinstance(value, dict)
        }
        shown = {key: value for key, value in data.items() if key not in hidden}
        return {**super().__call__(shown, lazy=lazy), **hidden}

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resample ``data`` to the spacing it had."""
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = _resample_back(self.spacing_transform.sp_resample, d[key])
        return d

    def _check_growth(self, key: Hashable, image: torch.Tensor) -> None:
        if not isinstance(image, MetaTensor):
            return
        sides = image.pixdim.tolist()
        sizes = [(float(side), float(size)) for side, size in zip(sides, self.spacing_transform.pixdim, strict=False)]
        if math.prod(side / size for side, size in sizes) > self.MOST_GROWTH:
            found, wanted = (" x ".join(f"{side:.4g}" for side in axes) for axes in zip(*sizes, strict=True))
            raise BadInput(
                f"{key} {image.meta.get('filename_or_obj', '')}: its voxels are {found} mm large, the network's "
                f"{wanted} mm; correct the voxel size in the file's header, or choose a network for such images"
            )


class NormalizeChannelsd(MapTransform):
    """Normalise each channel of ``image`` in a way of its own, as a CT and a PET of one patient ask for.

    Args:
        intensities: one a channel, as :func:`preprocessing` takes them.
    """

    def __init__(self, intensities: Sequence[Mapping[str, Any]]) -> None:
        super().__init__("image", allow_missing_keys=True)
        self.channels = [_normalization(intensity) for intensity in intensities]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` with a normalised ``image`` (C, *spatial)."""
        done = dict(data)
        for key in self.key_iterator(done):
            image = done[key].clone()
            for index, normalize in enumerate(self.channels):
                image[index : index + 1] = normalize({key: done[key][index : index + 1]})[key]
            done[key] = image
        return done


def chain(*transforms: Callable | None) -> Compose:
    """One flat ``Compose`` of several, None left out.

    ``CacheDataset`` takes a nested ``Compose`` for a random transform and would cache nothing of it.
    """
    return Compose([transform for transform in transforms if transform is not None]).flatten()


def preprocessing(
    keys: Sequence[str] = ("image",),
    labels: Mapping[str, str] | None = None,
    channels: int | None = None,
    targets: Sequence[Mapping[str, Any]] = (),
    spacing: Sequence[float] | None = None,
    intensity: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    orientation: str = "RAS",
    measure: bool = False,
) -> Compose:
    """Load, bring to one orientation and spacing, normalise intensities.

    Every step is deterministic, and those that move voxels can be undone by ``Invertd``. Labels and dense targets are
    resampled by the nearest voxel, so that missing voxels keep the target's ``missing`` value.

    Args:
        keys: what to load; ``("image",)`` for inference. An entry may lack any but ``image``.
        labels: label ids and names.
        channels: channels that the image must have.
        targets: descriptions of the regression targets.
        spacing: voxel size in mm, one number a spatial axis; None keeps the file's own.
        intensity: ``{"kind": "zscore"}`` for mean 0 and standard deviation 1 a volume and channel (the default), with
            ``"nonzero": true`` of the voxels that aren't 0, which alone are changed, or ``{"kind": "ct", "lower": ...,
            "upper": ..., "mean": ..., "std": ...}`` for clipping, then the data set's mean and standard deviation, in
            the file's unit. A list has one a channel.
        orientation: the patient's directions that the axes x, y, z are made to run to: R or L, then A or P, then S or
            I. In 2D the first two count.
        measure: note what the image is like, for :class:`.familiarity.CaseWarningsd`.

    Returns:
        A transform of an entry to ``image`` (C, *spatial) float32, ``label`` (1, *spatial) integer, dense targets
        (1, *spatial) float32, case-level targets float32 scalars.

    Raises:
        BadInput: ``intensity``, ``spacing`` or ``orientation`` makes no sense.
    """
    if len(orientation) > 3 or any(letter not in pair for letter, pair in zip(orientation, AXES, strict=False)):
        raise BadInput(
            f"`orientation` is {orientation!r}; expected one letter an axis, R or L, A or P, S or I, such as RAS"
        )
    case_level = {target["name"] for target in targets} - set(dense_names(targets))
    maps = [key for key in keys if key not in case_level]
    small = labels is None or max((int(key) for key in labels), default=0) <= np.iinfo(np.uint8).max
    types = [(torch.uint8 if small else torch.int16) if key == "label" else torch.float32 for key in maps]
    steps: list[Callable] = [
        LoadCased(keys, labels, channels, targets, dimensions=len(spacing) if spacing is not None else None),
        *([MeasureImaged()] if measure else []),
        Orientationd(maps, axcodes=orientation[: len(spacing or orientation)], labels=None, allow_missing_keys=True),
    ]
    if spacing is not None:
        if not all(isinstance(size, (int, float)) and size > 0 for size in spacing):
            raise BadInput(
                f"`spacing` is {list(spacing)}; expected a positive number of mm an axis, or null to keep it"
            )
        modes = ["bilinear" if key == "image" else "nearest" for key in maps]
        steps.append(Spacingd(maps, pixdim=spacing, mode=modes, dtype=np.float32, allow_missing_keys=True))
    if isinstance(intensity, Sequence):
        if len(intensity) != (channels or len(intensity)):
            raise BadInput(f"`intensity` describes {len(intensity)} channels; the network takes {channels}")
        steps.append(NormalizeChannelsd(intensity))
    else:
        steps.append(_normalization(intensity or {"kind": "zscore"}))
    steps.append(EnsureTyped(maps, dtype=types, track_meta=True, allow_missing_keys=True))
    return Compose(steps)


def _resample_back(resample: SpatialResample, image: MetaTensor) -> torch.Tensor:
    """What ``resample.inverse`` gives, in slabs: the sampling grid takes seven times the memory of what it samples."""
    operation = image.applied_operations[-1]
    settings = dict(operation[TraceKeys.EXTRA_INFO])
    affine = torch.as_tensor(settings.pop("src_affine"), dtype=torch.float64)
    size = [int(length) for length in operation[TraceKeys.ORIG_SIZE]]
    thickness = max(1, VOXELS_RESAMPLED_AT_ONCE // math.prod(size[1:]))
    unchanged = list(image.shape[1:]) == size and torch.allclose(image.affine, affine, atol=AFFINE_TOL)
    if thickness >= size[0] or unchanged or settings["align_corners"] is not False:
        return resample.inverse(image)
    resample.pop_transform(image)
    settings["dtype"] = get_torch_dtype_from_string(settings["dtype"])
    restored = torch.empty(len(image), *size)
    with resample.trace_transform(False):
        for start in range(0, size[0], thickness):
            slab = restored[:, start : start + thickness]
            shift = torch.eye(len(affine), dtype=torch.float64)
            shift[0, -1] = start
            slab.copy_(resample(image, affine @ shift, slab.shape[1:], **settings))
    return MetaTensor(restored, affine, dict(image.meta), image.applied_operations)


def air(
    intensity: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None, targets: Sequence[Mapping[str, Any]] = ()
) -> float | None:
    """The value after normalisation up to which a voxel of a CT is air outside the body, for :class:`.SlidingWindow`.

    That is -900 HU. Lungs are darker in places, but lie inside what is not.

    Args:
        intensity: as :func:`preprocessing` takes it.
        targets: descriptions of the regression targets.

    Returns:
        None where no such value is known: for all but CT of one channel whose values below it are kept. Nor where there
        is a target of one number a case, to which every voxel contributes, those of air included.
    """
    if isinstance(intensity, Sequence) and len(intensity) == 1:
        intensity = intensity[0]
    if not isinstance(intensity, Mapping) or intensity.get("kind") != "ct" or float(intensity["lower"]) >= AIR:
        return None
    if not all(is_dense(target) for target in targets):
        return None
    return (AIR - float(intensity["mean"])) / float(intensity["std"])


def _normalization(intensity: Mapping[str, Any]) -> Callable:
    kind = intensity.get("kind")
    if kind == "zscore":
        nonzero = is_on(intensity.get("nonzero", False), "intensity, nonzero")
        return NormalizeIntensityd("image", nonzero=nonzero, channel_wise=True, allow_missing_keys=True)
    if kind != "ct":
        raise BadInput(f'`intensity` has the kind {kind!r}; expected "zscore" or "ct"')
    lacking = [name for name in ("lower", "upper", "mean", "std") if not isinstance(intensity.get(name), (int, float))]
    if lacking:
        raise BadInput(
            f'`intensity` of kind "ct" needs the numbers lower, upper, mean and std; {lacking} are not given'
        )
    lower, upper, mean, std = (float(intensity[name]) for name in ("lower", "upper", "mean", "std"))
    if lower >= upper or std <= 0:
        raise BadInput(f"`intensity`: lower {lower:g} must be below upper {upper:g}, and std {std:g} above 0")
    return ScaleIntensityRanged(
        "image",
        a_min=lower,
        a_max=upper,
        b_min=(lower - mean) / std,
        b_max=(upper - mean) / std,
        clip=True,
        allow_missing_keys=True,
    )
