"""What a training is given of MONAI Label's studies folder."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.data.studies import MeasuredDataset, studies_folder, unlabeled_cases, with_maps

THICKNESS = {"name": "thickness", "unit": "mm", "structure": 2, "missing": 0, "inner": [1]}


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return path


def shell(wall: int) -> np.ndarray:
    """A cube of cavity, label 1, in a wall of ``wall`` voxels, label 2."""
    label = np.zeros((12, 12, 12), dtype=np.uint8)
    label[5 - wall : 7 + wall, 5 - wall : 7 + wall, 5 - wall : 7 + wall] = 2
    label[5:7, 5:7, 5:7] = 1
    return label


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """Two labelled images, one of them with letters that are not ASCII, and two without a label."""
    folder = tmp_path / "studies"
    for name in ("Fall 3.5 Ünal", "b", "c", "d"):
        save(folder / f"{name}.nii.gz", np.zeros((12, 12, 12), dtype=np.float32))
    for name in ("Fall 3.5 Ünal", "b"):
        save(folder / "labels" / "final" / f"{name}.nii.gz", shell(1))
    (folder / "datastore_v2.json").write_text("{}")
    return folder


def entries(folder: Path, *names: str) -> list[dict[str, str]]:
    return [
        {"image": str(folder / f"{name}.nii.gz"), "label": str(folder / "labels" / "final" / f"{name}.nii.gz")}
        for name in names
    ]


def names(cases: list[dict[str, str]]) -> list[str]:
    return [Path(case["image"]).name for case in cases]


def test_the_images_without_a_label(studies: Path) -> None:
    labeled = entries(studies, "Fall 3.5 Ünal")  # the other labelled one is kept for the validation
    assert names(unlabeled_cases("no datalist", labeled)) == ["c.nii.gz", "d.nii.gz"]


def test_an_image_may_be_a_link(studies: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "archive" / "0815.nii.gz"
    elsewhere.parent.mkdir()
    (studies / "b.nii.gz").rename(elsewhere)
    (studies / "b.nii.gz").symlink_to(elsewhere)
    labeled = [{"image": str(elsewhere), "label": str(studies / "labels" / "final" / "b.nii.gz")}]
    assert names(unlabeled_cases("no datalist", labeled)) == ["c.nii.gz", "d.nii.gz"]


def test_an_image_that_cannot_be_read_is_left_out(studies: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = save(studies / "e.nii.gz", np.random.default_rng(0).normal(size=(12, 12, 12)).astype(np.float32))
    whole.write_bytes(whole.read_bytes()[:3000])
    save(studies / "f.nii.gz", np.full((12, 12, 12), np.nan, dtype=np.float32))
    save(studies / "g.nii.gz", np.zeros((12, 12, 12, 2), dtype=np.float32))
    (studies / "h.dcm").write_bytes(bytes(128) + b"DICM")
    with caplog.at_level(logging.WARNING):
        assert names(unlabeled_cases("no datalist", entries(studies, "b"))) == ["c.nii.gz", "d.nii.gz"]
    for name, reason in (("e.nii.gz", "left out"), ("f.nii.gz", "NaN"), ("g.nii.gz", "2 channel"), ("h.dcm", "DICOM")):
        assert any(name in line and reason in line for line in caplog.messages)


def test_when_all_are_labelled_they_are_learnt_from_without_their_labels(studies: Path) -> None:
    (studies / "c.nii.gz").unlink()
    (studies / "d.nii.gz").unlink()
    labeled = entries(studies, "b")
    assert unlabeled_cases("no datalist", labeled) == [{"image": labeled[0]["image"]}]


def test_entries_of_a_datalist_have_its_unlabelled_section(tmp_path: Path) -> None:
    image, label, other = (save(tmp_path / f"{name}.nii.gz", shell(1)) for name in ("image", "label", "other"))
    datalist = tmp_path / "datalist.json"
    datalist.write_text(
        json.dumps({"training": [{"image": "image.nii.gz", "label": "label.nii.gz"}], "unlabeled": ["other.nii.gz"]})
    )
    labeled = [{"image": str(image), "label": str(label)}]
    assert studies_folder(labeled) is None
    assert unlabeled_cases(str(datalist), labeled) == [{"image": str(other)}]
    assert with_maps(labeled, [THICKNESS], tmp_path) == labeled


def test_a_map_is_the_one_given_or_measured_in_the_label(studies: Path, tmp_path: Path) -> None:
    given = save(studies / "labels" / "thickness_final" / "b.nii.gz", shell(1).astype(np.float32))
    measured, taken = with_maps(entries(studies, "Fall 3.5 Ünal", "b"), [THICKNESS], tmp_path / "eval")
    assert taken["thickness"] == str(given)
    thickness = np.asarray(nib.load(measured["thickness"]).dataobj)
    assert thickness[4, 5, 5] == pytest.approx(1.0)  # a wall of one voxel
    assert thickness[5, 5, 5] == 0.0
    assert (thickness > 0).sum() == (shell(1) == 2).sum()


def test_a_map_is_measured_again_when_its_label_changes(studies: Path, tmp_path: Path) -> None:
    labeled = entries(studies, "b")
    first = Path(with_maps(labeled, [THICKNESS], tmp_path)[0]["thickness"])
    before = first.stat().st_mtime_ns
    assert with_maps(labeled, [THICKNESS], tmp_path)[0]["thickness"] == str(first)
    assert first.stat().st_mtime_ns == before
    # However old: it may be another rater's, of the same case.
    save(Path(labeled[0]["label"]), shell(2))
    os.utime(labeled[0]["label"], ns=(before - 10**9,) * 2)
    second = Path(with_maps(labeled, [THICKNESS], tmp_path)[0]["thickness"])
    assert np.asarray(nib.load(second).dataobj)[4, 5, 5] == pytest.approx(2.0)
    assert np.asarray(nib.load(first).dataobj)[4, 5, 5] == pytest.approx(1.0)


def test_a_map_is_measured_again_when_it_is_measured_in_another_way(studies: Path, tmp_path: Path) -> None:
    labeled = entries(studies, "b")
    ways = [THICKNESS, {**THICKNESS, "slicewise": True}, {**THICKNESS, "smallest_cavity": 100}]
    maps = [np.asarray(nib.load(with_maps(labeled, [way], tmp_path)[0]["thickness"]).dataobj) for way in ways]
    assert (maps[0] > 0).any()
    assert not np.array_equal(maps[0], maps[1])
    assert not (maps[2] > 0).any(), "no cavity is that large"


def test_a_target_that_nothing_says_how_to_measure_gets_no_map(studies: Path, tmp_path: Path) -> None:
    target = {key: value for key, value in THICKNESS.items() if key != "inner"}
    assert "thickness" not in with_maps(entries(studies, "b"), [target], tmp_path)[0]


def test_the_data_set_loads_completed_entries(studies: Path, tmp_path: Path) -> None:
    dataset = MeasuredDataset(
        entries(studies, "b"), [THICKNESS], str(tmp_path), transform=lambda case: sorted(case), progress=False
    )
    assert dataset[0] == ["image", "label", "thickness"]
