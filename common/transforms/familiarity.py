"""What must be seen beside a result: that the volume is unlike the training's, that something is missing or cut off.

The volume is compared with ranges over the training cases, which a plan carries as ``familiar``, and the network's
certainty with that on the validation cases, which the weights' record carries. What isn't known isn't checked.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Hashable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor

from ..data.datalist import case_name
from ..errors import BadInput
from ..networks import read_record

__all__ = ["CaseWarningsd", "MeasureImaged", "familiar_ranges", "measure_image"]

logger = logging.getLogger(__name__)

GRID_FACTOR = 1.5  # beyond the smallest and largest voxel and field of view of the training
CT_SHARE = 0.25  # of the width of the training's intensities, where these have a fixed unit
MIDDLE_MARGIN = 0.15  # of the way between the outer percentiles, beyond where the training's medians lie
DEVIATIONS = 3.0  # of the validation cases' entropies above their mean
FEWEST_CASES = 5  # by which a mean and a standard deviation are known
PERCENTILES = (1, 50, 99)
SAMPLES = 200_000
AXES = ("left-right", "front-back", "head-foot")
SIDES = {"R": "right", "L": "left", "A": "front", "P": "back", "S": "head", "I": "foot"}
MEASURES = ("spacing", "extent", "intensity")


def measure_image(image: MetaTensor) -> dict[str, torch.Tensor]:
    """What an image (C, *spatial) is like, before anything is done to it.

    Returns:
        ``spacing``, mm, and ``extent``, mm, one number an axis, left-right first; ``intensity`` (C, 3), the 1st, 50th
        and 99th percentile of each channel's voxels that aren't 0, of a sample of them where there are many.
    """
    rank = image.ndim - 1
    affine = to_affine_nd(rank, image.affine.cpu().numpy())
    order = np.argsort(nib.orientations.io_orientation(affine)[:, 0], kind="stable")
    spacing = np.linalg.norm(affine[:rank, :rank], axis=0)[order]
    voxels = image.as_tensor()
    if voxels[0].numel() > SAMPLES:
        # Not every n-th voxel, which might all lie in one column.
        rng = np.random.default_rng(0)
        places: list[slice | torch.Tensor] = [slice(None)]
        places += [torch.from_numpy(rng.integers(n, size=SAMPLES)) for n in voxels.shape[1:]]
        voxels = voxels[tuple(places)]
    ranges = []
    for channel in voxels.reshape(len(voxels), -1).cpu().numpy():
        nonzero = channel[channel != 0]
        ranges.append(np.percentile(nonzero if nonzero.size else channel, PERCENTILES))
    measured = (spacing, spacing * np.asarray(image.shape[1:])[order], np.stack(ranges))
    return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in zip(MEASURES, measured, strict=True)}


def familiar_ranges(measured: list[dict[str, torch.Tensor]], ct: list[bool]) -> dict[str, Any]:
    """The lowest and highest of each measure over the training cases, for a plan.

    Args:
        measured: what :func:`measure_image` says of each case.
        ct: of each channel, whether it is CT.

    Returns:
        ``cases``, their number; ``spacing`` and ``extent``, a pair an axis; ``intensity``, of each channel its ``kind``
        and pairs ``low`` and ``high`` (the outer percentiles) and ``middle`` (see :func:`_middle`).
    """

    def pair(values: np.ndarray) -> list[float]:
        return [float(f"{edge:.4g}") for edge in (values.min(), values.max())]

    spacing, extent, intensity = (np.stack([case[name].numpy() for case in measured]) for name in MEASURES)
    return {
        "cases": len(measured),
        "spacing": [pair(axis) for axis in spacing.T],
        "extent": [pair(axis) for axis in extent.T],
        "intensity": [
            {
                "kind": "ct" if fixed else "zscore",
                "low": pair(low),
                "high": pair(high),
                "middle": pair(np.array([*map(_middle, low, median, high)])),
            }
            for fixed, (low, median, high) in zip(ct, intensity.transpose(1, 2, 0), strict=True)
        ],
    }


def _middle(low: float, median: float, high: float) -> float:
    """How far from ``low`` to ``high`` the median lies, 0 to 1: what scale and offset of a scanner don't change."""
    return (median - low) / (high - low) if high > low else 0.5


class MeasureImaged(MapTransform):
    """Note in the meta data of ``image`` what :func:`measure_image` says of it, before later steps change it."""

    def __init__(self) -> None:
        super().__init__("image")

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        d["image"].meta.update({f"measured_{name}": value for name, value in measure_image(d["image"]).items()})
        return d


