from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.data.datalist import read_datalist
from common.data.thickness import add_arguments, main, wall_thickness
from common.errors import BadInput

INNER, WALL = 1, 2


def tube(inner: int, walls: int, size: int = 21) -> np.ndarray:
    """A square tube of half-width ``inner`` with ``walls`` voxels of wall, seen in 2D."""
    index = np.abs(np.arange(size) - size // 2)
    far = np.maximum(index[:, None], index[None])
    return np.where(far <= inner, INNER, np.where(far <= inner + walls, WALL, 0))


def shell(radius: float, thickness: float, spacing: tuple[float, ...], shift: float = 0.2) -> np.ndarray:
    spacings = np.asarray(spacing)
    counts = np.ceil(2 * (radius + thickness) / spacings).astype(int) + 4
    axes = [(np.arange(n) - (n - 1) / 2 - shift) * size for n, size in zip(counts, spacings, strict=True)]
    distance = np.linalg.norm(np.stack(np.meshgrid(*axes, indexing="ij")), axis=0)
    return np.where(distance < radius, INNER, np.where(distance <= radius + thickness, WALL, 0))


@pytest.mark.parametrize("walls", [1, 2, 3, 5])
def test_flat_wall_is_as_thick_as_its_voxels(walls: int) -> None:
    label = tube(3, walls)
    thickness = wall_thickness(label, (0.5, 0.5), WALL, [INNER])
    # Beside the corners the nearest voxels lie straight across.
    np.testing.assert_allclose(thickness[10, 10 + 4 : 10 + 4 + walls], 0.5 * walls, rtol=1e-6)
    assert thickness.dtype == np.float32
    np.testing.assert_array_equal(thickness > 0, label == WALL)


def test_anisotropic_flat_wall_takes_off_a_voxel_across() -> None:
    slab = np.repeat([[0, 0, WALL, WALL, INNER, INNER, INNER, WALL, WALL, WALL, 0]], 41, axis=0)
    across = wall_thickness(slab, (0.5, 2.0), WALL, [INNER])[20]
    np.testing.assert_allclose(across, [0, 0, 4, 4, 0, 0, 0, 6, 6, 6, 0], rtol=1e-6)
    across = wall_thickness(slab, (2.0, 0.5), WALL, [INNER])[20]
    np.testing.assert_allclose(across, [0, 0, 1, 1, 0, 0, 0, 1.5, 1.5, 1.5, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("spacing", "thickness"), [((1, 1, 1), 2), ((1, 1, 1), 4), ((0.8, 0.8, 0.8), 3), ((0.8, 0.8, 1.5), 3)]
)
def test_spherical_shell_within_half_a_voxel(spacing: tuple[float, ...], thickness: float) -> None:
    label = shell(12.0, thickness, spacing)
    measured = wall_thickness(label, spacing, WALL, [INNER])[label == WALL]
    assert (measured > 0).all()
    assert np.abs(measured - thickness).mean() < 0.5 * np.mean(spacing)


def test_open_ring_is_not_measured_and_its_neighbour_is() -> None:
    closed, broken = tube(3, 2), tube(3, 2)
    broken[10, 14:] = 0
    thickness = wall_thickness(np.concatenate([closed, broken]), (1, 1), WALL, [INNER])
    np.testing.assert_array_equal(thickness[:21] > 0, closed == WALL)
    assert (thickness[21:] == 0).all()


def test_ring_that_another_structure_closes_is_open() -> None:
    label = tube(3, 2)
    label[10, 14:16] = 7
    assert (wall_thickness(label, (1, 1), WALL, [INNER]) == 0).all()
    assert (wall_thickness(label, (1, 1), WALL, [INNER, 7])[label == WALL] == 0).all()
    label[10, 14] = WALL
    assert (wall_thickness(label, (1, 1), WALL, [INNER])[label == WALL] > 0).all()


def test_slices_are_measured_by_themselves() -> None:
    broken = tube(3, 2)
    broken[10, 14:] = 0
    label = np.stack([tube(3, 2), tube(2, 4), broken], axis=-1)
    together = wall_thickness(label, (1, 1, 5), WALL, [INNER], slicewise=True)
    for index in range(3):
        alone = wall_thickness(label[..., index], (1, 1), WALL, [INNER])
        np.testing.assert_array_equal(together[..., index], alone)
    moved = wall_thickness(np.moveaxis(label, -1, 0), (5, 1, 1), WALL, [INNER], slicewise=True, axis=0)
    np.testing.assert_array_equal(np.moveaxis(moved, 0, -1), together)
    assert (together[..., 2] == 0).all()
    assert together[10, 13, 1] == pytest.approx(4.0)


def test_cavity_that_leaves_the_view_keeps_its_wall() -> None:
    label = tube(3, 2)[:, 10:]
    np.testing.assert_array_equal(wall_thickness(label, (1, 1), WALL, [INNER]) > 0, label == WALL)


def test_wall_without_cavity_and_small_cavity() -> None:
    label = tube(1, 2, size=15)
    solid = np.zeros((7, 15), dtype=int)
    solid[2:5, 4:10] = WALL
    both = np.concatenate([label, solid])
    thickness = wall_thickness(both, (1, 1), WALL, [INNER])
    assert (thickness[15:] == 0).all()
    assert (thickness[:15][label == WALL] > 0).all()
    assert wall_thickness(label, (1, 1), WALL, [INNER], smallest_cavity=9).any()
    assert not wall_thickness(label, (1, 1), WALL, [INNER], smallest_cavity=10).any()


@pytest.mark.parametrize("fill", [0, WALL, INNER])
def test_volumes_of_one_label_give_zeros(fill: int) -> None:
    assert not wall_thickness(np.full((5, 5, 5), fill), (1, 1, 1), WALL, [INNER]).any()


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(BadInput, match="one spacing"):
        wall_thickness(np.zeros((1, 4, 4, 4)), (1, 1, 1), WALL, [INNER])
    with pytest.raises(BadInput, match="both wall and inner"):
        wall_thickness(np.zeros((4, 4)), (1, 1), WALL, [WALL])


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return main(parser.parse_args([*arguments, "--wall", "2", "--inner", "1"]))


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    """A datalist with a labelled case in a flipped orientation, and an unlabelled one."""
    folder = tmp_path / "masks"
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    label = np.stack([tube(3, 2)] * 4, axis=-1).astype(np.uint8)
    affine = np.diag([-0.5, 0.5, 4.0, 1.0])
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(np.zeros(label.shape, np.int16), affine), folder / f"images/{name}.nii.gz")
    nib.save(nib.Nifti1Image(label, affine), folder / "labels/a.nii.gz")
    content = {
        "name": "masks",
        "labels": {"0": "background", "1": "lumen", "2": "wall"},
        "training": [{"image": "./images/a.nii.gz", "label": "./labels/a.nii.gz", "patient": "p1", "age": 60}],
        "unlabeled": [{"image": "images/b.nii.gz"}],
    }
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder / "datalist.json"


def test_command_writes_maps_and_a_datalist(masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = masks.read_bytes()
    output = tmp_path / "elsewhere" / "maps"
    assert run("--datalist", str(masks), "--output", str(output), "--slicewise") == 0
    assert masks.read_bytes() == before
    content = read_datalist(output / "datalist.json")
    (entry,) = content["training"]
    for key in ("image", "label"):
        assert (output / entry[key]).samefile(masks.parent / f"{key}s/a.nii.gz")
    assert entry["thickness"] == "thickness/a.nii.gz"
    assert (entry["patient"], entry["age"]) == ("p1", 60)
    assert set(content["unlabeled"][0]) == {"image"}
    assert (output / content["unlabeled"][0]["image"]).exists()
    (target,) = content["targets"]
    assert (target["name"], target["unit"], target["kind"], target["structure"]) == ("thickness", "mm", "dense", 2)
    image = nib.load(output / entry["thickness"])
    np.testing.assert_allclose(image.affine, np.diag([-0.5, 0.5, 4.0, 1.0]))
    values = np.asarray(image.dataobj)
    assert values[10, 14, 0] == pytest.approx(1.0)
    assert target["scale"] == pytest.approx(values[values > 0].mean(), abs=0.01)
    assert "100.0% of wall voxels" in capsys.readouterr().out


def test_command_refuses_to_overwrite_its_input(masks: Path) -> None:
    with pytest.raises(BadInput, match="would be overwritten"):
        run("--datalist", str(masks), "--output", str(masks.parent))
    with pytest.raises(BadInput, match="would be overwritten"):
        run("--datalist", str(masks), "--output", str(masks.parent), "--name", "labels")
    assert not (masks.parent / "thickness").exists()


def test_command_names_unknown_ids_and_open_walls(masks: Path, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    base = ["--datalist", str(masks), "--output", str(tmp_path / "out")]
    with pytest.raises(BadInput, match="label id 9"):
        main(parser.parse_args([*base, "--wall", "9", "--inner", "1"]))
    with pytest.raises(BadInput, match="none of"):
        main(parser.parse_args([*base, "--wall", "1", "--inner", "2"]))


@pytest.mark.skipif("BUNDLES_DATA" not in os.environ, reason="needs real data: set BUNDLES_DATA to its folder")
def test_agrees_with_the_cardiac_reference() -> None:
    folder = Path(os.environ["BUNDLES_DATA"]) / "cardiac_wall"
    if not folder.is_dir():
        pytest.skip(f"{folder} not found")
    equal = total = 0
    for path in sorted((folder / "thickness").glob("*.nii.gz"))[:12]:
        image = nib.load(folder / "labels" / path.name)
        label = np.asarray(image.dataobj)
        reference = np.asarray(nib.load(path).dataobj)[label == 2]
        measured = wall_thickness(label, image.header.get_zooms(), 2, [3], slicewise=True, smallest_cavity=20)
        # The reference is stored in hundredths of a millimetre.
        rounded = measured[label == 2].astype(float).round(2)
        equal += int((np.abs(rounded - reference) < 1e-3).sum())
        total += reference.size
    assert equal / total > 0.999
