"""Which cases serve for one organ."""

from __future__ import annotations

import pytest

from common.data import organ_cases, unknown_as_background
from common.data.checks import check_cases
from common.data.partial import organ_id
from common.errors import BadInput

LABELS = {"0": "background", "1": "liver", "2": "spleen"}
CASES = [
    {"image": "a", "label": "la", "annotated": [1]},
    {"image": "b", "label": "lb", "annotated": ["2"]},
    {"image": "c", "label": "lc"},
    {"image": "d", "label": "ld", "annotated": [0, 1, 2]},
]


@pytest.mark.parametrize(("organ", "images"), [("liver", "acd"), ("spleen", "bcd"), (None, "abcd")])
def test_cases_of_an_organ_are_those_that_label_it(organ: str | None, images: str) -> None:
    chosen = organ_cases(CASES, LABELS, organ)
    assert chosen == [case for case in CASES if case["image"] in images]


def test_an_organ_that_nobody_labels() -> None:
    with pytest.raises(BadInput, match=r"none of the 1 cases labels 'spleen'.*its id 2"):
        organ_cases(CASES[:1], LABELS, "spleen")
    assert organ_cases(CASES[:1], LABELS, "spleen", required=False) == []
    assert organ_cases([], LABELS, "spleen") == []


@pytest.mark.parametrize("organ", ["pancreas", "background"])
def test_an_organ_that_is_no_structure(organ: str) -> None:
    with pytest.raises(BadInput, match=f"'{organ}'.*liver, spleen"):
        organ_id(LABELS, organ)


def test_unknown_as_background_forgets_what_is_not_known() -> None:
    assert unknown_as_background(CASES[:1]) == [{"image": "a", "label": "la"}]
    assert "annotated" in CASES[0]


def test_background_alone_is_no_annotation(tmp_path) -> None:
    import nibabel
    import numpy as np

    path = str(tmp_path / "a.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), path)
    with pytest.raises(BadInput, match="a: `annotated` is \\[0\\], which names no structure"):
        check_cases([{"image": path, "label": path, "annotated": [0]}], LABELS)
    check_cases([{"image": path, "label": path, "annotated": [2]}, {"image": path, "annotated": []}], LABELS)
