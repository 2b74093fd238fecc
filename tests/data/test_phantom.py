from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from common.data.phantom import (
    LABELED_DOMAIN,
    SHIFTED_DOMAIN,
    Bulla,
    Domain,
    generate_phantoms,
    make_phantom,
    rasterize,
)
from common.errors import BadInput

SHAPE = (32, 32, 32)


def sphere(radius: float, thickness: float, center: float = 16.3, amplitude: float = 0.0) -> Bulla:
    return Bulla(
        center=np.full(3, center),
        axes=np.full(3, radius),
        rotation=np.eye(3),
        waves=np.zeros((0, 5)),
        lobes=np.zeros((0, 5)),
        thickness=thickness,
        variation=(amplitude, np.array([0.0, 0.0, 1.0])),
        wall_hu=0.0,
    )


def volume_of_sphere(radius: float) -> float:
    return 4 / 3 * np.pi * radius**3


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 2.5)])
@pytest.mark.parametrize("thickness", [0.7, 2.5])
def test_shares_of_a_sphere_sum_to_its_volume(spacing: tuple[float, ...], thickness: float) -> None:
    shape = [round(33 / size) for size in spacing]
    _, lumen, wall, nearby = rasterize(sphere(8.0, thickness), shape, spacing)
    voxel = np.prod(spacing)
    assert lumen.sum() * voxel == pytest.approx(volume_of_sphere(8.0), rel=0.005)
    assert wall.sum() * voxel == pytest.approx(volume_of_sphere(8.0 + thickness) - volume_of_sphere(8.0), rel=0.01)
    assert (lumen + wall).max() <= 1 + 1e-9
    np.testing.assert_allclose(nearby, thickness)


def test_varying_thickness_follows_its_direction() -> None:
    box, _, wall, nearby = rasterize(sphere(8.0, 2.0, amplitude=0.3), SHAPE, (1, 1, 1))
    axes = [np.arange(part.start, part.stop) + 0.5 - 16.3 for part in box]
    offset = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    cosine = offset[..., 2] / np.linalg.norm(offset, axis=-1)
    inside = wall > 0.5
    np.testing.assert_allclose(nearby[inside], 2.0 * (1 + 0.3 * cosine[inside]), atol=0.03)
    # The wall is as thick as it says: along +z it ends at 8 + 2.6 mm, along -z at 8 + 1.4 mm.
    column = wall[wall.shape[0] // 2, wall.shape[1] // 2]
    above = offset[0, 0, :, 2] > 0
    assert column[above].sum() == pytest.approx(2.6, abs=0.15)
    assert column[~above].sum() == pytest.approx(1.4, abs=0.15)


def test_offset_wall_of_an_ellipsoid_has_constant_thickness() -> None:
    long = replace(sphere(6.0, 2.0), axes=np.array([9.0, 6.0, 5.0]))
    _, lumen, wall, _ = rasterize(long, SHAPE, (1, 1, 1))
    # Steiner: the volume within t of a convex body, with the ellipsoid's surface by Thomsen's approximation (1 %).
    p = 1.6075
    a, b, c = 9.0**p, 6.0**p, 5.0**p
    surface = 4 * np.pi * ((a * b + a * c + b * c) / 3) ** (1 / p)
    mean_radius = 6.55
    expected = surface * 2.0 + 4 * np.pi * mean_radius * 2.0**2 + volume_of_sphere(2.0)
    assert lumen.sum() == pytest.approx(4 / 3 * np.pi * 9 * 6 * 5, rel=0.005)
    assert wall.sum() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 2.0)])
def test_shell_is_closed_and_thickness_lies_on_the_wall(seed: int, spacing: tuple[float, ...]) -> None:
    case = make_phantom((40, 40, 24), spacing, seed=seed)
    lumen, wall = case.label == 1, case.label == 2
    assert lumen.any()
    assert not (ndimage.binary_dilation(lumen) & (case.label == 0)).any()
    filled = ndimage.binary_fill_holes(wall)
    assert filled[lumen].all()
    np.testing.assert_array_equal(case.thickness > 0, wall)
    assert case.thickness[wall].min() >= 0.7 - 1e-5
    assert case.thickness[wall].max() <= 4.0 + 1e-5


def test_bullae_do_not_overlap() -> None:
    for seed in range(4):
        case = make_phantom((48, 48, 48), seed=seed)
        bodies, count = ndimage.label(case.label > 0, structure=np.ones((3, 3, 3)))
        assert count == len(case.bullae)
        for body in range(1, count + 1):
            assert ndimage.label((case.label == 1) & (bodies == body))[1] == 1


def test_volume_and_intensities_agree_with_the_label() -> None:
    case = make_phantom(SHAPE, seed=1, domain=Domain(noise=0.0, blur=0.0))
    assert case.volume * 1000 == pytest.approx((case.label > 0).sum(), rel=0.05)
    deep = ndimage.binary_erosion(case.label == 1, iterations=2)
    np.testing.assert_array_equal(case.image[deep], -990)
    assert case.image[case.label == 2].mean() > -500
    assert np.median(case.image[case.label == 0]) == pytest.approx(-850, abs=40)


def test_partial_volume_dims_a_thin_wall() -> None:
    _, _, thin, _ = rasterize(sphere(9.0, 0.7), SHAPE, (1, 1, 1))
    _, _, thick, _ = rasterize(sphere(9.0, 3.0), SHAPE, (1, 1, 1))
    assert thin.max() < 0.95
    assert thick.max() == 1.0


