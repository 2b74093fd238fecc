from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from scipy import ndimage

from common.errors import BadInput
from common.metrics import DISTANCE_METRICS, OVERLAP_METRICS, segmentation_metrics

LABELS = {"0": "background", "1": "lumen", "2": "wall"}


def test_overlap_and_volume_of_shifted_boxes() -> None:
    prediction, reference = np.zeros((2, 10, 10, 10), dtype=np.uint8)
    reference[2:6, 2:6, 2:6] = 1
    prediction[3:7, 2:6, 2:6] = 1
    result = segmentation_metrics(prediction, reference, {"0": "background", "1": "lumen"}, (2.0, 1.0, 0.5))["lumen"]
    assert result["dice"] == pytest.approx(2 * 48 / 128)
    assert result["jaccard"] == pytest.approx(48 / 80)
    assert result["volume_ml"] == result["volume_ml_reference"] == pytest.approx(64 / 1000)
    assert result["failed"] is False


@pytest.mark.parametrize(("axis", "expected"), [(0, 9.0), (1, 3.0), (2, 1.5)])
def test_distances_of_two_voxels_follow_the_spacing(axis: int, expected: float) -> None:
    prediction, reference = np.zeros((2, 12, 12, 12), dtype=np.uint8)
    reference[4, 4, 4] = 1
    place = [4, 4, 4]
    place[axis] += 3
    prediction[tuple(place)] = 1
    result = segmentation_metrics(prediction, reference, {"1": "lumen"}, (3.0, 1.0, 0.5))["lumen"]
    assert result["hd95"] == pytest.approx(expected)
    assert result["asd"] == pytest.approx(expected)
    assert result["dice"] == 0
    assert result["failed"] is False


def test_distances_are_symmetric_and_hd95_takes_the_larger_direction() -> None:
    prediction, reference = np.zeros((2, 8, 8), dtype=np.uint8)
    prediction[1, 1] = 1
    reference[1, 1] = reference[1, 5] = 1
    result = segmentation_metrics(prediction, reference, {"1": "lumen"}, (1.0, 2.0))["lumen"]
    # Prediction to reference: 0; back: 0 and 8 mm, whose 95th percentile is 7.6; the mean of all three is 8 / 3.
    assert result["hd95"] == pytest.approx(7.6)
    assert result["asd"] == pytest.approx(8 / 3)
    # All three together, 0, 0 and 8 mm: 7.2; with a spacing of 1 the last is 4. From the prediction alone: 0.
    assert result["hd95_pooled"] == pytest.approx(7.2)
    assert result["hd95_pooled_voxels"] == pytest.approx(3.6)
    assert result["asd_voxels"] == 0
    assert result["area_mm2"] == pytest.approx(2.0)
    assert result["area_mm2_reference"] == pytest.approx(4.0)
    swapped = segmentation_metrics(reference, prediction, {"1": "lumen"}, (1.0, 2.0))["lumen"]
    assert swapped["hd95"] == result["hd95"]
    assert swapped["asd"] == result["asd"]
    assert swapped["hd95_pooled"] == result["hd95_pooled"]
    assert swapped["asd_voxels"] == pytest.approx(2)


def test_agrees_with_monai_on_whole_volumes() -> None:
    generator = np.random.default_rng(0)
    prediction, reference = (generator.random((2, 9, 11, 7)) > 0.8).astype(np.uint8)
    spacing = [0.7, 1.3, 4.0]
    pair = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, reference)]
    result = segmentation_metrics(prediction, reference, {"1": "lumen"}, spacing)["lumen"]
    hausdorff = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing)
    surface = compute_average_surface_distance(*pair, include_background=True, symmetric=True, spacing=spacing)
    assert result["hd95"] == pytest.approx(float(hausdorff), rel=1e-5)
    assert result["asd"] == pytest.approx(float(surface), rel=1e-5)