@lru_cache(maxsize=8)
def _read_entropy(source: Path, _changed: tuple[int, ...]) -> tuple[float, float, int] | None:
    if source.suffix != ".json":
        record = read_record(source)
    else:
        try:
            record = json.loads(source.read_text())
        except (OSError, ValueError) as error:
            raise BadInput(
                f"entropy_from {source}: can't be read ({error}); name an evaluation's summary.json."
            ) from error
    entropy = record.get("entropy") if isinstance(record, Mapping) else None
    if not isinstance(entropy, Mapping):
        return None
    figures = [entropy.get(key) for key in ("mean", "sd", "n")]
    mean, deviation, count = (value if isinstance(value, (int, float)) else math.nan for value in figures)
    return (mean, deviation, int(count)) if math.isfinite(mean + deviation) and count >= FEWEST_CASES else None


def expected_entropy(source: str | Path) -> tuple[float, float, int] | None:
    """Mean, standard deviation and number of the validation cases' entropies; None where they aren't known.

    Args:
        source: weights, whose record says it, or the ``summary.json`` of an evaluation of them.

    Raises:
        BadInput: a summary can't be read.
    """
    source = Path(source)
    files = [path for path in {source, source.with_suffix(".json")} if path.exists()]
    # MONAI Label trains new weights while it serves.
    return _read_entropy(source, tuple(sorted(path.stat().st_mtime_ns for path in files))) if source in files else None


def _listed(values: torch.Tensor, ranges: list[list[float]], factor: float) -> Iterator[str]:
    """Those values that lie beyond their range by a factor, in words."""
    for axis, value, (low, high) in zip(AXES, values.tolist(), ranges, strict=False):
        if not low / factor <= value <= high * factor:
            known = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
            yield f"{value:.3g} mm {axis} ({known})"


