from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from picture_data import make_volume

from common.errors import BadInput
from common.handlers.drawing import ERROR_COLOURS, _choose_slice, _maps, save_curves, save_overview


def test_overview_has_a_panel_for_all_there_is(tmp_path: Path) -> None:
    image, labels = make_volume()
    values = labels * 1.5
    spacing = (1.0, 1.0, 3.0)
    save_overview(tmp_path / "image.png", image)
    save_overview(tmp_path / "two.png", image, labels, spacing=spacing)
    save_overview(tmp_path / "four.png", image, labels, labels, spacing=spacing)
    save_overview(tmp_path / "maps.png", image, None, None, values, values + 1, spacing=spacing)
    save_overview(tmp_path / "seven.png", image, labels, labels, values, values + 1, spacing=spacing)
    for name, rows, columns in (("image", 1, 1), ("two", 1, 2), ("four", 1, 4), ("maps", 1, 4), ("seven", 2, 4)):
        picture = imread(tmp_path / f"{name}.png")
        assert picture.shape[:2] == (340 * rows, 320 * columns)
        assert picture[..., :3].std() > 0


def count(path: Path, colour: Any) -> int:
    """Pixels of exactly this colour."""
    picture = np.rint(imread(path)[..., :3] * 255)
    return int((picture == np.rint(np.asarray(to_rgb(colour)) * 255)).all(axis=-1).sum())


def test_wrong_voxels_have_the_colour_of_their_kind(tmp_path: Path) -> None:
    image, reference = np.zeros((20, 20)), np.zeros((20, 20), dtype=np.uint8)
    reference[5:15, 5:15] = 1
    prediction = reference.copy()
    prediction[5:15, 5:7] = 0  # 20 missed
    prediction[5:15, 15:19] = 1  # 40 wrongly found
    prediction[5:15, 9:10] = 2  # 10 of another label
    save_overview(tmp_path / "right.png", image, reference, reference)
    save_overview(tmp_path / "wrong.png", image, prediction, reference)
    # The legend has the colours, too.
    missed, found, label = (
        count(tmp_path / "wrong.png", colour) - count(tmp_path / "right.png", colour)
        for colour in ERROR_COLOURS.values()
    )
    assert list(ERROR_COLOURS) == ["missed", "wrongly found", "wrong label"]
    assert found / missed == pytest.approx(2, rel=0.05)
    assert found / label == pytest.approx(4, rel=0.1)
    assert found > 2000


def test_what_a_reference_does_not_label_is_no_error(tmp_path: Path) -> None:
    image, reference = np.zeros((20, 20)), np.zeros((20, 20), dtype=np.uint8)
    reference[5:15, 5:15] = 1
    prediction = reference.copy()
    prediction[5:7, 5:15] = 0
    prediction[7:9, 5:15] = 2
    missed = prediction.copy()
    prediction[15:19, :] = 2  # of which this reference knows nothing
    for name, found, annotated in (("less", missed, None), ("partial", prediction, [1]), ("whole", prediction, None)):
        save_overview(tmp_path / f"{name}.png", image, found, reference, annotated=annotated)
    for kind, colour in ERROR_COLOURS.items():
        less, partial, whole = (count(tmp_path / f"{name}.png", colour) for name in ("less", "partial", "whole"))
        assert partial == less
        assert (whole > partial) == (kind == "wrongly found")


@pytest.mark.parametrize(("predicted", "place"), [(2.0, 0.5), (-12.0, 0.0)])
def test_both_maps_have_one_scale_and_the_error_its_own(predicted: float, place: float, tmp_path: Path) -> None:
    """Of 4 mm everywhere 2 are predicted, half of a scale from 0, or -12, the lower end of a scale that has it."""
    image, labels = np.zeros((20, 20)), np.ones((20, 20), dtype=np.uint8)
    labels[:, :2] = 0
    known = np.where(labels == 1, 4.0, 0)
    save_overview(tmp_path / "a.png", image, labels, labels, known * predicted / 4, known, unit="mm", structures=[1])
    panels = imread(tmp_path / "a.png")[340:, :, :3]
    for index, (name, value) in enumerate((("viridis", 1.0), ("viridis", place), ("coolwarm", 0.0))):
        panel = panels[:, 330 * index : 330 * index + 260]
        colour = np.asarray(colormaps[name](value)[:3])
        # Of some 235 x 235 pixels nine tenths have a value.
        assert (np.abs(panel - colour) < 0.01).all(axis=-1).sum() > 40000, index


def test_a_target_is_only_compared_inside_its_structure() -> None:
    planes = {
        "reference": np.array([[0, 1, 1, 1]]),
        "prediction": np.array([[1, 1, 0, 1]]),
        "target_reference": np.array([[5.0, 3.0, 2.0, -1.0]]),
        "target_prediction": np.array([[1.0, 2.0, 3.0, 4.0]]),
    }
    maps = {name: values.filled(np.nan).tolist() for name, values in _maps(planes, -1, [1]).items()}
    nan = pytest.approx(np.nan, nan_ok=True)
    assert maps == {
        "reference map": [[nan, 3.0, 2.0, nan]],
        "predicted map": [[1.0, 2.0, nan, 4.0]],
        "map error": [[nan, -1.0, 1.0, nan]],
    }
    everywhere = _maps(planes, None, [])
    assert everywhere["map error"].tolist() == [[-4.0, -1.0, 1.0, 5.0]]


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
    assert imread(tmp_path / "plane.png").shape[:2] == (680, 1280)


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
