"""What MONAI Label shows of a case's results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.transforms import Lambdad

from common.errors import BadInput
from common.transforms.displayed import DisplayedOutputd, displayed


@pytest.fixture
def case() -> dict[str, Any]:
    return {"pred": torch.zeros(1), "segmentation": torch.ones(1), "thickness_pred": torch.full((1,), 2.0)}


@pytest.mark.parametrize(("asked", "shown"), [("segmentation", 1.0), ("thickness", 2.0), (["thickness", "x"], 2.0)])
def test_shows_what_is_asked_for(case: dict[str, Any], asked: str | list[str], shown: float) -> None:
    assert DisplayedOutputd(asked)(case)["pred"].item() == shown


def test_unknown_output_names_those_there_are(case: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"'depth'.*'segmentation', 'thickness'"):
        DisplayedOutputd("depth")(case)


def test_comes_after_the_postprocessing(case: dict[str, Any]) -> None:
    postprocessing = Lambdad("segmentation", func=lambda value: value + 4)
    assert displayed(postprocessing)(case)["pred"].item() == 5.0
