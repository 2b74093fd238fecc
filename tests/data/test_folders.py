"""A datalist from folders."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from common.__main__ import main
from common.data.datalist import load_section, read_datalist
from common.data.folders import group_channels, make_datalist, patient_of
from common.errors import BadInput


def write(path: Path, ids: tuple[int, ...] = (0, 1)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.resize(np.array(ids, np.uint8), (4, 4, 4))
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five patients of two frames; those of the last have no labels, and one frame of the first has none."""
    for patient in range(1, 6):
        for frame in (1, 2):
            name = f"patient{patient:03d}_frame{frame:02d}"
            write(tmp_path / "images" / f"{name}.nii.gz")
            if patient < 5 and (patient, frame) != (1, 2):
                write(tmp_path / "labels" / f"{name}_seg.nii.gz", (0, 1, 2))
                write(tmp_path / "maps" / f"{name}.nii.gz")
    return tmp_path


@pytest.mark.parametrize(
    ("case", "patient"),
    [
        ("patient001_frame01", "patient001"),
        ("sub-07_ses-2_T1w", "sub-07"),
        ("hippocampus_001", "hippocampus_001"),
        ("liver_12_followup", "liver_12"),
        ("scan", "scan"),
        ("pat-001-pre", "pat-001"),
        ("sub-01_ses-2_T1w", "sub-01"),
        ("case-1", "case-1"),
        ("site-a_12-pre", "site-a_12"),
    ],
)
def test_patient_in_a_name(case: str, patient: str) -> None:
    assert patient_of(case) == patient


def test_patient_by_a_pattern() -> None:
    assert patient_of("2024-01-02_ABC_7", r"_([A-Z]+)_") == "ABC"
    with pytest.raises(BadInput, match="does not fit"):
        patient_of("scan", r"\d+")
    with pytest.raises(BadInput, match="regular expression"):
        patient_of("scan", "(")


def test_no_patient_is_on_both_sides(folder: Path) -> None:
    found = set()
    for seed in range(8):
        content = make_datalist(folder / "images", folder / "labels", validation=0.25, seed=seed)
        held_out = {entry["patient"] for entry in content["validation"]}
        assert len(held_out) == 1
        found |= held_out
        for section in ("training", "unlabeled"):
            assert not held_out & {entry["patient"] for entry in content[section]}
        assert all("label" not in entry for entry in content["unlabeled"])
        count = sum(len(content[section]) for section in ("training", "validation", "unlabeled"))
        assert count + len(content.get("left_out", [])) == 10
        assert bool(content.get("left_out")) == (held_out == {"patient001"})
    assert len(found) > 1, "another seed draws other patients"


def test_labels_and_maps_go_with_their_images(folder: Path) -> None:
    content = make_datalist(
        folder / "images", folder / "labels", {"thickness": folder / "maps"}, names={1: "lumen", 2: "wall"}
    )
    assert content["labels"] == {"0": "background", "1": "lumen", "2": "wall"}
    assert [target["name"] for target in content["targets"]] == ["thickness"]
    for entry in content["training"]:
        name = Path(entry["image"]).name.removesuffix(".nii.gz")
        assert Path(entry["label"]).name == f"{name}_seg.nii.gz"
        assert Path(entry["thickness"]).name == f"{name}.nii.gz"


