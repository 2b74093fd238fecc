from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_files import TARGETS, write

from common.data import case_keys, case_name, load_section, read_datalist
from common.data.inputs import find_cases
from common.errors import BadInput


def write_datalist(folder: Path, **content) -> Path:
    path = folder / "datalist.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/case.01.nii.gz", "case.01"),
        ("a/b.NII", "b"),
        ("b.nrrd", "b"),
        ("b.mha", "b"),
        ("series/ct-7", "ct-7"),
        (["m_0000.nii.gz", "m_0001.nii.gz"], "m"),
        (["t1.nii.gz", "t2.nii.gz"], "t1"),
        (["t1/p_0001.nii.gz", "t2/p_0001.nii.gz"], "p_0001"),
        (["a_0000.nii.gz", "b_0001.nii.gz"], "a_0000"),
        (["m_0000.nii.gz"], "m_0000"),
        ("m_0000.nii.gz", "m_0000"),
        ({"image": "x/y.mhd"}, "y"),
    ],
)
def test_case_name(path, name):
    assert case_name(path) == name


def test_case_keys():
    assert case_keys(TARGETS) == ["image", "label", "thickness", "volume"]
    assert case_keys(label=False) == ["image"]


def test_datalist_that_is_missing_or_broken(tmp_path):
    with pytest.raises(BadInput, match=r"none.json not found"):
        read_datalist(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{\n"training": [\n}')
    with pytest.raises(BadInput, match="line 3"):
        read_datalist(broken)
    broken.write_text("[]")
    with pytest.raises(BadInput, match="holds a list"):
        read_datalist(broken)
    for content in ("[" * 100_000, "9" * 5000, "\udcff"):
        broken.write_text(content, errors="surrogateescape")
        with pytest.raises(BadInput, match=r"broken\.json can't be read"):
            read_datalist(broken)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"test": []}, "none of the sections"),
        ({"training": {}}, "expected a list"),
        ({"training": [{"image": "a"}, {"label": "b"}]}, "entry 1 of `training` has no `image`"),
        ({"training": [3]}, "entry 0 of `training` is a int"),
        ({"training": [{"image": 3}]}, "`image` is 3"),
        ({"training": [{"image": "a", "annotated": 1}]}, "list of label ids"),
        ({"training": [], "labels": ["background"]}, "`labels` must map"),
    ],
)
def test_malformed_datalist(tmp_path, content, message):
    with pytest.raises(BadInput, match=message):
        read_datalist(write_datalist(tmp_path, **content))


def test_sections_have_absolute_paths_relative_to_the_datalist(tmp_path):
    image = write(tmp_path / "images/a.nii.gz")
    label = write(tmp_path / "labels/a.nii.gz")
    entry = {
        "image": "images/a.nii.gz",
        "label": "./labels/a.nii.gz",
        "volume": 2.0,
        "annotated": [0, 1],
        "patient": 7,
        "note": "x",
    }
    path = write_datalist(tmp_path, training=[entry], unlabeled=["images/a.nii.gz"])
    expected = {"image": image, "label": label, "annotated": [0, 1], "patient": 7}
    assert load_section(path, "training") == [expected]
    assert load_section(path, "training", optional=("volume", "thickness")) == [{**expected, "volume": 2.0}]
    assert load_section(path, "training", keys=("image", "label", "volume")) == [{**expected, "volume": 2.0}]
    assert load_section(read_datalist(path), "unlabeled") == [{"image": image}]


def test_cases_to_evaluate_are_told_apart_by_their_folders(tmp_path):
    """A label a structure makes two entries of one image, which stay one case; a training needs no names."""
    paths = [f"{patient}/ct.nii.gz" for patient in ("p1", "p2", "p2")] + ["p2/mr.nii.gz"]
    entries = [{"image": path, "label": path} for path in paths]
    for path in paths:
        write(tmp_path / path)
    path = write_datalist(tmp_path, training=entries, validation=entries, testing=entries)
    for section in ("validation", "testing"):
        loaded = load_section(path, section)
        assert [case_name(entry) for entry in loaded] == ["p1_ct", "p2_ct", "p2_ct", "mr"]
        assert "case_name" not in loaded[3]
    assert [set(entry) for entry in load_section(path, "training")] == [{"image", "label"}] * 4


def test_cases_to_evaluate_that_nothing_tells_apart(tmp_path):
    files = [write(tmp_path / name) for name in ("ct.nii.gz", "ct.nii")]
    path = write_datalist(tmp_path, testing=[{"image": file} for file in files])
    with pytest.raises(BadInput, match=r"ct\.nii\.gz and .*ct\.nii are both named 'ct'"):
        load_section(path, "testing", keys=["image"])
    assert len(load_section(path, "testing", keys=["image"], exist=False)) == 2, "a look at them is no evaluation"


def test_sections_that_lack_something(tmp_path):
    write(tmp_path / "a.nii.gz")
    path = write_datalist(tmp_path, training=[{"image": "a.nii.gz"}], unlabeled=[])
    with pytest.raises(BadInput, match=r"entry 0 of `training` \(a\) has no `label`"):
        load_section(path, "training")
    with pytest.raises(BadInput, match="teacher bundle"):
        load_section(path, "unlabeled")
    assert load_section(path, "unlabeled", required=False) == []
    assert load_section(path, "validation", required=False) == []
    with pytest.raises(BadInput, match="no section"):
        load_section(path, "train")


def test_all_absent_files_are_counted(tmp_path):
    path = write_datalist(tmp_path, unlabeled=[{"image": f"{index}.nii.gz"} for index in range(7)])
    with pytest.raises(BadInput, match=r"7 file\(s\).*0\.nii\.gz.*and 2 more"):
        load_section(path, "unlabeled")


def test_the_home_of_nobody(tmp_path):
    path = write_datalist(tmp_path, testing=[{"image": "~no-such-user/a.nii"}])
    with pytest.raises(BadInput, match=r"do not exist: .*~no-such-user/a\.nii"):
        load_section(path, "testing", keys=["image"])
    with pytest.raises(BadInput, match="does not exist"):
        find_cases("~no-such-user/a.nii")


# Slices lie at 30, 32.5, ... mm; slice i has the file name 7 * i % 31.
