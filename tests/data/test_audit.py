"""What an audit finds; most of it is read in this process, which spares the start of others."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import itk
import nibabel
import numpy as np
import pytest

from common.__main__ import main
from common.data.audit import audit
from common.data.audited_case import voxel_digests
from common.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]
LABELS = {"0": "background", "1": "lumen", "2": "wall"}
TARGETS = [
    {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2},
    {"name": "volume", "unit": "mL", "kind": "sum"},
]
SPACING = np.diag([1.0, 2.0, 3.0, 1.0])
SHAPE = (8, 7, 6)


class DataSet:
    """A small sound CT data set; tests break it, file by file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.random = np.random.default_rng(0)
        self.content: dict[str, Any] = {"modality": {"0": "CT"}, "labels": LABELS, "targets": TARGETS}
        self.content["training"] = [self.case(name, "p1", volume=0.5) for name in ("a", "b")]
        self.content["unlabeled"] = [{"image": self.write("u.nii.gz", self.image()), "patient": "p2"}]
        self.content["validation"] = [self.case("v", "p3")]
        self.content["testing"] = [self.case("t", "p4")]

    def image(self) -> np.ndarray:
        return self.random.integers(-1000, 1000, SHAPE).astype(np.int16)

    def label(self) -> np.ndarray:
        return self.random.integers(0, 3, SHAPE).astype(np.uint8)

    def write(self, name: str, array: np.ndarray, affine: np.ndarray = SPACING) -> str:
        nibabel.save(nibabel.Nifti1Image(array, affine), self.folder / name)
        return name

    def case(self, name: str, patient: str, **more: Any) -> dict[str, Any]:
        label = self.label()
        maps = {
            "image": self.write(f"{name}.nii.gz", self.image()),
            "label": self.write(f"{name}_label.nii.gz", label),
            "thickness": self.write(f"{name}_thickness.nii.gz", np.where(label == 2, 2.5, 0).astype(np.float32)),
        }
        return {**maps, "patient": patient, **more}

    def path(self) -> Path:
        path = self.folder / "datalist.json"
        path.write_text(json.dumps(self.content))
        return path

    def found(self) -> list[tuple[str, str, str]]:
        """Severity, kind and file of what an audit finds."""
        return [(finding.severity, finding.kind, finding.file) for finding in audit(self.path(), jobs=0).findings]


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    return DataSet(tmp_path)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_a_sound_data_set_is_read_whole_and_left_as_it_is(data: DataSet) -> None:
    path = data.path()
    before = digests(data.folder)
    report = audit(path, jobs=0)
    assert report.findings == []
    assert (report.cases, report.files) == (5, 13)
    assert digests(data.folder) == before


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:-size])


def flip(path: Path) -> None:
    """Change a byte of the checksum, as good as changing one of the data: readers of images look at neither."""
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_text("no image"), "unreadable"),
        (lambda path: cut(path, 60), "truncated"),
        (lambda path: cut(path, 2), "truncated"),
        (flip, "unreadable"),
        (lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-50])), "truncated"),
    ],
    ids=["missing", "empty", "text", "cut", "cut in the checksum", "flipped", "cut before it was compressed"],
)
@pytest.mark.parametrize("name", ["b.nii.gz", "b_label.nii.gz", "b_thickness.nii.gz", "u.nii.gz"])
def test_files_that_can_not_be_read(data: DataSet, spoil: Any, kind: str, name: str) -> None:
    spoil(data.folder / name)
    assert data.found() == [("error", kind, name)]


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_metaimage_files(data: DataSet, compressed: bool) -> None:
    path = data.folder / "u.mha"
    data.content["unlabeled"] = [{"image": "u.mha"}]
    itk.imwrite(itk.image_from_array(data.image()), str(path), compression=compressed)
    assert data.found() == []
    whole = path.read_bytes()
    cut(path, 40)
    assert data.found() == [("error", "truncated" if compressed else "unreadable", "u.mha")]
    if compressed:
        damaged = bytearray(whole)
        damaged[-100] ^= 0x10
        path.write_bytes(damaged)
        assert data.found() == [("error", "unreadable", "u.mha")]