def medpy_distances(mask: np.ndarray, other: np.ndarray, spacing: list[float]) -> np.ndarray:
    """medpy's surface distances by their definition: masks less their erosion by face neighbours, and how far apart."""
    cross = ndimage.generate_binary_structure(mask.ndim, 1)
    surface, target = (m & ~ndimage.binary_erosion(m, cross) for m in (mask, other))
    return ndimage.distance_transform_edt(~target, sampling=spacing)[surface]


@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((24, 20, 16), [0.625, 0.625, 0.625]), ((24, 20, 16), [1.5, 1.0, 8.0]), ((30, 40), [1.0, 3.0])],
)
def test_pooled_and_directed_figures_are_medpys(shape: tuple[int, ...], spacing: list[float]) -> None:
    generator = np.random.default_rng(0)
    fields = [ndimage.gaussian_filter(generator.standard_normal(shape), 2) for _ in range(2)]
    # Two overlapping blobs that touch the volume's border.
    prediction, reference = fields[0] > 0.05, fields[0] + 0.5 * fields[1] > 0.05
    result = segmentation_metrics(prediction.astype(int), reference.astype(int), {"1": "lumen"}, spacing)["lumen"]
    pairs = ((prediction, reference), (reference, prediction))
    ones = [1.0] * len(shape)
    pooled, voxels = (np.concatenate([medpy_distances(*pair, size) for pair in pairs]) for size in (spacing, ones))
    assert result["hd95_pooled"] == pytest.approx(float(np.percentile(pooled, 95)), rel=1e-6)
    assert result["hd95_pooled_voxels"] == pytest.approx(float(np.percentile(voxels, 95)), rel=1e-6)
    assert result["asd_voxels"] == pytest.approx(float(medpy_distances(*pairs[0], ones).mean()), rel=1e-6)
    assert result["asd_voxels"] != pytest.approx(float(medpy_distances(*pairs[1], ones).mean()), rel=1e-3)
    assert result["asd"] == pytest.approx(float(pooled.mean()), rel=1e-6)


def test_identical_masks_are_perfect() -> None:
    mask = np.zeros((6, 6, 6), dtype=np.uint8)
    mask[:, 1:4, 5:] = 2
    result = segmentation_metrics(mask, mask, LABELS, (1, 1, 1))["wall"]
    assert (result["dice"], result["jaccard"]) == (1, 1)
    assert [result[key] for key in DISTANCE_METRICS] == [0] * 5


@pytest.mark.parametrize("empty", ["prediction", "reference"])
def test_one_empty_mask_is_a_failure_never_a_perfect_distance(empty: str) -> None:
    mask = np.zeros((5, 5, 5), dtype=np.uint8)
    mask[1:3] = 1
    nothing = np.zeros_like(mask)
    pair = (nothing, mask) if empty == "prediction" else (mask, nothing)
    result = segmentation_metrics(*pair, LABELS, (1, 1, 1))["lumen"]
    assert result["failed"] is True
    assert result["dice"] == result["jaccard"] == 0
    assert all(math.isnan(result[key]) for key in DISTANCE_METRICS)


def test_a_label_in_neither_mask_has_no_figures() -> None:
    nothing = np.zeros((4, 4, 4), dtype=np.uint8)
    result = segmentation_metrics(nothing, nothing, LABELS, (1, 1, 1))
    assert set(result) == {"lumen", "wall"}
    assert all(math.isnan(result["wall"][key]) for key in (*OVERLAP_METRICS, *DISTANCE_METRICS))
    assert result["wall"]["failed"] is False


def test_other_shapes_and_spacings_are_refused() -> None:
    mask = np.zeros((4, 4, 4), dtype=np.uint8)
    with pytest.raises(BadInput, match=r"\(4, 4, 4\) and \(4, 4\)"):
        segmentation_metrics(mask, mask[0], LABELS, (1, 1, 1))
    with pytest.raises(BadInput, match="spacing"):
        segmentation_metrics(mask, mask, LABELS, (1, 1))
