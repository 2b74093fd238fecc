"""Overlap, surface distances and size of a segmentation, a label at a time.

A mask's surface is its outermost layer of voxels: those that one erosion with the face neighbours removes, what lies
outside the volume counting as background. Distances run between voxel centres. MONAI (``get_edge_surface_distance``)
and medpy (``metric.binary``) both mean this; their distances are the same but for MONAI's rounding to float32. What
differs is how they are put together:

- ``hd95`` in mm, MONAI's: the larger of the two directed 95th percentiles.
- ``hd95_pooled`` in mm, medpy's ``hd95``: the 95th percentile of both directions' distances together, a few percent
  lower or higher.
- ``hd95_pooled_voxels``: the same with a spacing of 1, as the literature on the left atrium reports it.
- ``asd`` in mm, MONAI's symmetric one (medpy's ``assd``): the mean over the surface voxels of both masks.
- ``asd_voxels``, medpy's ``asd`` with a spacing of 1, as the same literature reports it: *directed*, the mean over the
  prediction's surface of the distance to the reference's. What the prediction lacks hardly raises it.

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
DISTANCE_METRICS = ("hd95", "asd", "hd95_pooled", "hd95_pooled_voxels", "asd_voxels")
BACKGROUND = 0


def _union_box(prediction: np.ndarray, reference: np.ndarray) -> tuple[slice, ...]:
    """The box round both masks with one voxel to spare; at least one of the masks must not be empty."""
    union = prediction | reference
    box = []
    for axis in range(union.ndim):
        occupied = np.flatnonzero(union.any(axis=tuple(other for other in range(union.ndim) if other != axis)))
        box.append(slice(max(int(occupied[0]) - 1, 0), int(occupied[-1]) + 2))
    return tuple(box)


def _surface_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distances from the prediction's surface voxels to the reference's surface, and the other way round."""
    _, distances, _ = get_edge_surface_distance(
        torch.from_numpy(prediction), torch.from_numpy(reference), spacing=list(spacing), symmetric=True
    )
    to_reference, to_prediction = (np.asarray(directed, dtype=np.float64) for directed in distances)
    return to_reference, to_prediction


def _distance_metrics(prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """The figures of two masks, neither of them empty."""
    box = _union_box(prediction, reference)
    prediction, reference = prediction[box].copy(), reference[box].copy()
    directed = _surface_distances(prediction, reference, spacing)
    in_voxels = _surface_distances(prediction, reference, [1.0] * prediction.ndim)
    return {
        "hd95": max(float(np.percentile(distances, 95)) for distances in directed),
        "asd": float(np.concatenate(directed).mean()),
        "hd95_pooled": float(np.percentile(np.concatenate(directed), 95)),
        "hd95_pooled_voxels": float(np.percentile(np.concatenate(in_voxels), 95)),
        "asd_voxels": float(in_voxels[0].mean()),
    }


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
        For each label's name a dict with ``dice``, ``jaccard``, ``hd95``, ``asd`` and ``hd95_pooled`` in mm,
        ``hd95_pooled_voxels`` and ``asd_voxels`` (the module says what each means), the size of both masks
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
        nothing = dict.fromkeys(DISTANCE_METRICS, float("nan"))
        results[name] = {
            "dice": 2 * common_count / total if total else float("nan"),
            "jaccard": common_count / (total - common_count) if total else float("nan"),
            **(_distance_metrics(predicted, referred, spacing) if both else nothing),
            size_name: float(predicted_count * voxel_size),
            f"{size_name}_reference": float(referred_count * voxel_size),
            "failed": total > 0 and not both,
        }
    return results
