from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.planning.doubts import doubts
from common.planning.findings import Case, Findings

LABELS = {"0": "background", "1": "lumen", "2": "wall"}
THICKNESS = {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": 0, "scale": 2.0}
SEVERITY = {"name": "severity", "unit": "points", "kind": "mean", "scale": 3.0}


def thickness(total: float, low: float, high: float) -> dict[str, tuple[np.ndarray, ...]]:
    """What a case's map shows of 300 voxels of the structure 2."""
    return {"thickness": tuple(np.array([0, 0, value]) for value in (total, 300, low, high))}


def data_set(count: int = 4, modality: str = "MR", **of_the_first: Any) -> Findings:
    """Cases in which nothing is wrong, and what is to be wrong with the first one, c0."""
    cases = []
    for index in range(count):
        case = Case(
            name=f"c{index}",
            shape=np.array([100, 100, 50]),
            spacing=np.array([1.0, 1.0, 2.0]),
            axes=np.arange(3),
            orientation="RAS",
            nonzero=np.array([100, 100, 50]),
            lowest=np.array([-1000.0 if modality == "CT" else 0.0]),
            highest=np.array([1500.0]),
            label_voxels=np.array([9000, 700, 300]),
            maps=thickness(600.0, 1.0, 6.0),
            numbers={"severity": 3.0 + index % 4},
        )
        cases.append(case)
    for key, value in of_the_first.items():
        setattr(cases[0], key, value)
    return Findings(3, 1, LABELS, [modality] if modality else [], cases, targets=[THICKNESS, SEVERITY])


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_nothing_is_said_of_a_sound_data_set(modality: str) -> None:
    assert doubts(data_set(modality=modality)) == []


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"orientation": "LPS"}, ["mixed orientations: 3 of RAS, 1 of LPS; not RAS: c0"]),
        ({"shape": np.array([100, 100, 1])}, ["c0: one slice in a file of three dimensions"]),
        ({"spacing": np.array([1.0, 1.0, 5.0])}, ["c0: voxels of 1 x 1 x 5 mm, the median is 1 x 1 x 2"]),
        ({"spacing": np.array([0.4, 1.0, 2.0])}, ["c0: voxels of 0.4 x 1 x 2 mm"]),
        ({"spacing": np.array([1.9, 1.0, 1.1])}, []),
        ({"label_voxels": None}, ["without a label in `training`: c0"]),
        ({"label_voxels": np.array([9000, 0, 0])}, ["nothing is labelled in c0"]),
        (
            {"lowest": np.array([0.0]), "highest": np.array([1.0])},
            ["c0: called CT, but no voxel is below -200 (found 0 to 1)"],
        ),
        (
            {"maps": thickness(600e3, 1e3, 6e3)},
            [
                "c0 has 2000 mm where the median is 2",
            ],
        ),
        ({"beyond": ["thickness goes up to 6000 mm"]}, ["c0: thickness goes up to 6000 mm"]),
        ({"numbers": {"severity": 40.0}}, ["target severity: c0 has 40 points where the median is"]),
        ({"numbers": {"severity": np.nan}, "maps": {}}, []),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, Any], said: list[str]) -> None:
    sentences = doubts(data_set(modality="CT", **wrong))
    assert len(sentences) == len(said)
    for sentence, part in zip(sentences, said, strict=True):
        assert part in sentence


def test_a_label_in_no_case_is_named() -> None:
    findings = data_set()
    for case in findings.cases:
        case.label_voxels = np.array([9000, 1000, 0])
    assert ["label 2, wall, is in no training case" in sentence for sentence in doubts(findings)] == [True]


def test_images_that_look_like_ct_ask_for_the_modality() -> None:
    findings = data_set(modality="CT")
    findings.modalities = []
    (sentence,) = doubts(findings)
    assert "values of -1000 to 1500, as CT has" in sentence
    assert doubts(data_set(modality="")) == []


def test_a_thickness_in_metres_is_named() -> None:
    findings = data_set()
    for case in findings.cases:
        case.maps = thickness(0.6, 0.001, 0.006)
    (sentence,) = doubts(findings)
    assert "0.002 mm in the median case, where the finest voxel has sides of 1 mm" in sentence


def test_a_target_without_a_unit_is_named() -> None:
    findings = data_set()
    findings.targets = [{**THICKNESS, "unit": ""}]
    assert ["thickness: no unit given" in sentence for sentence in doubts(findings)] == [True]


def test_many_cases_are_not_all_listed() -> None:
    findings = data_set(count=30)
    for case in findings.cases[:9]:
        case.spacing = np.array([3.0, 3.0, 2.0])
        case.orientation = "LPS"
    orientations, *spacings = doubts(findings)
    assert "c0, c1, c2, c3, c4 and 4 more" in orientations
    assert len(spacings) == 6
    assert spacings[-1] == "4 more cases with another voxel size."
