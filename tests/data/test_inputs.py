"""What `--input` stands for."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from ignite.engine import Engine
from monai.data import decollate_batch, list_data_collate

from common.data import case_name, check_output, find_cases
from common.data.folders import make_datalist
from common.errors import BadInput
from common.handlers import CaseJsonWriter
from common.handlers.cases import case_file
from common.transforms.loading import LoadCased
from common.transforms.saving import SaveNiftid


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def dicom(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM")


def names(cases: list[dict[str, str | list[str]]]) -> list[str | list[str]]:
    images = [case["image"] for case in cases]
    return [Path(image).name if isinstance(image, str) else [Path(path).name for path in image] for image in images]


def test_a_file_a_folder_and_dicom(tmp_path: Path) -> None:
    touch(
        tmp_path / "scans/ä b.nii.gz", tmp_path / "scans/c.MHA", tmp_path / "scans/notes.txt", tmp_path / "scans/.x.nii"
    )
    dicom(tmp_path / "scans/series/IM0001")
    touch(tmp_path / "scans/empty/readme.txt")
    assert names(find_cases(tmp_path / "scans")) == ["c.MHA", "series", "ä b.nii.gz"]
    assert find_cases(str(tmp_path / "scans/ä b.nii.gz")) == [{"image": str(tmp_path / "scans/ä b.nii.gz")}]
    assert find_cases(tmp_path / "scans/series") == [{"image": str(tmp_path / "scans/series")}]


def test_nested_series_as_archives_export_them(tmp_path: Path) -> None:
    for name in (
        "p1/study/series 1/IM1",
        "p1/study/series 2/IM1",
        "p2/study/1.2.3/IM1",
        ".cache/x/IM1",
        "out/p1_seg.dcm",
    ):
        dicom(tmp_path / name)
    dicom(tmp_path / "DICOMDIR")  # the index of an archive's export
    (tmp_path / "p2/loop").symlink_to(tmp_path)
    assert names(find_cases(tmp_path, output_dir=tmp_path / "out")) == ["series 1", "series 2", "1.2.3"]
    cases = find_cases(tmp_path, output_dir=tmp_path / "out")
    assert [case_name(case) for case in cases] == ["series 1", "series 2", "1.2.3"]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ("p1/study/SE1 p2/study/SE1 p2/study/SE2", "p1_SE1 p2_SE1 SE2"),
        ("p1/a/SE1 p1/b/SE1", "a_SE1 b_SE1"),
        ("p1/a/SE1 p1/b/SE1 p2/a/SE1", "p1_a_SE1 p1_b_SE1 p2_a_SE1"),
        ("a_SE1 p1/a/SE1 p1/b/SE1", "a_SE1 p1_a_SE1 p1_b_SE1"),
        ("p/SE1 p1/study/SE1", "p_SE1 study_SE1"),
        ("a/x/S a/y/S a/x/x_S a/y/x_S", "x_S"),
    ],
)
def test_cases_of_one_name_get_their_folders_in_front(tmp_path: Path, folders: str, expected: str) -> None:
    for folder in folders.split():
        dicom(tmp_path / folder / "IM1")
    cases = find_cases(tmp_path)
    called = [case_name(case) for case in cases]
    assert [str(Path(case["image"]).relative_to(tmp_path)) for case in cases] == sorted(folders.split())
    assert len(set(called)) == len(cases)
    if len(expected.split()) > 1:
        assert called == expected.split()


def test_a_name_with_folders_in_front_is_that_of_the_files(tmp_path: Path) -> None:
    entries = []
    for patient in ("p1", "p2"):
        (tmp_path / patient).mkdir()
        nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), tmp_path / patient / "ct.nii.gz")
        entries.append({"image": f"{patient}/ct.nii.gz"})
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"testing": entries}))
    loaded = [decollate_batch(list_data_collate([LoadCased(["image"])(case)]))[0] for case in find_cases(path)]
    for case in loaded:
        SaveNiftid("image", tmp_path / "out", "seg", "uint8")(case)
        engine = Engine(lambda *_: None)
        engine.state.output, engine.state.batch = {"image": case["image"], "result": {}}, None
        CaseJsonWriter(tmp_path / "out")(engine)
    expected = ["p1_ct.json", "p1_ct_seg.nii.gz", "p2_ct.json", "p2_ct_seg.nii.gz"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == expected
    assert [case_file(case) for case in loaded] == [str(tmp_path / entry["image"]) for entry in entries]


@pytest.mark.parametrize("volume", ["a.nii.gz", "zz.mha", "deeper/series/IM1"])
def test_a_dicom_file_among_other_images(tmp_path: Path, volume: str) -> None:
    (dicom if volume.endswith("IM1") else touch)(tmp_path / volume)
    touch(*(tmp_path / f"note {index}.txt" for index in range(30)))
    dicom(tmp_path / "stray.dcm")
    volume = volume.removesuffix("/IM1")
    good, stray = find_cases(tmp_path)
    assert good == {"image": str(tmp_path / volume)}
    assert stray["image"] == str(tmp_path / "stray.dcm")
    with pytest.raises(BadInput, match=rf"holds stray\.dcm, which is DICOM, and {volume}, which is an image of its"):
        LoadCased(["image"])(stray)
    with pytest.raises(BadInput, match=r"holds stray\.dcm"):
        make_datalist(tmp_path)
    (tmp_path / "stray.dcm").unlink()
    assert find_cases(tmp_path) == [good]
    dicom(tmp_path / "alone/stray.dcm")
    touch(*(tmp_path / f"alone/note {index}.txt" for index in range(30)))
    assert names(find_cases(tmp_path / "alone")) == ["alone"], "a slice behind many other files"


def test_a_series_among_other_images(tmp_path: Path) -> None:
    """Nobody knows which of them is the scan; that one patient's folder is untidy does not stop the others."""
    touch(tmp_path / "p1/mask.nii.gz")
    for name in ("p1/IM1", "p1/IM2", "p2/IM1", "p3/IM1", "p3/IM2", "p3/deeper/IM1", "p3/deeper/IM2"):
        dicom(tmp_path / name)
    *cases, first, second = find_cases(tmp_path)
    assert names(cases) == ["p2", "deeper"]
    assert [first["image"], second["image"]] == [str(tmp_path / "p1"), str(tmp_path / "p3")]
    assert "p1 holds IM1, which is DICOM, and mask.nii.gz" in first["fault"]
    touch(tmp_path / "p3/deeper/mask.nii.gz")
    assert [case["image"] for case in find_cases(tmp_path) if "fault" in case] == [
        str(tmp_path / name) for name in ("p1", "p3", "p3/deeper")
    ]
    volume, folder = find_cases(tmp_path / "p1")
    assert (volume["image"], folder["image"]) == (str(tmp_path / "p1/mask.nii.gz"), str(tmp_path / "p1"))
    with pytest.raises(BadInput, match=r"^images: .*p1 holds IM1"):
        make_datalist(tmp_path)


