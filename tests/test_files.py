from __future__ import annotations

import errno
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common import files
from common.errors import BadInput
from common.files import intended_name, write_atomically, write_nifti


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("content", "expected"),
    [("Größe 3 µm\n", "Größe 3 µm\n".encode()), (b"\0\xff", b"\0\xff"), (memoryview(b"abc"), b"abc"), ("", b"")],
)
def test_writes_and_replaces(tmp_path, content, expected):
    path = tmp_path / "new" / "folder" / "file.json"
    for _ in range(2):
        write_atomically(path, content)
        assert path.read_bytes() == expected
        assert only(path.parent) == ["file.json"]
    path.write_text("older and longer than what follows")
    write_atomically(str(path), content)
    assert path.read_bytes() == expected


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path, full_disk):
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    with full_disk(1000), pytest.raises(BadInput, match=r"model\.pt: can't be written .*an older file is as it was"):
        write_atomically(path, bytes(5000))
    assert path.read_bytes() == b"old"
    assert only(tmp_path) == ["model.pt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_whichever_step_fails_nothing_is_left_behind(tmp_path, monkeypatch, step):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(BadInput, match="No space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert only(tmp_path) == ["model.pt"]


def test_the_file_is_whole_at_every_moment(tmp_path, monkeypatch):
    """At the last moment before the exchange the old content stands, and the new one is complete beside it."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    seen = {}
    replace = os.replace

    def look(source, target):
        seen.update(old=Path(target).read_bytes(), new=Path(source).read_bytes(), name=Path(source).name)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", look)
    write_atomically(path, b"new")
    assert (seen["old"], seen["new"], path.read_bytes()) == (b"old", b"new", b"new")
    assert not seen["name"].endswith(".pt"), "nobody may take it for the weights"


def test_an_interruption_leaves_the_old_file(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    monkeypatch.setattr(files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert only(tmp_path) == ["model.pt"]


def test_a_place_where_no_file_can_be(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match=r"inside\.json: can't be written"):
        write_atomically(tmp_path / "file" / "inside.json", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInput, match="folder: can't be written"):
        write_atomically(tmp_path / "folder", "text")
    assert only(tmp_path) == ["file", "folder"]


@pytest.fixture
def image() -> nib.Nifti1Image:
    noise = np.random.default_rng(0).normal(size=(8, 9, 10)).astype(np.float32)
    made = nib.Nifti1Image(noise, np.diag([-1.0, 2.0, 3.0, 1.0]))
    made.header.set_xyzt_units("mm")
    return made


def test_nifti_is_read_as_it_was_written(tmp_path, image):
    path = tmp_path / "new" / "case_1.nii.gz"
    write_nifti(path, image)
    found = nib.load(path)
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(image.dataobj))
    np.testing.assert_array_equal(found.affine, image.affine)
    assert found.header.get_xyzt_units()[0] == "mm"
    first = path.read_bytes()
    write_nifti(path, image)
    assert path.read_bytes() == first
    assert only(path.parent) == ["case_1.nii.gz"]


def test_nifti_on_a_disk_that_fills_up_is_whole_or_not_there(tmp_path, image, full_disk):
    path = tmp_path / "case_1.nii.gz"
    with full_disk(1000), pytest.raises(BadInput, match=r"case_1\.nii\.gz: can't be written"):
        write_nifti(path, image)
    assert only(tmp_path) == []


def test_what_a_killed_process_leaves_is_known_by_its_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(files.os, "replace", lambda source, target: seen.append(Path(source).name))
    write_atomically(tmp_path / "case_1.nii.gz", b"")
    assert [intended_name(name) for name in seen] == ["case_1.nii.gz"]
    for name in ("case_1.nii.gz", ".case_1.nii.gz.tmp", ".hidden"):
        assert intended_name(name) == name
