"""A label map of many structures as one of a single organ."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from common.errors import BadInput
from common.transforms.organ import SelectOrgand

LABELS = {"0": "background", "1": "liver", "2": "spleen"}


def test_the_organ_becomes_one_and_the_others_background() -> None:
    label = MetaTensor(
        torch.tensor([[[0, 1, 2, 2]]], dtype=torch.uint8), affine=torch.diag(torch.tensor([2.0, 3, 1, 1]))
    )
    case = {"image": torch.rand(1, 1, 4), "label": label, "reference": label.float(), "annotated": [2], "patient": "p"}
    chosen = SelectOrgand(LABELS, "spleen")(case)
    for key in ("label", "reference"):
        assert chosen[key].tolist() == [[[0, 0, 1, 1]]]
        assert chosen[key].dtype == case[key].dtype
        assert torch.equal(chosen[key].affine, label.affine)
    assert chosen["image"] is case["image"]
    assert "annotated" not in chosen, "it knows both of its classes"
    assert case["annotated"] == [2]
    assert label.max() == 2, "the case it was given is as it was"


def test_what_is_not_loaded_is_left_alone() -> None:
    assert SelectOrgand(LABELS, "liver")({"label": "a.nii.gz", "annotated": [1]}) == {"label": "a.nii.gz"}


def test_an_unknown_organ() -> None:
    with pytest.raises(BadInput, match=r"'heart'.*liver, spleen"):
        SelectOrgand(LABELS, "heart")
