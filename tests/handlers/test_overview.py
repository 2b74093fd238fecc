"""The picture of a prediction: what lies where in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from matplotlib.image import imread
from monai.data import MetaTensor
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from common.handlers.overview import CaseOverview, save_case_overview

LABELS = {"0": "background", "1": "lumen", "2": r"wall $\x$"}
THICKNESS = {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2}
BLUE, ORANGE = (31, 119, 180), (255, 127, 14)
IDENTITY = np.eye(4)


def ball(shape: tuple[int, ...], affine: np.ndarray, centre: tuple[float, ...], radius: float) -> np.ndarray:
    index = np.stack([*np.indices(shape), np.ones(shape)])
    world = np.tensordot(affine, index, axes=1)[:-1]
    distance = np.linalg.norm(world - np.reshape(centre, (-1, *[1] * len(shape))), axis=0)
    return (distance <= radius).astype(np.uint8)


def picture_of(path: Path, *arguments: Any, **options: Any) -> np.ndarray:
    save_case_overview(path, *arguments, **options)
    return np.rint(imread(path)[..., :3] * 255).astype(int)


def has_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.abs(picture - colour) < 12).all(axis=-1)


def panels(picture: np.ndarray) -> list[np.ndarray]:
    """The three panels of the first row, cut along the white between them."""
    row = picture[:310]
    inked = np.diff([0, *(row < 250).any(axis=(0, 2)).astype(int), 0])
    starts, ends = np.flatnonzero(inked == 1), np.flatnonzero(inked == -1)
    return [row[:, start:end] for start, end in zip(starts, ends, strict=True) if end - start > 50]


def test_the_sides_are_as_radiologists_have_them_and_a_ball_is_round(tmp_path: Path) -> None:
    """A ball to the patient's right, front and top of a black cube of 60 mm, with voxels of 1 x 2 x 3 mm."""
    affine, place = np.diag([1.0, 2.0, 3.0, 1.0]), (46.0, 36.0, 42.0)
    labels = ball((60, 30, 20), affine, place, 12.0)
    shown = panels(picture_of(tmp_path / "a.png", labels * 0.0, affine, labels, affine, LABELS))
    assert len(shown) == 3
    for panel, (across, along) in zip(shown, ((0, 1), (0, 2), (1, 2)), strict=True):
        rows, columns = np.nonzero(has_colour(panel, BLUE))
        scale = 60 / panel.shape[1]  # mm a pixel
        assert (np.ptp(columns) + 1) * scale == pytest.approx(24, abs=4)
        assert (np.ptp(rows) + 1) * scale == pytest.approx(24, abs=4)
        assert columns.mean() * scale == pytest.approx(60 - place[across], abs=3)
        black = np.flatnonzero((panel < 5).all(axis=-1).mean(axis=1) > 0.5)
        assert (rows.mean() - black[0]) * scale == pytest.approx(60 - place[along], abs=3)