def test_voxels_that_say_nothing(data: DataSet) -> None:
    broken = data.image().astype(np.float32)
    broken[0, 0, :2] = np.nan, np.inf
    data.write("a.nii.gz", broken)
    data.write("b.nii.gz", np.full(SHAPE, -1000, np.int16))
    data.write("v_label.nii.gz", np.zeros(SHAPE, np.uint8))
    data.write("t_label.nii.gz", np.ones(SHAPE, np.uint8))
    data.write("u.nii.gz", np.zeros((8, 0, 6), np.int16))
    assert data.found() == [
        ("error", "nan", "a.nii.gz"),
        ("error", "constant", "b.nii.gz"),
        ("error", "empty", "u.nii.gz"),
        ("warning", "empty", "v_label.nii.gz"),
        ("warning", "constant", "t_label.nii.gz"),
    ]


def test_grids(data: DataSet) -> None:
    moved, sheared, flat = SPACING.copy(), SPACING.copy(), SPACING.copy()
    moved[0, 3], sheared[0, 1], flat[:, 2] = 5.0, 1.0, 0.0
    data.write("a_label.nii.gz", data.label(), moved)
    data.write("b_thickness.nii.gz", np.full((8, 7, 5), 2.5, np.float32))
    data.write("u.nii.gz", data.image(), sheared)
    image = nibabel.Nifti1Image(data.image(), SPACING)
    image.header.set_sform(flat, code=1)
    image.header["qform_code"] = 0
    (data.folder / "v.nii.gz").write_bytes(gzip.compress(image.header.binaryblock + bytes(4) + image.dataobj.tobytes()))
    found = data.found()
    assert [entry for entry in found if entry[1] == "grid"] == [
        ("error", "grid", "a_label.nii.gz"),
        ("error", "grid", "b_thickness.nii.gz"),
    ]
    assert [entry for entry in found if entry[1] != "grid"] == [
        ("error", "affine", "u.nii.gz"),
        ("error", "affine", "v.nii.gz"),
    ]


def test_several_things_are_wrong_with_one_file(data: DataSet) -> None:
    label = data.label()
    label[0, 0, 0] = 7
    data.write("a_label.nii.gz", label[:, :, :5])
    assert data.found() == [("error", "grid", "a_label.nii.gz"), ("error", "labels", "a_label.nii.gz")]


def test_labels_and_what_a_case_is_annotated_for(data: DataSet) -> None:
    a, b = data.content["training"]
    data.write("a_label.nii.gz", data.label() + np.float32(0.5))
    b["annotated"] = [1]
    data.content["validation"][0]["annotated"] = [1, 2, 9]
    data.content["testing"][0]["annotated"] = []
    assert data.found() == [
        ("error", "labels", "a_label.nii.gz"),
        ("error", "annotated", "b_label.nii.gz"),
        ("error", "annotated", "v_label.nii.gz"),
        ("error", "annotated", "t_label.nii.gz"),
        ("error", "annotated", "t_label.nii.gz"),
    ]
    # What predictions have completed holds more, and is read, too.
    b["completed"] = b["label"]
    a["completed"] = a["label"]
    assert [kind for _, kind, _ in data.found()] == ["labels", "labels", *["annotated"] * 4]


def test_cases_without_a_label(data: DataSet) -> None:
    for section in ("training", "validation", "testing"):
        del data.content[section][0]["label"]
    assert data.found() == [
        ("error", "incomplete", "a.nii.gz"),
        ("error", "incomplete", "v.nii.gz"),
        ("warning", "incomplete", "t.nii.gz"),
    ]


