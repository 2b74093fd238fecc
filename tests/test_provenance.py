from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from common import provenance as module
from common.provenance import DataDigests, data_digests, different, environment, file_digest, git_state


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A datalist that names a file, a channel each, a DICOM series, a file outside its folder, and a number."""
    folder = tmp_path / "data"
    for name in ("a.nii.gz", "a_label.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz", "series/1.dcm", "series/2.dcm"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (tmp_path / "elsewhere.nii.gz").write_bytes(b"elsewhere")
    content = {
        "training": [{"image": "a.nii.gz", "label": "a_label.nii.gz", "severity": 3.5, "patient": "a.nii.gz"}],
        "unlabeled": [{"image": ["b_0000.nii.gz", "b_0001.nii.gz"]}, {"image": "series"}],
        "testing": ["../elsewhere.nii.gz"],
    }
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder


def test_every_file_of_a_datalist(data: Path) -> None:
    found = data_digests(data / "datalist.json")
    assert found["datalist"] == str(data / "datalist.json")
    assert found["sha256"] == sha256((data / "datalist.json").read_bytes())
    names = ["../elsewhere.nii.gz", "a.nii.gz", "a_label.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz", "series"]
    assert sorted(found["files"]) == names
    assert found["files"]["a.nii.gz"] == sha256(b"a.nii.gz")
    assert found["files"]["../elsewhere.nii.gz"] == sha256(b"elsewhere")
    (data / "series" / "2.dcm").write_bytes(b"another slice")
    again = data_digests(data / "datalist.json")["files"]
    assert [name for name in names if again[name] != found["files"][name]] == ["series"]


def test_cases_that_the_datalist_does_not_know_count_themselves(data: Path, tmp_path: Path) -> None:
    """As when MONAI Label gives a training its entries, while the config's datalist is that of something else."""
    studies = tmp_path / "studies"
    (studies / "labels").mkdir(parents=True)
    for name in ("x.nii.gz", "labels/x.nii.gz"):
        (studies / name).write_bytes(name.encode())
    cases = [{"image": str(studies / "x.nii.gz"), "label": str(studies / "labels" / "x.nii.gz")}]
    for datalist in (data / "datalist.json", data / "none.json"):
        found = data_digests(datalist, cases)
        assert (found["datalist"], found["sha256"], found["folder"]) == (None, None, str(studies))
        assert found["files"] == {name: sha256(name.encode()) for name in ("x.nii.gz", "labels/x.nii.gz")}
    known = data_digests(data / "datalist.json", [{"image": str(data / "a.nii.gz")}])
    assert known["datalist"] is not None
    assert list(known["files"]) == ["a.nii.gz"], "what a training does not read may change"


def test_large_files_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 7)
    (tmp_path / "file").write_bytes(bytes(range(100)))
    assert file_digest(tmp_path / "file") == sha256(bytes(range(100)))


def test_a_training_goes_on_without_digests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "datalist.json").write_text("{")
    assert DataDigests(tmp_path / "datalist.json").result() is None
    assert "digests are missing" in caplog.text


def test_the_state_of_a_checkout(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "--quiet"], [*name, "commit", "--quiet", "--allow-empty", "--message", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    commit, changed = git_state(tmp_path)
    assert len(commit) == 40
    assert not changed
    (tmp_path / "new").mkdir()
    assert git_state(tmp_path / "new") is None, "installed somewhere below a checkout, it is none"
    (tmp_path / "new" / "file").write_text("")
    assert git_state(tmp_path) == (commit, True)


def test_what_differs_is_named() -> None:
    here = environment("cpu")
    assert {"python", "torch", "monai", "pytorch-ignite", "numpy", "commit", "code", "threads"} <= here.keys()
    assert different(here, here) == []
    then = {**here, "torch": "1.0", "commit": None, "changed since that commit": True}
    here["changed since that commit"] = False
    assert different(then, {**here, "commit": "c" * 50}) == [
        f"torch: 1.0 in the record, {here['torch']} here",
        f"commit: none in the record, {'c' * 40} here",
        "changed since that commit: yes in the record, no here",
    ]
