from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from matplotlib.image import imread
from monai.data import MetaTensor

from common.errors import BadInput
from common.handlers.pictures import StagePicture, _choose_slice, save_curves, save_overview

THICKNESS = {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 1, "missing": 0}


def make_volume(shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(0).normal(size=(12, 16, 6)).astype(np.float32)
    labels = np.zeros((12, 16, 6), dtype=np.uint8)
    labels[3:8, 4 + shift : 9 + shift, 2:4] = 1
    labels[4:6, 5 + shift : 7 + shift, 3] = 2
    return image, labels


def test_overview_has_a_column_for_all_there_is(tmp_path: Path) -> None:
    image, labels = make_volume()
    values = labels * 1.5
    spacing = (1.0, 1.0, 3.0)
    save_overview(tmp_path / "image.png", image)
    save_overview(tmp_path / "two.png", image, labels, spacing=spacing)
    save_overview(tmp_path / "five.png", image, labels, labels, values, values + 1, spacing=spacing)
    for name, columns in (("image", 1), ("two", 2), ("five", 5)):
        picture = imread(tmp_path / f"{name}.png")
        assert picture.shape[:2] == (340, 320 * columns)
        assert picture[..., :3].std() > 0


def test_overview_is_reproducible_and_shows_the_prediction(tmp_path: Path) -> None:
    image, labels = make_volume()
    save_overview(tmp_path / "a.png", image, labels, labels)
    save_overview(tmp_path / "b.png", image, labels, labels)
    save_overview(tmp_path / "c.png", image, make_volume(shift=3)[1], labels)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    first, other = imread(tmp_path / "a.png"), imread(tmp_path / "c.png")
    assert np.array_equal(first[:, :640], other[:, :640])
    assert not np.array_equal(first[:, 640:], other[:, 640:])


def test_overview_of_two_dimensions_and_of_nothing_found(tmp_path: Path) -> None:
    image, labels = make_volume()
    nothing = np.zeros((12, 16), dtype=np.uint8)
    save_overview(tmp_path / "plane.png", image[..., 3], nothing, labels[..., 3], nothing * 1.0, nothing * 1.0)
    assert imread(tmp_path / "plane.png").shape[:2] == (340, 1600)


def test_voxels_keep_their_physical_proportions(tmp_path: Path) -> None:
    save_overview(tmp_path / "flat.png", np.random.default_rng(0).random((10, 10)), spacing=(1.0, 4.0))
    picture = imread(tmp_path / "flat.png")[40:, :, :3]
    drawn = np.argwhere(picture.min(axis=-1) < 1)
    height, width = drawn.max(axis=0) - drawn.min(axis=0) + 1
    assert height / width == pytest.approx(4.0, rel=0.1)


def test_the_slice_lies_across_thick_voxels_and_holds_most_foreground() -> None:
    image, labels = make_volume()
    labels[3:8, 4:9, 4] = 1
    labels[0, 0, 4] = 1
    assert _choose_slice({"image": image, "prediction": labels}, (1.0, 1.0, 3.0)) == (2, 4)
    assert _choose_slice({"image": image, "prediction": labels * 0}, (5.0, 1.0, 3.0)) == (0, 6)


def test_overview_refuses_different_grids(tmp_path: Path) -> None:
    image, labels = make_volume()
    with pytest.raises(BadInput, match="one grid"):
        save_overview(tmp_path / "a.png", image, labels[:4])


def test_curves(tmp_path: Path) -> None:
    history = {"loss": [(0, 1.0), (1, float("nan")), (2, 0.5)], "dice/wall": [(2, 0.4)], "nothing": []}
    save_curves(tmp_path / "curves.png", history)
    save_curves(tmp_path / "again.png", history)
    save_curves(tmp_path / "empty.png", {})
    assert imread(tmp_path / "curves.png").shape[:2] == (300, 800)
    assert imread(tmp_path / "empty.png").shape[:2] == (300, 400)
    assert (tmp_path / "curves.png").read_bytes() == (tmp_path / "again.png").read_bytes()


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
