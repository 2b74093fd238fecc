from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.data.phantom_set import generate_phantoms
from common.errors import BadInput

SHAPE = (32, 32, 32)


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


def test_negative_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="unlabeled"):
        generate_phantoms(tmp_path, 1, -1, 0, shape=SHAPE, progress=False)
