"""The figures against other people's implementations, on anisotropic volumes: real ones where BUNDLES_DATA is set."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from scipy import ndimage
from scipy.spatial import KDTree

from common.data.thickness import wall_thickness
from common.metrics import segmentation_metrics
from common.transforms import CaseSummaryd

REAL = Path(os.environ.get("BUNDLES_DATA") or "/nowhere") / "cardiac_wall"


class Pair(NamedTuple):
    """A reference, what might be predicted for it, and a map of its wall's thickness where there is one."""

    prediction: np.ndarray
    reference: np.ndarray
    spacing: list[float]
    thickness: np.ndarray | None


def phantom(spacing: tuple[float, ...], shift: float = 0.0) -> np.ndarray:
    """A thick shell (2) around a cavity (3) with an ellipsoid (1) beside it."""
    counts = [math.ceil(60 / size) for size in spacing]
    axes = [(np.arange(n) - (n - 1) / 2) * size for n, size in zip(counts, spacing, strict=True)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    far = np.sqrt((x - shift) ** 2 + y**2 + (0.7 * z) ** 2)
    beside = np.sqrt(x**2 + (1.5 * (y - 22)) ** 2 + (0.7 * z) ** 2)
    return np.select([far < 9, far < 14, beside < 11], [3, 2, 1], 0).astype(np.uint8)


def disturbed(reference: np.ndarray) -> np.ndarray:
    """Moved by two voxels and one, and without the first of the slices that hold something."""
    moved = ndimage.shift(reference, (2, -1, 0), order=0)
    moved[..., np.flatnonzero(reference.any(axis=(0, 1)))[0]] = 0
    return moved


def make_pairs() -> list[Pair]:
    if not REAL.is_dir():
        sizes = [(2.0, 1.0, 1.0), (0.9, 1.3, 5.0)]
        return [Pair(disturbed(phantom(size)), phantom(size), list(size), None) for size in sizes]
    pairs = []
    for entry in json.loads((REAL / "datalist.json").read_text())["validation"][:2]:
        image = nib.load(REAL / entry["label"])
        reference = np.asarray(image.dataobj).astype(np.uint8)
        thickness = np.asarray(nib.load(REAL / entry["thickness"]).dataobj)
        spacing = [float(size) for size in image.header.get_zooms()[:3]]
        pairs.append(Pair(disturbed(reference), reference, spacing, thickness))
    return pairs


PAIRS = make_pairs()
LABELS = {"0": "background", "1": "right ventricle", "2": "wall", "3": "cavity"}
STRUCTURES = [(pair, int(label)) for pair in PAIRS for label in LABELS if label != "0"]


def figures(pair: Pair, label: int) -> dict[str, Any]:
    return segmentation_metrics(pair.prediction, pair.reference, LABELS, pair.spacing)[LABELS[str(label)]]


def itk_image(sitk: Any, mask: np.ndarray, spacing: list[float]) -> Any:
    """With a border, since SimpleITK doesn't count what lies outside the volume as background."""
    image = sitk.GetImageFromArray(np.pad(mask, 1).astype(np.uint8))
    image.SetSpacing(spacing[::-1])
    return image


@pytest.mark.parametrize(("pair", "label"), STRUCTURES)
def test_overlap_and_volume_by_simpleitk_and_scikit_learn(pair: Pair, label: int) -> None:
    sitk, learn = pytest.importorskip("SimpleITK"), pytest.importorskip("sklearn.metrics")
    found = figures(pair, label)
    masks = [pair.prediction == label, pair.reference == label]
    images = [itk_image(sitk, mask, pair.spacing) for mask in masks]
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    flat = [mask.ravel() for mask in masks]
    assert 0.1 < found["dice"] < 0.99
    for dice in (overlap.GetDiceCoefficient(), learn.f1_score(flat[1], flat[0])):
        assert found["dice"] == pytest.approx(dice, rel=1e-9)
    for jaccard in (overlap.GetJaccardCoefficient(), learn.jaccard_score(flat[1], flat[0])):
        assert found["jaccard"] == pytest.approx(jaccard, rel=1e-9)
    for name, image in zip(("volume_ml", "volume_ml_reference"), images, strict=True):
        shape = sitk.LabelShapeStatisticsImageFilter()
        shape.Execute(image)
        assert found[name] == pytest.approx(shape.GetPhysicalSize(1) / 1000, rel=1e-6)


@pytest.mark.parametrize(("pair", "label"), STRUCTURES)
def test_distances_by_simpleitk(pair: Pair, label: int) -> None:
    """Contour voxels and Maurer's distance map: the very same definition, so the same figures."""
    sitk = pytest.importorskip("SimpleITK")
    masks = (pair.prediction == label, pair.reference == label)
    contours = [sitk.LabelContour(itk_image(sitk, mask, pair.spacing)) for mask in masks]
    arrays = [sitk.GetArrayFromImage(contour) > 0 for contour in contours]
    maps = [
        np.abs(sitk.GetArrayFromImage(sitk.SignedMaurerDistanceMap(c, squaredDistance=False, useImageSpacing=True)))
        for c in contours
    ]
    directed = [maps[1][arrays[0]], maps[0][arrays[1]]]
    together = np.concatenate(directed)
    found = figures(pair, label)
    assert found["hd95"] == pytest.approx(max(np.percentile(d, 95) for d in directed), rel=1e-4)
    assert found["asd"] == pytest.approx(together.mean(), rel=1e-4)
    assert found["hd95_pooled"] == pytest.approx(np.percentile(together, 95), rel=1e-4)


@pytest.mark.parametrize(("pair", "label"), STRUCTURES)
def test_distances_by_surface_distance(pair: Pair, label: int) -> None:
    """Surface elements between voxels, weighted by their area: another definition, whose figures are alike."""
    other = pytest.importorskip("surface_distance")
    surfaces = other.compute_surface_distances(pair.reference == label, pair.prediction == label, pair.spacing)
    found = figures(pair, label)
    assert found["hd95"] == pytest.approx(other.compute_robust_hausdorff(surfaces, 95), abs=max(pair.spacing))
    mean = np.mean(other.compute_average_surface_distance(surfaces))
    assert found["asd"] == pytest.approx(mean, abs=0.5 * max(pair.spacing))


@pytest.mark.parametrize("empty", ["prediction", "reference", "both"])
def test_what_is_empty(empty: str) -> None:
    """The conventions of docs/data.md; scikit-learn and SimpleITK have the same Dice where one alone is empty."""
    pair = PAIRS[-1]
    nothing = np.zeros_like(pair.reference)
    prediction = pair.prediction if empty == "reference" else nothing
    reference = pair.reference if empty == "prediction" else nothing
    found = segmentation_metrics(prediction, reference, LABELS, pair.spacing)["wall"]
    assert all(math.isnan(found[key]) for key in ("hd95", "asd", "hd95_pooled", "asd_voxels"))
    voxel = math.prod(pair.spacing) / 1000
    assert found["volume_ml"] == pytest.approx((prediction == 2).sum() * voxel)
    assert found["volume_ml_reference"] == pytest.approx((reference == 2).sum() * voxel)
    if empty == "both":
        assert math.isnan(found["dice"])
        assert found["failed"] is False
        return
    assert (found["dice"], found["jaccard"], found["failed"]) == (0, 0, True)
    learn = pytest.importorskip("sklearn.metrics")
    masks = [(array == 2).ravel() for array in (reference, prediction)]
    assert learn.f1_score(*masks, zero_division=1) == 0
    sitk = pytest.importorskip("SimpleITK")
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*(itk_image(sitk, array == 2, pair.spacing) for array in (prediction, reference)))
    assert overlap.GetDiceCoefficient() == 0