@pytest.mark.parametrize("codes", ["LPS", "SAR"])
def test_a_grid_s_orientation_changes_nothing(codes: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shape, affine = (14, 16, 12), np.diag([1.0, 1.2, 2.0, 1.0])
    affine[:3, 3] = 3, -8, 5
    image, image_affine = random.normal(size=(9, 10, 8)), np.diag([2.0, 2.0, 3.0, 1.0])
    image_affine[:3, 3] = affine[:3, 3]
    arrays = [ball(shape, affine, (9, 0, 15), 6.0), random.random(shape)]
    arrays[0] += ball(shape, affine, (9, 0, 15), 3.0)
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    turned = [apply_orientation(array, turn) for array in arrays]
    turned_affine = affine @ inv_ornt_aff(turn, shape)
    one, other = (
        picture_of(tmp_path / "a.png", image, image_affine, labels, grid, LABELS, [THICKNESS], {"thickness": values})
        for labels, values, grid in ((*arrays, affine), (*turned, turned_affine))
    )
    assert np.array_equal(one, other)


def test_a_close_up_of_what_is_small_and_a_row_a_dense_target(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(40, 40, 40))
    large, small = ball((40, 40, 40), IDENTITY, (20, 20, 20), 15.0), ball((40, 40, 40), IDENTITY, (20, 20, 20), 5.0)
    number = {"name": "volume", "kind": "sum", "unit": "mL"}
    maps = {"thickness": small * 1.0}

    def height(labels: np.ndarray, *targets: dict[str, Any]) -> int:
        options = {"targets": targets, "maps": maps}
        return len(picture_of(tmp_path / "a.png", image, IDENTITY, labels, IDENTITY, LABELS, **options))

    row = height(small) - height(large)
    assert row == pytest.approx(310, abs=2)
    assert height(large, THICKNESS) - height(large) == row
    assert height(small, THICKNESS, number) - height(small) == row


def test_a_map_counts_inside_its_structure_alone(tmp_path: Path) -> None:
    shape = (20, 20, 20)
    labels = 2 * ball(shape, IDENTITY, (10, 10, 10), 7.0) - ball(shape, IDENTITY, (10, 10, 10), 4.0)
    inside = np.where(labels == 2, np.indices(shape)[0], 0.0)

    def draw(values: np.ndarray) -> np.ndarray:
        arguments = (np.zeros(shape), IDENTITY, labels, IDENTITY, LABELS, [THICKNESS], {"thickness": values})
        return picture_of(tmp_path / "a.png", *arguments)

    expected = draw(inside)
    assert np.array_equal(draw(np.where(labels == 2, inside, 1e6)), expected)
    assert np.array_equal(draw(np.where(labels == 2, inside, np.nan)), expected)
    assert not np.array_equal(draw(inside + 5), expected)
    # Yellow is the end of the scale, and the map is greater to the right, which lies left.
    yellow = np.nonzero(has_colour(expected[:, :600], (253, 231, 37)))[1]
    purple = np.nonzero(has_colour(expected[:, :600], (72, 36, 117)))[1]
    assert yellow.size
    assert yellow.min() < (purple.min() if purple.size else 600)


def test_both_contours_show_where_two_labels_meet(tmp_path: Path) -> None:
    shape = (30, 30, 30)
    labels = 2 * ball(shape, IDENTITY, (15, 15, 15), 12.0) - ball(shape, IDENTITY, (15, 15, 15), 8.0)
    for panel in panels(picture_of(tmp_path / "a.png", np.zeros(shape), IDENTITY, labels, IDENTITY, LABELS)):
        assert has_colour(panel, BLUE).sum() > 100
        assert has_colour(panel, ORANGE).sum() > 100


def test_the_planes_cross_where_something_is() -> None:
    """Two equal balls, left and right: the middle is the last voxel of the first one."""
    from common.handlers.overview import _centre_and_box

    shape = (40, 20, 20)
    found = ball(shape, IDENTITY, (8, 10, 10), 5.0) + ball(shape, IDENTITY, (30, 10, 10), 5.0) > 0
    centre, box = _centre_and_box(found, IDENTITY)
    assert found[int(centre[0])].sum() > 20
    assert found[tuple(centre.astype(int))]
    margin = 0.2 * 33
    around = [[2.5 - margin, 35.5 + margin], *[[4.5 - margin, 15.5 + margin]] * 2]
    assert box == pytest.approx(np.array(around))
    centre, box = _centre_and_box(found & False, IDENTITY)
    assert centre.tolist() == [19.5, 9.5, 9.5]
    assert box is None


def test_two_dimensions_and_nothing_found(tmp_path: Path) -> None:
    image, labels = np.random.default_rng(0).normal(size=(30, 20)), ball((30, 20), np.eye(3), (22, 10), 4.0)
    shown = picture_of(tmp_path / "a.png", image, np.eye(3), labels, np.eye(3), LABELS, title=r"$\x$")
    assert has_colour(shown, BLUE)[:, : shown.shape[1] // 2].sum() > 50  # index 22 of 30 is to the right: left
    nothing = picture_of(tmp_path / "b.png", image, np.eye(3), labels * 0, np.eye(3), LABELS)
    assert not has_colour(nothing, BLUE).any()


def test_the_handler_writes_a_picture_a_case(tmp_path: Path) -> None:
    meta, affine = {"filename_or_obj": "x/case 1.nii.gz"}, torch.eye(4, dtype=torch.float64)
    labels = 2 * torch.as_tensor(ball((12, 12, 12), IDENTITY, (6, 6, 6), 4.0))[None]
    case = {
        "image": MetaTensor(torch.rand(2, 6, 6, 6), affine=torch.diag(torch.tensor([2.0, 2, 2, 1])), meta=meta),
        "segmentation": MetaTensor(labels, affine=affine, meta=meta),
        "thickness_pred": MetaTensor(labels * 1.5, affine=affine, meta=meta),
    }
    for folder in ("one", "two"):
        engine = Engine(lambda _, batch: [batch])
        CaseOverview(tmp_path / folder, LABELS, [THICKNESS, {"name": "n", "kind": "sum"}]).attach(engine)
        engine.run([case])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["case 1_overview.png"]
    one, two = ((tmp_path / folder / "case 1_overview.png").read_bytes() for folder in ("one", "two"))
    assert one == two


def test_a_target_without_a_map_has_no_row(tmp_path: Path) -> None:
    labels = ball((12, 12, 8), IDENTITY, (6, 6, 4), 3.0)
    arguments = (labels * 1.0, IDENTITY, labels, IDENTITY, LABELS)
    np.testing.assert_array_equal(
        picture_of(tmp_path / "a.png", *arguments, [THICKNESS]), picture_of(tmp_path / "b.png", *arguments)
    )
