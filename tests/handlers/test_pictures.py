from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from matplotlib.image import imread
from monai.data import MetaTensor
from picture_data import THICKNESS, make_volume

from common.handlers.pictures import StagePicture


def make_case(name: str, shift: int) -> dict[str, Any]:
    image, labels = make_volume()
    prediction = make_volume(shift)[1]
    affine = torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float64))
    meta = {"filename_or_obj": f"{name}.nii.gz"}
    keys = {
        "image": image,
        "segmentation": prediction,
        "reference": labels,
        "thickness_pred": prediction * 1.0,
        "reference_thickness": labels * 2.0,
    }
    return {key: MetaTensor(torch.as_tensor(value)[None], affine=affine, meta=meta) for key, value in keys.items()}


def run(handler: StagePicture, cases: list[dict[str, Any]]) -> None:
    engine = Engine(lambda _, batch: [batch])
    handler.attach(engine)
    engine.run(cases, max_epochs=1)


def test_stage_picture_saves_the_first_and_the_median_case(tmp_path: Path) -> None:
    cases = [make_case("good", 0), make_case("bad", 5), make_case("fair", 2)]
    run(StagePicture(tmp_path / "all", [THICKNESS], cases=2, median=True), cases)
    names = {"good_overview_thickness.png", "bad_overview_thickness.png", "median_overview_thickness.png"}
    assert {file.name for file in (tmp_path / "all").iterdir()} == names
    run(StagePicture(tmp_path / "fair", [THICKNESS]), cases[2:])
    median = (tmp_path / "all" / "median_overview_thickness.png").read_bytes()
    assert median == (tmp_path / "fair" / "fair_overview_thickness.png").read_bytes()


def test_a_training_shows_the_same_as_an_evaluation(tmp_path: Path) -> None:
    """Its validation has the references under the datalist's own keys."""
    case = make_case("a", 2)
    run(StagePicture(tmp_path / "evaluation", [THICKNESS]), [case])
    case["label"], case["thickness"] = case.pop("reference"), case.pop("reference_thickness")
    run(StagePicture(tmp_path / "training", [THICKNESS], reference_key="label", reference_prefix=""), [case])
    first, other = (tmp_path / name / "a_overview_thickness.png" for name in ("evaluation", "training"))
    assert imread(first).shape[:2] == (680, 1280)
    assert first.read_bytes() == other.read_bytes()


def test_partial_labels_count_where_they_are_known(tmp_path: Path) -> None:
    """As in an evaluation's figures, and as a data loader hands the ids on."""
    case = make_case("a", 0)
    case["reference"] = case["reference"] * (case["reference"] == 1)
    handler = StagePicture(tmp_path, [THICKNESS])
    assert handler._keep(case)["dice"] == pytest.approx((0 + 2 * 42 / (42 + 42)) / 2)
    kept = handler._keep({**case, "annotated": [torch.tensor([1])]})
    assert kept["dice"] == 1
    assert kept["pictures"]["overview_thickness"]["annotated"] == [1]


def test_stage_picture_brings_the_image_to_the_predictions_grid(tmp_path: Path) -> None:
    case = make_case("a", 1)
    finer = case["image"].as_tensor().repeat_interleave(3, dim=3)
    affine = torch.eye(4, dtype=torch.float64)
    affine[2, 3] = -1.0
    case["image"] = MetaTensor(finer, affine=affine, meta={"filename_or_obj": "a.nii.gz"})
    run(StagePicture(tmp_path / "other"), [case])
    run(StagePicture(tmp_path / "own"), [make_case("a", 1)])
    other, own = (imread(tmp_path / folder / "a_overview.png") for folder in ("other", "own"))
    np.testing.assert_allclose(other, own, atol=0.03)


def test_stage_picture_needs_neither_reference_nor_segmentation(tmp_path: Path) -> None:
    case = make_case("a", 0)
    for key in ("segmentation", "reference", "reference_thickness"):
        del case[key]
    run(StagePicture(tmp_path, [THICKNESS], median=True), [case])
    assert imread(tmp_path / "a_overview_thickness.png").shape[1] == 640
    assert len(list(tmp_path.iterdir())) == 1
