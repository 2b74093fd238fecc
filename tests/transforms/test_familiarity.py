"""Cases that are unlike the training's, incomplete or cut off, and a case that is as it should be."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.errors import BadInput
from common.networks import save_weights, state_digest
from common.transforms.familiarity import CaseWarningsd, expected_entropy, familiar_ranges, measure_image

LABELS = {"0": "background", "1": "lumen", "2": "wall"}
FAMILIAR = {
    "cases": 8,
    "spacing": [[1.0, 1.0], [1.0, 2.0], [5.0, 10.0]],
    "extent": [[20.0, 30.0], [20.0, 30.0], [50.0, 100.0]],
    "intensity": [{"kind": "ct", "low": [-1000.0, -900.0], "high": [200.0, 600.0], "middle": [0.3, 0.7]}],
}
MR = {"kind": "zscore", "low": [10.0, 40.0], "high": [110.0, 340.0], "middle": [0.3, 0.5]}


def make_image(array: np.ndarray, affine: np.ndarray) -> MetaTensor:
    return MetaTensor(torch.as_tensor(array, dtype=torch.float32), affine=torch.as_tensor(affine, dtype=torch.float64))


def make_case(
    spacing: tuple[float, ...] = (1, 1.5, 8),
    extent: tuple[float, ...] = (25, 25, 70),
    intensity: tuple[float, ...] = (-950, 0, 400),
    entropy: float = 0.1,
    empty: tuple[int, ...] = (),
    reach: tuple[slice, ...] = (slice(3, 5), slice(2, 4), slice(2, 4)),
) -> dict[str, Any]:
    """What inference hands on: a wall of 2 x 2 x 2 voxels and a lumen of one in 6 x 6 x 6 voxels, x to the left."""
    label = torch.zeros(1, 6, 6, 6, dtype=torch.uint8)
    label[0][reach] = 2
    label[0, 2, 3, 3] = 1
    for index in empty:
        label[label == index] = 0
    meta = {"filename_or_obj": "a.nii.gz"}
    for name, value in (("spacing", spacing), ("extent", extent), ("intensity", [intensity])):
        meta[f"measured_{name}"] = torch.tensor(value, dtype=torch.float64)
    segmentation = MetaTensor(label, affine=torch.diag(torch.tensor([-1.0, 1, 1, 1])))
    return {"image": MetaTensor(torch.zeros(1, 6, 6, 6), meta=meta), "segmentation": segmentation, "entropy": entropy}


@pytest.fixture
def summary(tmp_path: Path) -> Path:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"cases": 6, "entropy": {"mean": 0.1, "sd": 0.02, "n": 6}}))
    return path


def kinds(case: dict[str, Any], familiar: Any = FAMILIAR, **settings: Any) -> list[tuple[str, str | None]]:
    result = CaseWarningsd(LABELS, familiar, **settings)({**case, "result": {"volumes": {}}})["result"]
    assert list(result) == ["volumes", "warnings", "not_compared"]
    assert json.loads(json.dumps(result)) == result
    return [(warning["kind"], warning.get("structure")) for warning in result["warnings"]]


def test_an_image_is_measured_in_the_patients_axes() -> None:
    # Stored as (z, x, y), x to the left.
    affine = np.array([[0, -1.5, 0, 0], [0, 0, 2.0, 0], [6.0, 0, 0, 0], [0, 0, 0, 1]])
    array = np.zeros((2, 4, 5, 10))
    array[0].ravel()[:101] = np.arange(100, 201)  # percentiles 101 and 199; all else is 0 and does not count
    array[1] = 7
    measured = measure_image(make_image(array, affine))
    assert measured["spacing"].tolist() == [1.5, 2.0, 6.0]
    assert measured["extent"].tolist() == [7.5, 20.0, 24.0]
    assert measured["intensity"].tolist() == [[101, 150, 199], [7, 7, 7]]


def test_a_sample_of_a_large_image_says_the_same() -> None:
    array = np.tile(np.arange(1000, dtype=np.float32), (1000, 1))[None]
    low, _, high = measure_image(make_image(array, np.eye(3)))["intensity"][0].tolist()
    assert low == pytest.approx(10, abs=2)
    assert high == pytest.approx(990, abs=2)


def test_ranges_over_cases() -> None:
    cases = [(np.full((1, 4, 4), value), np.diag([size, 2.0, 1])) for value, size in ((50, 1.0), (80, 1.23456))]
    for array, _ in cases:
        array[0, 0, 0] = 10
    ranges = familiar_ranges([measure_image(make_image(*case)) for case in cases], [True])
    assert ranges["cases"] == 2
    assert ranges["spacing"] == [[1.0, 1.235], [2.0, 2.0]]
    assert ranges["extent"] == [[4.0, 4.938], [8.0, 8.0]]
    (channel,) = ranges["intensity"]
    assert channel["kind"] == "ct"
    assert channel["high"] == [50, 80]
    # Of 16 voxels the 1st percentile lies 0.15 of the way from the least to the next: 10 + 0.15 x 40, 10 + 0.15 x 70.
    assert channel["low"] == [16, 20.5]
    assert channel["middle"] == [1, 1], "all but one voxel are the brightest"


def test_a_familiar_case_has_no_warnings(summary: Path) -> None:
    assert kinds(make_case(), entropy_from=summary) == []
    assert kinds(make_case(spacing=(9, 9, 9), intensity=(0, 1, 1)), None) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"spacing": (1.4, 2.9, 3.4)}, []),
        ({"spacing": (1, 1, 15.1)}, ["spacing"]),
        ({"spacing": (1, 0.6, 8)}, ["spacing"]),
        ({"extent": (14, 44, 140)}, []),
        ({"extent": (25, 25, 151)}, ["field_of_view"]),
        ({"extent": (13, 25, 70)}, ["field_of_view"]),
        ({"intensity": (-1399, 0, 999)}, []),  # the training's are 1600 wide
        ({"intensity": (24, 800, 1424)}, ["intensity"]),  # stored with an offset
        ({"intensity": (-1000, 0, 1001)}, ["intensity"]),
        ({"intensity": (-1000, -500, -201)}, ["intensity"]),
        ({"entropy": 0.159}, []),
        ({"entropy": 0.161}, ["entropy"]),
        ({"entropy": math.nan}, []),
    ],
)
def test_a_case_that_is_unlike_the_training(change: dict[str, Any], expected: list[str], summary: Path) -> None:
    assert kinds(make_case(**change), entropy_from=summary) == [(kind, None) for kind in expected]


@pytest.mark.parametrize(
    ("intensity", "expected"),
    [
        ((20, 320, 820), []),  # 3/8 of the way
        ((0.0, 0.375, 1.0), []),  # the same on another scale
        ((-1.0, 0.5, 3.0), []),  # and with an offset
        ((20, 820 - 180, 820), ["intensity"]),  # another contrast: most is bright
        ((20, 40, 820), ["intensity"]),
    ],
)
def test_units_that_mean_nothing_are_compared_by_their_contrast(intensity: Any, expected: list[str]) -> None:
    familiar = {"intensity": [MR]}
    assert kinds(make_case(intensity=intensity), familiar) == [(kind, None) for kind in expected]


def test_what_is_missing() -> None:
    assert kinds(make_case(empty=(1,))) == [("nothing_found", "lumen")]
    assert kinds(make_case(empty=(1, 2))) == [("nothing_found", None)]


def test_what_is_cut_off_and_where() -> None:
    case = {**make_case(reach=(slice(3, 6), slice(2, 4), slice(0, 4))), "result": {}}
    (warning,) = CaseWarningsd(LABELS)(case)["result"]["warnings"]
    assert (warning["kind"], warning["structure"]) == ("border", "wall")
    assert "(left, foot)" in warning["text"]
    flat = make_case()
    flat["segmentation"] = flat["segmentation"][..., 3:4]  # a single slice touches both ends of its axis
    assert kinds(flat) == []


def test_a_network_that_only_regresses() -> None:
    case = make_case()
    del case["segmentation"], case["entropy"]
    assert kinds(case) == []


def test_warnings_are_on_screen_with_the_cases_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        kinds(make_case(spacing=(3, 3, 8), empty=(2,)))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert all(line.startswith("a: ") for line in lines)
    assert "wall was not found" in lines[0]
    assert "3 mm left-right (1)" in lines[1]


def write_record(path: Path, digest: str, mean: float, count: int = 6) -> None:
    record = {"weights": digest, "entropy": {"mean": mean, "sd": 0.02, "n": count}}
    path.with_suffix(".json").write_text(json.dumps(record))


def test_entropies_are_those_of_the_weights_record(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    assert expected_entropy(path) is None
    network = torch.nn.Linear(1, 1)
    save_weights(network, path)
    assert expected_entropy(path) is None
    digest = state_digest(network.state_dict())
    write_record(path, digest, 0.1)
    assert expected_entropy(path) == (0.1, 0.02, 6)
    write_record(path, digest, 0.1, count=4)
    assert expected_entropy(path) is None, "too few cases"
    write_record(path, "0" * 64, 0.1)
    assert expected_entropy(path) is None, "a record of other weights"


def test_a_summary_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(BadInput, match="entropy_from"):
        expected_entropy(tmp_path / "summary.json")