class CaseWarningsd(MapTransform):
    """Add ``warnings`` to a case's ``result``, and say them in the log: a list of ``{"kind": ..., "text": ...}``.

    Beside it ``not_compared`` lists the kinds that can't be warned of, since nothing is known to compare with.

    The kinds, of which the first two name their ``structure`` where it is one:

    - ``nothing_found``: a structure has no voxel, or none has any;
    - ``border``: a structure has voxels in the volume's outermost layer, along any axis of more than one voxel;
    - ``spacing``, ``field_of_view``: beyond the training cases' smallest or largest by a factor of 1.5, on any axis;
    - ``intensity``: of CT, one of the outer percentiles is beyond the training's range of it by a quarter of the width
      of all; of others, whose scale and offset mean nothing, the median lies elsewhere between the two than in the
      training, by 0.15 of the way;
    - ``entropy``: of the voxels that aren't predicted background, the mean is above that of the validation cases by
      three of their standard deviations; with five cases at least.

    Args:
        labels: label id (as a string) to name.
        familiar: see :func:`familiar_ranges`; None checks nothing against the training cases.
        entropy_from: see :func:`expected_entropy`; None checks no entropy.
        segmentation_key: the predicted label map (1, *spatial) on the input's grid; absent for a network that only
            regresses.
        result_key: where the result is.
    """

    def __init__(
        self,
        labels: Mapping[str, str],
        familiar: Mapping[str, Any] | None = None,
        entropy_from: str | Path | None = None,
        segmentation_key: str = "segmentation",
        result_key: str = "result",
    ) -> None:
        super().__init__(segmentation_key, allow_missing_keys=True)
        self.names = {int(label): name for label, name in labels.items() if int(label) != 0}
        self.familiar = dict(familiar or {})
        self.entropy_from = entropy_from
        self.segmentation_key = segmentation_key
        self.result_key = result_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        meta = d["image"].meta
        found: list[dict[str, str]] = []
        if self.segmentation_key in d:
            found += self._of_segmentation(d[self.segmentation_key])
        measured = "measured_spacing" in meta
        if measured:
            found += self._of_image(*(meta[f"measured_{name}"] for name in MEASURES))
        expected = None if self.entropy_from is None else expected_entropy(self.entropy_from)
        comparable = expected is not None and d.get("entropy") is not None
        if expected is not None and comparable:
            found += self._of_entropy(d["entropy"], *expected)
        for warning in found:
            logger.warning("%s: %s", case_name(meta), warning["text"])
        # No warning of these kinds means nothing.
        known = {"spacing": "spacing", "field_of_view": "extent", "intensity": "intensity"}
        unknown = [kind for kind, key in known.items() if not (measured and self.familiar.get(key))]
        unknown += [] if comparable else ["entropy"]
        d[self.result_key] = {**d.get(self.result_key, {}), "warnings": found, "not_compared": unknown}
        return d

    def _of_segmentation(self, segmentation: torch.Tensor) -> Iterator[dict[str, str]]:
        labels: torch.Tensor = convert_to_tensor(segmentation[0], track_meta=False)
        present = [label for label in self.names if bool((labels == label).any())]
        if not present:
            yield {"kind": "nothing_found", "text": "nothing was found: every voxel is background"}
            return
        for label in self.names.keys() - set(present):
            name = self.names[label]
            yield {"kind": "nothing_found", "structure": name, "text": f"{name} was not found: it has no voxel"}
        sides: dict[int, list[str]] = {}
        for axis, size in enumerate(labels.shape):
            for end, side in zip((0, size - 1), _sides(segmentation, axis), strict=True):
                layer = labels.select(axis, end)
                for label in present if size > 1 else ():
                    if bool((layer == label).any()):
                        sides.setdefault(label, []).append(side)
        for label, touched in sides.items():
            name = self.names[label]
            text = f"{name} touches the border of the volume ({', '.join(touched)}): if it goes on beyond, its numbers"
            yield {"kind": "border", "structure": name, "text": f"{text} are of a part"}

    def _of_image(
        self, spacing: torch.Tensor, extent: torch.Tensor, intensity: torch.Tensor
    ) -> Iterator[dict[str, str]]:
        cases = f"in brackets those of the {self.familiar.get('cases', '')} training cases"
        if found := list(_listed(spacing, self.familiar.get("spacing", []), GRID_FACTOR)):
            yield {"kind": "spacing", "text": f"unfamiliar voxel size: {', '.join(found)}; {cases}"}
        if found := list(_listed(extent, self.familiar.get("extent", []), GRID_FACTOR)):
            yield {"kind": "field_of_view", "text": f"unfamiliar field of view: {', '.join(found)}; {cases}"}
        channels = self.familiar.get("intensity", [])
        for index, (known, (low, median, high)) in enumerate(zip(channels, intensity.tolist(), strict=False)):
            edges = [*known["low"], *known["high"]]
            if known["kind"] == "ct":
                margin = CT_SHARE * (edges[3] - edges[0])
                unlike = not (
                    edges[0] - margin <= low <= edges[1] + margin and edges[2] - margin <= high <= edges[3] + margin
                )
                text = f"{low:.4g} to {high:.4g} (1st and 99th percentile), the training"
                ranges = "cases' begin at {:.4g} to {:.4g} and end at {:.4g} to {:.4g}".format(*edges)
            else:
                middle, (least, most) = _middle(low, median, high), known["middle"]
                unlike = not least - MIDDLE_MARGIN <= middle <= most + MIDDLE_MARGIN
                text = f"the median lies at {middle:.2f} of the way from the 1st to the 99th percentile, the training"
                ranges = f"cases' at {least:.2f} to {most:.2f}"
            if unlike:
                channel = f" of channel {index}" if len(channels) > 1 else ""
                text = f"unfamiliar intensities{channel}: {text}"
                yield {"kind": "intensity", "text": f"{text} {ranges}"}

    def _of_entropy(self, entropy: float, mean: float, deviation: float, count: int) -> Iterator[dict[str, str]]:
        if not entropy > mean + DEVIATIONS * deviation:
            return
        text = f"the network is unusually uncertain: mean entropy {entropy:.3f} nats where it finds structures, on the"
        known = f"{count} validation cases {mean:.3f} (standard deviation {deviation:.3f})"
        yield {"kind": "entropy", "text": f"{text} {known}"}


def _sides(segmentation: torch.Tensor, axis: int) -> tuple[str, str]:
    """Which of the patient's sides an axis begins and ends at."""
    if not isinstance(segmentation, MetaTensor):
        return f"begin of axis {axis}", f"end of axis {axis}"
    rank = segmentation.ndim - 1
    end = nib.aff2axcodes(to_affine_nd(rank, segmentation.affine.cpu().numpy()))[axis]
    pair = next(pair for pair in ("LR", "PA", "IS") if end in pair)
    return SIDES[pair.replace(end, "")], SIDES[end]