def test_what_fails_takes_no_one_s_name(tmp_path: Path) -> None:
    touch(tmp_path / "a.nii.gz")
    dicom(tmp_path / "a.dcm")
    good, stray = find_cases(tmp_path)
    assert (case_name(good), case_name(stray)) == ("a", "a")


def test_files_that_are_channels(tmp_path: Path) -> None:
    touch(*(tmp_path / f"{case}_{channel:04d}.nii.gz" for case in "ab" for channel in (1, 0)))
    assert names(find_cases(tmp_path, channels=2)) == [
        ["a_0000.nii.gz", "a_0001.nii.gz"],
        ["b_0000.nii.gz", "b_0001.nii.gz"],
    ]
    assert [case_name(case) for case in find_cases(tmp_path, channels=2)] == ["a", "b"]
    cases = find_cases(tmp_path)
    assert len(cases) == 4, "a network of one channel takes each file for an image"
    assert [case_name(case) for case in cases] == ["a_0000", "a_0001", "b_0000", "b_0001"]
    touch(tmp_path / "c_0000.nii.gz")
    with pytest.raises(BadInput, match="case c has the channels"):
        find_cases(tmp_path, channels=2)


def test_files_with_a_channel_axis_are_left_alone(tmp_path: Path) -> None:
    touch(tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    assert names(find_cases(tmp_path, channels=2)) == ["a.nii.gz", "b.nii.gz"]


def test_a_datalist_s_testing_section(tmp_path: Path) -> None:
    touch(tmp_path / "t1.nii.gz", tmp_path / "t2.nii.gz")
    entry = {"image": ["t1.nii.gz", "t2.nii.gz"], "patient": "p"}
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"testing": [entry]}))
    assert find_cases(path, channels=2) == [{"image": [str(tmp_path / "t1.nii.gz"), str(tmp_path / "t2.nii.gz")]}]
    path.write_text(json.dumps({"training": [entry]}))
    with pytest.raises(BadInput, match="no entries in `testing`"):
        find_cases(path)