@pytest.mark.parametrize("pair", PAIRS)
def test_inference_and_evaluation_have_one_volume(pair: Pair) -> None:
    affine = torch.diag(torch.tensor([*pair.spacing, 1.0], dtype=torch.float64))
    segmentation = MetaTensor(torch.from_numpy(pair.prediction)[None], affine=affine)
    volumes = CaseSummaryd(LABELS)({"segmentation": segmentation})["result"]["volumes"]
    for label, name in LABELS.items():
        if label != "0":
            assert volumes[name]["value"] == pytest.approx(figures(pair, int(label))["volume_ml"])


def by_nearest_points(label: np.ndarray, spacing: list[float]) -> np.ndarray:
    """Thickness of closed walls by its definition, with a tree of voxel centres in place of distance transforms."""
    centres = np.moveaxis(np.indices(label.shape), 0, -1) * np.asarray(spacing)
    wall, inner, outside = label == 2, label == 3, ~np.isin(label, (2, 3))
    nearest = []
    for mask in (inner, outside):
        distance, index = KDTree(centres[mask]).query(centres[wall])
        nearest.append((distance, centres[mask][index]))
    (to_inner, inner_point), (to_outside, outside_point) = nearest
    direction = outside_point - inner_point
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    result = np.zeros(label.shape)
    result[wall] = to_inner + to_outside - 1 / np.linalg.norm(direction / np.asarray(spacing), axis=1)
    return result


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (1.0, 1.4, 2.5)])
def test_thickness_of_a_closed_wall_by_nearest_points(spacing: tuple[float, ...]) -> None:
    label = phantom(spacing)
    label[label == 1] = 0
    found, expected = wall_thickness(label, spacing, 2, [3]), by_nearest_points(label, list(spacing))
    assert found.max() > 0
    # Of several nearest points at the same distance either may be taken, and the voxel between them differs a little.
    apart = np.abs(found - expected)[label == 2]
    assert np.median(apart) < 1e-5
    assert apart.max() < 0.5 * max(spacing)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.thickness is not None])
def test_thickness_of_real_walls_by_the_maps_of_the_data(pair: Pair) -> None:
    """The maps were made by whoever made the data set, slice by slice; they are stored with two digits."""
    found = wall_thickness(pair.reference, pair.spacing, 2, [3], slicewise=True)
    np.testing.assert_array_equal(found > 0, pair.thickness > 0)
    np.testing.assert_allclose(found, pair.thickness, atol=0.0051)
