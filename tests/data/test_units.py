from __future__ import annotations

import numpy as np
import pytest

from common.data.units import hounsfield_doubt, map_doubts, number_doubt

THICKNESS = {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": 0}
VOLUME = {"name": "volume", "unit": "mL", "kind": "sum"}


@pytest.mark.parametrize(
    ("values", "severity"),
    [
        ((-1024, 3071), None),
        ((-1000, 400), None),
        ((-125, 275), "warning"),
        ((0, 255), "error"),
        ((0, 4095), "error"),
        ((0, 1), "error"),
        ((-2.1, 6.5), "error"),
        ((-1, 1), "error"),
    ],
)
def test_values_that_a_ct_has(values: tuple[float, float], severity: str | None) -> None:
    doubt = hounsfield_doubt(*values)
    assert (doubt and doubt[0]) == severity
    if doubt:
        assert f"{values[0]:g} to {values[1]:g}" in doubt[1]


@pytest.mark.parametrize(
    ("target", "value", "words"),
    [
        (VOLUME, 5.9, None),
        (VOLUME, 6.1, "6.1 mL, more than the whole image, which has 6 mL"),
        (VOLUME, -1.0, "can't be negative"),
        ({**VOLUME, "unit": "mm3"}, 5900.0, None),
        ({**VOLUME, "unit": "L"}, 1.0, "more than the whole image"),
        ({"name": "axis", "unit": "cm", "kind": "mean"}, 4.0, "more than the whole image, which has 3.742 cm"),
        ({"name": "axis", "unit": "cm", "kind": "mean"}, 3.7, None),
        ({"name": "score", "unit": "points", "kind": "mean"}, -1e6, None),
        ({"name": "score", "kind": "mean"}, 1e6, None),
    ],
)
def test_numbers_are_no_larger_than_the_image(target: dict, value: float, words: str | None) -> None:
    problem = number_doubt(target, value, (10, 10, 10), (1.0, 2.0, 3.0))  # 6 mL
    assert problem is None if words is None else words in problem


def test_an_area_in_two_dimensions() -> None:
    area = {"name": "area", "unit": "mm2", "kind": "sum"}
    assert number_doubt(area, 101, (10, 10), (1.0, 1.0))
    assert number_doubt(area, 99, (10, 10), (1.0, 1.0)) is None


def wall(value: float, outside: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A structure of 4 x 4 x 4 voxels in 20 x 20 x 20 with a map: in it, with a voxel around, 10.4 mm across."""
    label = np.zeros((20, 20, 20), np.uint8)
    label[8:12, 8:12, 8:12] = 2
    return np.where(label == 2, value, outside).astype(np.float32), label


@pytest.mark.parametrize(
    ("change", "value", "found"),
    [
        ({}, 4.0, []),
        ({}, 10.3, []),
        ({}, 10.5, ["error: thickness goes up to 10.5 mm, longer than the structure itself, 10.39 mm"]),
        ({}, -1.0, ["error: thickness goes down to -1 mm, below its `minimum`, 0"]),
        ({"missing": -1}, -1.0, []),
        ({"missing": float("nan")}, float("nan"), []),
        ({"unit": "cm"}, 4.0, ["error: thickness goes up to 4 cm"]),
        ({"unit": "um"}, 4000.0, []),
        ({"unit": ""}, 10.5, ["warning: thickness goes up to 10.5 (no unit given; mm?)"]),
        ({"name": "depth"}, 10.5, []),
        ({"name": "depth", "inner": [1]}, 10.5, ["error: depth goes up to 10.5 mm"]),
        ({"name": "depth"}, 40.0, ["error: depth goes up to 40 mm, longer than the image itself, 34.64 mm"]),
        ({"name": "strain", "unit": "%"}, -20.0, ["warning: strain goes down to -20 %, below its `minimum`, 0"]),
        ({"name": "strain", "unit": "%", "minimum": None}, -20.0, []),
        ({"name": "strain", "unit": "%", "minimum": -10}, -20.0, ["error: strain goes down to -20 %"]),
    ],
)
def test_maps_that_can_not_be_in_their_unit(change: dict, value: float, found: list[str]) -> None:
    values, label = wall(value)
    doubts = [": ".join(doubt) for doubt in map_doubts({**THICKNESS, **change}, values, (1.0, 1.0, 1.0), label)]
    assert len(doubts) == len(found)
    for doubt, start in zip(doubts, found, strict=True):
        assert doubt.startswith(start)


def test_what_lies_outside_the_structure_does_not_count() -> None:
    values, label = wall(4.0, outside=99.0)
    assert map_doubts(THICKNESS, values, (1.0, 1.0, 1.0), label) == []
    assert map_doubts(THICKNESS, values, (1.0, 1.0, 1.0)) != []


def test_a_thickness_beyond_a_part_of_its_structure() -> None:
    """The box around two nodules in opposite corners is no measure of either."""
    values, label = wall(4.0)
    label[0:3, 0:3, 0:3] = 2
    values[0:3, 0:3, 0:3] = 8.0
    assert map_doubts(THICKNESS, values, (1.0, 1.0, 1.0), label) == []
    values[1, 1, 1] = 9.0
    ((severity, words),) = map_doubts(THICKNESS, values, (1.0, 1.0, 1.0), label)
    assert severity == "warning"
    assert "thickness goes up to 9 mm in a part of its structure that is 8.66 mm across" in words