@pytest.mark.parametrize("channels", [1, 2])
def test_two_inputs_whose_results_would_have_one_name(tmp_path: Path, channels: int) -> None:
    touch(tmp_path / "a.nii.gz", tmp_path / "a.nrrd")
    with pytest.raises(BadInput, match=r"(?s)a\.nii\.gz.*a\.nrrd|a\.nrrd.*a\.nii\.gz"):
        find_cases(tmp_path, channels)
    dicom(tmp_path / "folder/b/1.dcm")
    touch(tmp_path / "folder/b.nii")
    with pytest.raises(BadInput, match=r"both named 'b'|same name"):
        find_cases(tmp_path / "folder", channels)


def test_results_do_not_go_among_the_inputs(tmp_path: Path) -> None:
    touch(tmp_path / "scans/a.nii.gz", tmp_path / "scans/a_seg.nii.gz")
    with pytest.raises(BadInput, match=r"output_dir: .*scans is the input's own folder"):
        find_cases(tmp_path / "scans", output_dir=tmp_path / "scans/../scans")
    assert len(find_cases(tmp_path / "scans", output_dir=tmp_path / "scans/results")) == 2
    # Beside a single image, or those of a datalist, lie labels and descriptions of scans as well.
    datalist = tmp_path / "datalist.json"
    datalist.write_text(json.dumps({"testing": [{"image": "scans/a.nii.gz"}]}))
    for source in (tmp_path / "scans/a.nii.gz", datalist):
        with pytest.raises(BadInput, match=r"output_dir: .*scans is the folder of .*a\.nii\.gz"):
            find_cases(source, output_dir=tmp_path / "scans")
        assert len(find_cases(source, output_dir=tmp_path)) == 1
    # A link lies in a folder of its own.
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort/b.nii.gz").symlink_to(tmp_path / "scans/a.nii.gz")
    for folder in ("cohort", "scans"):
        with pytest.raises(BadInput, match=r"output_dir: .* is the folder of .*b\.nii\.gz"):
            find_cases(tmp_path / "cohort/b.nii.gz", output_dir=tmp_path / folder)
    dicom(tmp_path / "series/1.dcm")
    datalist.write_text(json.dumps({"testing": [{"image": "series"}]}))
    with pytest.raises(BadInput, match=r"output_dir: .*series is the folder of"):
        find_cases(datalist, output_dir=tmp_path / "series")


def test_names_that_the_command_line_takes_for_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path / "4711/a.nii.gz", tmp_path / "1.10/b.nii.gz")
    monkeypatch.chdir(tmp_path)
    assert find_cases(4711) == [{"image": "4711/a.nii.gz"}]
    assert find_cases("./1.10") == [{"image": "1.10/b.nii.gz"}]
    for value in (1.1, True, ("a", "b")):
        with pytest.raises(BadInput, match=r"input: found .*, expected a path.*write \./ in front"):
            find_cases(value)
    for value in (2024, 1.1):
        with pytest.raises(BadInput, match=rf"output_dir: found {value}, expected a path.*as in \./2024"):
            check_output(value)
    assert not (tmp_path / "2024").exists()
    assert check_output("./2024").is_dir()


def test_what_can_t_be_used(tmp_path: Path) -> None:
    touch(tmp_path / "scan.txt", tmp_path / "empty/notes.txt", tmp_path / "pictures/a.png")
    dicom(tmp_path / "slice.dcm")
    for source, words in (
        (None, "--input"),
        (tmp_path / "absent.nii.gz", "absent.nii.gz does not exist"),
        (tmp_path / "scan.txt", r"scan\.txt is no image that can be read: expected \.nii"),
        (tmp_path / "slice.dcm", "one slice of a DICOM series; give its folder"),
        (tmp_path / "empty", "empty holds no volume"),
        (tmp_path / "pictures", r"pictures holds no volume .* a\.png is a picture, which doesn't tell the size"),
        (tmp_path / "pictures/a.png", r"a\.png is a picture, which doesn't tell the size of its pixels"),
    ):
        with pytest.raises(BadInput, match=words):
            find_cases(source)