def test_domain_shift_changes_the_image_and_not_the_truth() -> None:
    quiet, shifted = (make_phantom(SHAPE, seed=5, domain=domain) for domain in (LABELED_DOMAIN, SHIFTED_DOMAIN))
    lumen = ndimage.binary_erosion(quiet.label == 1, iterations=2)
    assert lumen.any()
    # -990 HU: contrast to the lung x 0.9, then the offset.
    assert shifted.image[lumen].mean() == pytest.approx(-850 - 140 * 0.9 - 25, abs=25)
    assert shifted.image[lumen].std() > 1.3 * quiet.image[lumen].std()


def test_data_set_on_disk(tmp_path: Path) -> None:
    path = generate_phantoms(
        tmp_path / "set", labeled=2, unlabeled=1, validation=2, shape=SHAPE, spacing=(1, 1, 1.5), seed=3, progress=False
    )
    datalist = json.loads(path.read_text())
    assert [len(datalist[section]) for section in ("training", "unlabeled", "validation")] == [2, 1, 2]
    assert datalist["labels"] == {"0": "background", "1": "lumen", "2": "wall"}
    assert datalist["modality"] == {"0": "CT"}
    (target,) = datalist["targets"]
    assert {**target, "scale": 1} == {
        "name": "thickness",
        "unit": "mm",
        "kind": "dense",
        "structure": 2,
        "missing": 0,
        "scale": 1,
        "inner": [1],
    }
    assert 0.7 <= target["scale"] <= 4
    assert [entry["domain"] for entry in datalist["validation"]] == ["labeled", "shifted"]
    assert set(datalist["unlabeled"][0]) == {"image", "domain"}
    written = {str(file.relative_to(path.parent)) for file in path.parent.rglob("*unlabeled*")}
    assert written == {datalist["unlabeled"][0]["image"]}
    for entry in datalist["training"] + datalist["validation"]:
        image, label, thickness = (nib.load(path.parent / entry[key]) for key in ("image", "label", "thickness"))
        assert [item.get_data_dtype() for item in (image, label, thickness)] == [np.int16, np.uint8, np.float32]
        for item in (image, label, thickness):
            assert item.shape == SHAPE
            np.testing.assert_allclose(item.header.get_zooms(), (1, 1, 1.5))
            np.testing.assert_allclose(item.affine, image.affine)
        np.testing.assert_array_equal(np.asarray(thickness.dataobj) > 0, np.asarray(label.dataobj) == 2)
        voxels = (np.asarray(label.dataobj) > 0).sum()
        assert entry["volume"] == pytest.approx(voxels * 1.5 / 1000, rel=0.1)


def test_same_seed_same_voxels_and_more_cases_change_none(tmp_path: Path) -> None:
    counts = [(1, 1, 0), (2, 1, 1)]
    for name, (labeled, unlabeled, validation) in zip("ab", counts, strict=True):
        generate_phantoms(tmp_path / name, labeled, unlabeled, validation, shape=SHAPE, seed=7, progress=False)
    generate_phantoms(tmp_path / "c", 1, 0, 0, shape=SHAPE, seed=8, progress=False)
    a = sorted((tmp_path / "a").rglob("*.nii.gz"))
    assert len(a) == 4
    for file in a:
        other = tmp_path / "b" / file.relative_to(tmp_path / "a")
        np.testing.assert_array_equal(np.asarray(nib.load(file).dataobj), np.asarray(nib.load(other).dataobj))
    first, second = (nib.load(tmp_path / name / "images/phantom_training_000.nii.gz") for name in "ac")
    assert (np.asarray(first.dataobj) != np.asarray(second.dataobj)).any()


def test_replaces_its_own_and_refuses_the_rest(tmp_path: Path) -> None:
    generate_phantoms(tmp_path, 2, 0, 0, shape=SHAPE, progress=False)
    generate_phantoms(tmp_path, 1, 0, 0, shape=SHAPE, progress=False)
    assert [file.name for file in (tmp_path / "images").iterdir()] == ["phantom_training_000.nii.gz"]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match=r"notes\.txt was not written by this command"):
        generate_phantoms(tmp_path, 1, 0, 0, shape=SHAPE, progress=False)
    assert (tmp_path / "images/phantom_training_000.nii.gz").exists()
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "datalist.json").write_text('{"name": "my patients"}')
    with pytest.raises(BadInput, match=r"datalist\.json"):
        generate_phantoms(tmp_path, 1, 0, 0, shape=SHAPE, progress=False)


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    hidden = f".{{}}.{'0' * 32}.tmp"
    (tmp_path / "images").mkdir()
    left = [
        tmp_path / "images" / hidden.format("phantom_training_000.nii.gz"),
        tmp_path / hidden.format("datalist.json"),
    ]
    for path in left:
        path.write_text("half")
    generate_phantoms(tmp_path, 1, 0, 0, shape=SHAPE, progress=False)
    assert not [path for path in left if path.exists()]
    (tmp_path / hidden.format("mine.json")).touch()
    with pytest.raises(BadInput, match="was not written by this command"):
        generate_phantoms(tmp_path, 1, 0, 0, shape=SHAPE, progress=False)


@pytest.mark.parametrize(("shape", "spacing"), [((6, 6, 6), (1, 1, 1)), ((32, 32), (1, 1)), ((32, 32, 32), (1, 1, 0))])
def test_impossible_volumes_are_refused(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    with pytest.raises(BadInput, match="shape"):
        make_phantom(shape, spacing)


def test_negative_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unlabeled"):
        generate_phantoms(tmp_path, 1, -1, 0, shape=SHAPE, progress=False)
