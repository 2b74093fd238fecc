"""Overlap, surface distances and size of a segmentation, a label at a time.

Surface distances are those of MONAI: a mask's surface is its outermost layer of voxels, distances run between voxel
centres in mm. HD95 is the larger of the two directed 95th percentiles; other tools (medpy) pool both directions first,
which gives figures a few percent lower or higher. ASD is the mean over the surface voxels of both masks.

A label that only one of the two masks holds is a failure: Dice and Jaccard are 0 and the distances are NaN, never a
perfect 0. A label that neither holds has no figures at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics.utils import get_edge_surface_distance

from ..errors import BadInput

__all__ = ["DISTANCE_METRICS", "OVERLAP_METRICS", "segmentation_metrics"]

OVERLAP_METRICS = ("dice", "jaccard")
DISTANCE_METRICS = ("hd95", "asd")
BACKGROUND = 0


def _union_box(prediction: np.ndarray, reference: np.ndarray) -> tuple[slice, ...]:
    """The box round both masks with one voxel to spare; at least one of the masks must not be empty."""
    union = prediction | reference
    box = []
    for axis in range(union.ndim):
        occupied = np.flatnonzero(union.any(axis=tuple(other for other in range(union.ndim) if other != axis)))
        box.append(slice(max(int(occupied[0]) - 1, 0), int(occupied[-1]) + 2))
    return tuple(box)


def _surface_distances(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> tuple[float, float]:
    box = _union_box(prediction, reference)
    # One call for both figures: the surfaces and their distances are the expensive part.
    _, (to_reference, to_prediction), _ = get_edge_surface_distance(
        torch.from_numpy(prediction[box].copy()),
        torch.from_numpy(reference[box].copy()),
        spacing=list(spacing),
        symmetric=True,
    )
    directed = [float(np.percentile(np.asarray(distances), 95)) for distances in (to_reference, to_prediction)]
    both = np.concatenate([np.asarray(to_reference), np.asarray(to_prediction)])
    return max(directed), float(both.mean())


def segmentation_metrics(
    prediction: np.ndarray, reference: np.ndarray, labels: Mapping[str, str], spacing: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Compare two label maps on the same grid.

    Args:
        prediction: label ids, shape (*spatial), 2D or 3D.
        reference: label ids, same shape.
        labels: label id (as a string) to name; the background, id 0, is left out.
        spacing: size of a voxel in mm, one number an axis.

    Returns:
        For each label's name a dict with ``dice``, ``jaccard``, ``hd95`` and ``asd`` in mm, the size of both masks
        (``volume_ml`` and ``volume_ml_reference``, in 2D ``area_mm2`` and ``area_mm2_reference``) and ``failed``:
        whether only one of the masks holds the label. Figures that do not exist are NaN.

    Raises:
        BadInput: the shapes differ, or the spacing does not fit them.
    """
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    if prediction.shape != reference.shape:
        raise BadInput(
            f"prediction and reference are on different grids: shape {prediction.shape} and {reference.shape}. "
            "Both must be label maps on the image's own grid."
        )
    spacing = [float(size) for size in spacing]
    if len(spacing) != prediction.ndim or min(spacing) <= 0:
        raise BadInput(f"spacing {spacing} does not fit a label map of shape {prediction.shape}: one size > 0 an axis.")

    voxel_size = float(np.prod(spacing))
    size_name, voxel_size = ("volume_ml", voxel_size / 1000) if prediction.ndim == 3 else ("area_mm2", voxel_size)
    results: dict[str, dict[str, Any]] = {}
    for key, name in labels.items():
        if int(key) == BACKGROUND:
            continue
        predicted, referred = prediction == int(key), reference == int(key)
        predicted_count, referred_count = int(predicted.sum()), int(referred.sum())
        common_count = int((predicted & referred).sum())
        total = predicted_count + referred_count
        both = predicted_count > 0 and referred_count > 0
        hd95, asd = _surface_distances(predicted, referred, spacing) if both else (float("nan"), float("nan"))
        results[name] = {
            "dice": 2 * common_count / total if total else float("nan"),
            "jaccard": common_count / (total - common_count) if total else float("nan"),
            "hd95": hd95,
            "asd": asd,
            size_name: float(predicted_count * voxel_size),
            f"{size_name}_reference": float(referred_count * voxel_size),
            "failed": total > 0 and not both,
        }
    return results