def test_units_that_can_not_be(data: DataSet) -> None:
    a, b = data.content["training"]
    data.write("a.nii.gz", (data.image() > 0).astype(np.float32))
    data.write("u.nii.gz", np.clip(data.image(), -125, 275))
    data.write("a_thickness.nii.gz", np.full(SHAPE, 500, np.float32))
    data.write("b_thickness.nii.gz", np.full(SHAPE, -2, np.float32))
    a["volume"], b["volume"] = 500.0, "much"
    data.write("v_thickness.nii.gz", np.zeros(SHAPE, np.float32))
    data.content["testing"][0]["thickness"] = 3.0
    assert data.found() == [
        ("error", "units", "a.nii.gz"),
        ("error", "units", "a_thickness.nii.gz"),
        ("error", "units", "a.nii.gz"),
        ("error", "units", "b_thickness.nii.gz"),
        ("error", "value", "b.nii.gz"),
        ("error", "value", "t.nii.gz"),
        ("warning", "units", "u.nii.gz"),
        ("warning", "empty", "v_thickness.nii.gz"),
    ]
    data.content["modality"] = {"0": "MR"}
    assert ("error", "units", "a.nii.gz") in data.found()  # the volume
    assert ("warning", "units", "u.nii.gz") not in data.found()


def test_another_kind_of_image(data: DataSet) -> None:
    data.write("u.nii.gz", data.random.integers(-1000, 1000, (*SHAPE, 2)).astype(np.int16))
    data.write("v.nii.gz", data.image()[..., 0])
    found = data.found()
    assert ("error", "channels", "u.nii.gz") in found
    assert ("error", "dimensions", "v.nii.gz") in found


def test_a_patient_on_both_sides(data: DataSet) -> None:
    data.content["validation"][0]["patient"] = "p1"
    data.content["testing"][0]["patient"] = "p2"
    report = audit(data.path(), jobs=0)
    assert [(finding.kind, finding.file, finding.message) for finding in report.findings] == [
        ("patient", "v.nii.gz", "of one patient with a (training)"),
        ("patient", "t.nii.gz", "of one patient with u (unlabeled)"),
    ]
    assert [finding.severity for finding in report.findings] == ["error", "warning"], "the second is transductive"
    assert "p1" not in repr(report.findings), "who the patient is stays in the datalist"
    data.content["validation"][0]["patient"] = "p4"
    data.content["testing"][0]["patient"] = "p4"
    assert data.found() == [("warning", "patient", "t.nii.gz")]


def test_names_that_look_like_one_patient(data: DataSet) -> None:
    data.content["training"].append(data.case("s01_first", ""))
    data.content["validation"].append(data.case("s01_second", ""))
    for section in ("training", "validation"):
        del data.content[section][-1]["patient"]
    assert data.found() == [("warning", "patient", "s01_second.nii.gz")]
    data.content["training"][-1]["patient"] = "p9"
    assert data.found() == [("warning", "patient", "s01_second.nii.gz")], "said of one of them alone"
    data.content["validation"][-1]["patient"] = "p8"
    assert data.found() == []


def save_copy(data: DataSet, how: str) -> str:
    """A copy of a.nii.gz, made in some way; its name."""
    image = nibabel.load(data.folder / "a.nii.gz")
    voxels = np.asarray(image.dataobj)
    if how == "name and compression":
        nibabel.save(image, data.folder / "copy.nii")
        return "copy.nii"
    if how == "type":
        return data.write("copy.nii.gz", voxels.astype(np.float64))
    if how == "scale":
        copy = nibabel.Nifti1Image((voxels + 1000).astype(np.uint16), SPACING)
        copy.header.set_slope_inter(1, -1000)
        nibabel.save(copy, data.folder / "copy.nii.gz")
        return "copy.nii.gz"
    if how == "orientation":
        axes = nibabel.orientations.axcodes2ornt("PSL")
        nibabel.save(image.as_reoriented(axes), data.folder / "copy.nii.gz")
        return "copy.nii.gz"
    if how == "header lost":
        return data.write("copy.nii.gz", voxels, np.eye(4))
    if how == "format":
        copy = itk.image_from_array(np.ascontiguousarray(voxels.T))
        itk.imwrite(copy, str(data.folder / "copy.nrrd"))
        return "copy.nrrd"
    assert how == "mirrored"
    return data.write("copy.nii.gz", voxels[::-1])


COPIES = ["name and compression", "type", "scale", "orientation", "header lost", "format"]