def test_nnunet_raw_layout(tmp_path: Path) -> None:
    for case in ("a_1", "b_2", "c_3"):
        for channel in range(2):
            write(tmp_path / "imagesTr" / f"{case}_{channel:04d}.nii.gz")
        if case != "c_3":
            write(tmp_path / "labelsTr" / f"{case}.nii.gz")
    description = {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "tumour": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    content = make_datalist(tmp_path, validation=0.5)
    assert content["labels"] == {"0": "background", "1": "tumour"}
    assert content["modality"] == {"0": "T1", "1": "T2"}
    assert len(content["training"]) == len(content["validation"]) == len(content["unlabeled"]) == 1
    assert [Path(path).name for path in content["unlabeled"][0]["image"]] == ["c_3_0000.nii.gz", "c_3_0001.nii.gz"]


def nnunet(folder: Path, labels: dict[str, object]) -> Path:
    for case in ("a_1", "b_2"):
        write(folder / "imagesTr" / f"{case}_0000.nii.gz")
        write(folder / "labelsTr" / f"{case}.nii.gz", (0, 1, 2))
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": labels}))
    return folder


@pytest.mark.parametrize("names", [None, {1: "tumour"}])
def test_nnunet_s_ignore_label_is_refused(tmp_path: Path, names: dict[int, str] | None) -> None:
    folder = nnunet(tmp_path, {"background": 0, "tumour": 1, "ignore": 2})
    with pytest.raises(BadInput, match=r"dataset\.json: the label 2 is `ignore`.*nobody labelled.*take `ignore` out"):
        make_datalist(folder, names=names)


def test_nnunet_s_regions_are_of_no_account_where_labels_are_named(tmp_path: Path) -> None:
    folder = nnunet(tmp_path, {"background": 0, "whole": [1, 2], "core": 2})
    with pytest.raises(BadInput, match=r"\['whole'\] are regions.*--names"):
        make_datalist(folder)
    labels = make_datalist(folder, names={1: "edema", 2: "core"})["labels"]
    assert labels == {"0": "background", "1": "edema", "2": "core"}


def test_nnunet_s_test_images_are_left_alone_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nnunet(tmp_path, {"background": 0, "tumour": 1, "core": 2})
    arguments = ["datalist", "--images", str(folder), "--output"]
    assert main([*arguments, f"{folder}/a.json"]) == 0
    assert "not used" not in capsys.readouterr().out
    (folder / "imagesTs").mkdir()
    assert main([*arguments, f"{folder}/b.json"]) == 0
    assert "not used" not in capsys.readouterr().out
    for name in ("c_0000", "c_0001", "d_0000", "d_0001"):
        write(folder / "imagesTs" / f"{name}.nii.gz")
    assert main([*arguments, f"{folder}/c.json"]) == 0
    assert f"not used: 2 test images in {folder}/imagesTs; to train on them" in capsys.readouterr().out
    assert "imagesTs" not in (folder / "c.json").read_text()
    assert "test_images" not in (folder / "c.json").read_text()


def test_names_that_are_ambiguous() -> None:
    with pytest.raises(BadInput, match="same name"):
        group_channels(["x/a.nii.gz", "x/a.mha"])
    with pytest.raises(BadInput, match="channels"):
        group_channels(["a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz"])
    with pytest.raises(BadInput, match="_0000, _0001, _0004: these are no channels"):
        group_channels([f"amos_000{number}.nii.gz" for number in (0, 1, 4)])
    numbered = ["amos_0001.nii.gz", "amos_0004.nii.gz", "btcv_0001.nii.gz"]
    assert list(group_channels(numbered).values()) == numbered, "no channel 0: the numbers are the cases'"
    assert group_channels(["a_0000.nii.gz", "b.nii.gz"]) == {"a_0000": "a_0000.nii.gz", "b": "b.nii.gz"}


def test_cases_that_are_numbered_from_0_are_told_by_their_labels(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "images" / f"patient_000{number}.nii.gz")
        write(tmp_path / "labels" / f"patient_000{number}_seg.nii.gz")
    content = make_datalist(tmp_path / "images", tmp_path / "labels", validation=0)
    assert [Path(case["image"]).name for case in content["training"]] == [f"patient_000{n}.nii.gz" for n in range(3)]


def test_bad_folders(folder: Path) -> None:
    other = write(folder / "other" / "stranger.nii.gz").parent
    with pytest.raises(BadInput, match="stranger"):
        make_datalist(folder / "images", other)
    write(folder / "labels" / "patient002_frame01.nii.gz")
    with pytest.raises(BadInput, match="patient002_frame01_seg"):
        make_datalist(folder / "images", folder / "labels")
    write(folder / "gap" / "patient001_frame01.nii.gz", (0, 3))
    with pytest.raises(BadInput, match=r"\[0, 3\]"):
        make_datalist(folder / "images", folder / "gap", validation=0)
    with pytest.raises(BadInput, match="one patient"):
        make_datalist(folder / "images", folder / "gap")


def test_command_writes_a_datalist_that_is_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "datalist.json"
    arguments = ["datalist", "--images", f"{folder}/images", "--labels", f"{folder}/labels", "--output", str(output)]
    arguments += ["--names", "1=lumen", "2=wall", "--modality", "CT", "--targets", f"{folder}/maps"]
    write(folder / "labels" / "stranger_seg.nii.gz")
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "training: " in printed
    assert "is of patient00" in printed
    assert "warning: 1 labels or maps are of no image, such as" in printed
    assert "stranger_seg.nii.gz" in printed
    assert "count as two patients" not in printed
    content = read_datalist(output)
    assert content["training"][0]["image"].startswith("images/"), "relative, so that the folder can be moved"
    assert load_section(output, "unlabeled")
    assert content["targets"][0]["name"] == "maps"
    assert main(arguments) == 1, "nothing is overwritten"
    assert "exists already" in capsys.readouterr().err


def test_names_that_may_be_of_one_patient_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for case in ("mueller_t1", "mueller_t2", "schmidt_t1", "schmidt_t2", "weber_t1", "weber_t2"):
        write(tmp_path / "images" / f"{case}.nii.gz")
        write(tmp_path / "labels" / f"{case}.nii.gz")
    arguments = ["datalist", "--images", f"{tmp_path}/images", "--labels", f"{tmp_path}/labels"]
    arguments += ["--validation", "0.17", "--output"]
    assert main([*arguments, f"{tmp_path}/a.json"]) == 0
    assert "count as two patients" in capsys.readouterr().out
    assert main([*arguments, f"{tmp_path}/b.json", "--patient", "^[^_]+"]) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("separator", "-_")
def test_names_with_hyphens(tmp_path: Path, capsys: pytest.CaptureFixture[str], separator: str) -> None:
    """One patient isn't on both sides where names have numbers, and is warned of where they have none."""
    for case in ("anna", "berta", "carla", "dora"):
        for scan in ("pre", "post"):
            for kind in ("images", "labels"):
                number = separator.join(("pat", f"00{'abcd'.index(case[0])}", scan))
                write(tmp_path / "numbers" / kind / f"{number}.nii.gz")
                write(tmp_path / "words" / kind / f"{separator.join(('pat', case, scan))}.nii.gz")
    for seed in range(4):
        numbers = make_datalist(tmp_path / "numbers/images", tmp_path / "numbers/labels", seed=seed)
        held_out = {entry["patient"] for entry in numbers["validation"]}
        assert len(numbers["validation"]) == 2
        assert len(held_out) == 1
        assert not held_out & {entry["patient"] for entry in numbers["training"]}
    for name, warned in (("numbers", False), ("words", True)):
        folder = tmp_path / name
        arguments = ["datalist", "--images", f"{folder}/images", "--labels", f"{folder}/labels"]
        arguments += ["--validation", "0.1", "--output"]
        assert main([*arguments, f"{folder}/a.json"]) == 0
        printed = capsys.readouterr().out
        assert ("count as two patients" in printed) == warned
        assert ("--patient '^(.+)[_-]'" in printed) == warned
        assert main([*arguments, f"{folder}/b.json", "--patient", "^(.+)[_-]"]) == 0
        assert "warning" not in capsys.readouterr().out


def test_dicom_series_are_of_the_patient_in_their_header(tmp_path: Path) -> None:
    dicom_series = pytest.importorskip("dicom_series", exc_type=ImportError)
    for name, number in (("first/ct1", "4711"), ("first/ct2", "4711"), ("second/ct3", "0815"), ("third/ct4", "")):
        dicom_series.write_series(
            tmp_path / name,
            np.zeros((2, 4, 5), np.int16),
            [1, 0, 0, 0, 1, 0],
            change=lambda source, _, number=number: setattr(source, "PatientID", number),
        )
    entries = make_datalist(tmp_path)["unlabeled"]
    patients = {Path(entry["image"]).name: entry["patient"] for entry in entries}
    assert patients["ct1"] == patients["ct2"] != patients["ct3"]
    assert patients["ct4"] == "ct4"
    assert not any(number in str(entries) for number in ("4711", "0815")), "a datalist tells nobody who they are"