@pytest.mark.parametrize("how", [*COPIES, "mirrored"])
def test_a_copy_of_a_training_image(data: DataSet, how: str) -> None:
    copy = save_copy(data, how)
    same = how != "mirrored"
    for section, found in (
        ("training", ("warning", "duplicate", copy)),
        ("unlabeled", ("warning", "duplicate", copy)),
        ("validation", ("error", "leak", copy)),
        ("testing", ("error", "leak", copy)),
    ):
        entries = data.content[section]
        data.content[section] = [*entries, {"image": copy}]
        assert [entry for entry in data.found() if entry[1] != "incomplete"] == [found] * same
        data.content[section] = entries


def test_copies_among_the_other_sections(data: DataSet) -> None:
    data.content["validation"][0]["image"] = "u.nii.gz"
    assert data.found() == [("error", "leak", "u.nii.gz")]
    data.content["unlabeled"] = []
    data.content["testing"][0]["image"] = "u.nii.gz"
    assert data.found() == [("warning", "leak", "u.nii.gz")]


def test_one_label_for_two_images(data: DataSet) -> None:
    a, b = data.content["training"]
    b["label"] = a["label"]
    assert data.found() == [], "frames of one patient may share theirs"
    b["patient"] = "p9"
    assert data.found() == [("warning", "duplicate", "a_label.nii.gz")]
    b["image"], b["label"] = a["image"], "b_label.nii.gz"
    (finding,) = audit(data.path(), jobs=0).findings
    assert finding.message == "the same voxels as a (training), with another label"


def test_constant_images_are_no_copies_of_each_other(data: DataSet) -> None:
    for name in ("a", "v"):
        data.write(f"{name}.nii.gz", np.zeros(SHAPE, np.int16))
    assert [kind for _, kind, _ in data.found()] == ["constant", "constant"]


def test_digests_in_two_dimensions() -> None:
    image = np.random.default_rng(0).normal(size=(1, 5, 4)).astype(np.float32)
    flipped = voxel_digests(image[:, ::-1], np.diag([-1.0, 1.0, 1.0]))
    assert set(voxel_digests(image, np.eye(3))) & set(flipped)


def test_digests_of_channels_in_another_order() -> None:
    image = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)
    assert set(voxel_digests(image, np.eye(4))) & set(voxel_digests(image[::-1], np.eye(4)))
    assert not set(voxel_digests(image, np.eye(4))) & set(voxel_digests(image[[0, 0]], np.eye(4)))


def test_without_labels_ids_are_not_checked(data: DataSet) -> None:
    del data.content["labels"]
    report = audit(data.path(), jobs=0)
    assert [(finding.kind, finding.section) for finding in report.findings] == [("labels", None)]


def test_datalists_that_can_not_be_used(data: DataSet, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not found"):
        audit(tmp_path / "none.json", jobs=0)
    path = tmp_path / "empty.json"
    path.write_text('{"training": []}')
    with pytest.raises(BadInput, match="nothing to check"):
        audit(path, jobs=0)
    with pytest.raises(BadInput, match="--jobs -1"):
        audit(data.path(), jobs=-1)


def test_the_command(data: DataSet, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["check", "--datalist", str(data.path()), "--jobs", "0"]
    assert main(command) == 0
    assert "0 error(s), 0 warning(s)" in capsys.readouterr().out
    data.write("v_label.nii.gz", np.zeros(SHAPE, np.uint8))
    output = tmp_path / "findings.json"
    assert main([*command, "--output", str(output)]) == 0, "warnings alone are no failure"
    cut(data.folder / "a.nii.gz", 300)
    assert main([*command, "--output", str(output)]) == 1, "the older report stays"
    assert json.loads(output.read_text())["errors"] == 0
    output.unlink()
    capsys.readouterr()
    assert main([*command, "--output", str(output)]) == 1
    printed = capsys.readouterr().out
    assert "error: truncated: a.nii.gz (training): a.nii.gz is truncated" in printed
    assert printed.splitlines()[-2] == "1 error(s), 1 warning(s)"
    assert str(tmp_path) not in output.read_text(), "paths are the datalist's"
    content = json.loads(output.read_text())
    error, warning = content.pop("findings")
    assert content == {"cases": 5, "files": 13, "errors": 1, "warnings": 1}
    assert set(error) == {"file", "section", "case", "kind", "severity", "message"}
    assert [error[key] for key in ("file", "section", "case", "kind")] == ["a.nii.gz", "training", "a", "truncated"]
    assert warning["severity"] == "warning"


def test_from_the_command_line_with_processes(data: DataSet, tmp_path: Path) -> None:
    """Two processes read; whichever comes to one of the files dies."""
    (tmp_path / "sitecustomize.py").write_text(
        "import gzip, os\n"
        "whole = gzip.open\n"
        "gzip.open = lambda path: os.kill(os.getpid(), 9) if path.endswith('/u.nii.gz') else whole(path)\n"
    )
    command = [sys.executable, "-m", "common", "check", "--datalist", str(data.path()), "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300, check=False
    )
    assert done.returncode == 1
    assert "5 cases, 12 files" in done.stdout
    assert "error: crash: u.nii.gz (unlabeled): the process that read" in done.stdout
    assert "1 error(s), 0 warning(s)" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_pipe_is_no_image(data: DataSet) -> None:
    (data.folder / "u.nii.gz").unlink()
    os.mkfifo(data.folder / "u.nii.gz")
    assert data.found() == [("error", "unreadable", "u.nii.gz")]


def test_a_dicom_series_is_known_by_its_header(data: DataSet) -> None:
    """A patient may be named in the headers alone; a converted copy has the same voxels."""
    for folder in ("series", "again"):
        (data.folder / folder).mkdir()
    voxels = data.random.integers(-1000, 1000, (4, 6, 5)).astype(np.int16)
    for index, pixels in enumerate(voxels):
        for folder, first in (("series", pixels), ("again", pixels[::-1])):
            image = itk.image_from_array(np.ascontiguousarray(first[None]))
            image.SetSpacing((1.0, 2.0, 2.5))
            image.SetOrigin((0.0, 0.0, 2.5 * index))
            tags = image.GetMetaDataDictionary()
            for tag, value in {"0020|000e": "1.2.3", "0020|000d": "1.2", "0008|0060": "CT", "0010|0020": "17"}.items():
                tags[tag] = value
            writer = itk.ImageFileWriter.New(image, FileName=str(data.folder / folder / f"{index}.dcm"))
            reader = itk.GDCMImageIO.New()
            reader.KeepOriginalUIDOn()
            writer.SetImageIO(reader)
            writer.Update()
    copy = data.write("copy.nii.gz", voxels.T[::-1, ::-1], np.diag([1.0, 2.0, 2.5, 1.0]))
    data.content["training"].append({"image": "series", "label": data.write("label.nii.gz", voxels.T % 3 * 0)})
    data.content["testing"] += [{"image": "again"}, {"image": copy}]
    found = data.found()
    assert ("error", "patient", "again") in found
    assert ("error", "leak", copy) in found
    assert not [entry for entry in found if entry[1:] == ("unreadable", "series")]
    # Who says that they are two patients is asked; but headers that all say the same were made to say nothing.
    data.content["training"][-1].update(image=["series", "series"], patient="p8")
    data.content["testing"][-2]["patient"] = "p9"
    assert ("warning", "patient", "again") in data.found()


def test_every_kind_of_finding_is_documented() -> None:
    programs = [path.read_text() for part in ("data", "transforms") for path in (ROOT / "common" / part).glob("*.py")]
    named = re.compile(r'(?:kind=|\.say\(\s*|\.finding\(\s*|None, None, )"(\w+)"')
    kinds = {kind for text in programs for kind in named.findall(text)} - {"stable"}  # a way of sorting
    assert len(kinds) > 10
    _, table = (ROOT / "docs" / "data.md").read_text().split("| kind | error, unless it says warning |")
    rows = " ".join(row.split("|")[1] for row in table.split("\n\n")[0].splitlines() if row.count("|") > 2)
    assert not kinds - set(re.findall(r"`(\w+)`", rows))
