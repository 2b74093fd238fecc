"""The demonstration fits its runs to the data, and reports what there is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import IO

import pytest

from common import demo, study
from common.errors import BadInput
from common.study import ROOT, Study, read_study

DEMO = read_study(ROOT / "studies" / "demo.json")
ENTRY = {"image": "a.nii.gz", "label": "b.nii.gz", "patient": "p1", "annotated": [0, 1]}
FIGURES = {"mae": 1.0, "rmse": 2.0, "r2": 0.5}
SUMMARY = {
    "labels": {"wall": {"dice": {"mean": 0.81234}, "hd95": {"mean": 2.0}, "failed": 0}},
    "mean_dice": 0.81234,
    "targets": {"thickness": {"unit": "mm", "voxels": FIGURES, "case_means": FIGURES}},
}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A data folder with maps in it."""
    for name in ("c.nii.gz", "note.txt"):
        (tmp_path / name).touch()
    return str(tmp_path)


def test_all_runs_for_data_that_have_everything() -> None:
    target = {"name": "thickness", "inner": [1]}
    datalist = {"training": [{**ENTRY, "thickness": "c.nii.gz"}], "unlabeled": [{}], "targets": [target]}
    assert demo._fit(DEMO, datalist)["runs"] == DEMO["runs"]


def test_without_unlabeled_images_the_dual_decoder_starts_from_the_teacher(folder: str) -> None:
    runs = demo._fit(DEMO, {"training": [{**ENTRY, "thickness": "c.nii.gz"}], "folder": folder})["runs"]
    assert not [run for run in runs.values() if run["bundle"] == "student"]
    assert runs["dual_decoder"]["student"] == "teacher"
    assert "geometric" not in runs
    Study({"runs": runs}, Path("data"), Path("output"))  # no run has lost its parent


@pytest.mark.parametrize(
    "more",
    [{}, {"site": "Basel"}, {"report": "note.txt"}, {"thickness": "gone.nii.gz"}, {"age": 60}, {"patient": "c.nii.gz"}],
    ids=str,
)
def test_without_maps_there_is_segmentation_only(folder: str, more: dict[str, object]) -> None:
    datalist = {"training": [{**ENTRY, **more}], "unlabeled": [{}], "folder": folder}
    assert list(demo._fit(DEMO, datalist)["runs"]) == ["teacher", "student"]


def test_described_targets_decide(folder: str) -> None:
    datalist = {"training": [{**ENTRY, "thickness": "c.nii.gz"}], "unlabeled": [{}], "folder": folder, "targets": []}
    assert list(demo._fit(DEMO, datalist)["runs"]) == ["teacher", "student"]
    datalist["targets"] = [{"name": "volume", "kind": "sum", "inner": []}]
    runs = demo._fit(DEMO, datalist)["runs"]
    assert "dual_decoder" in runs
    assert "geometric" not in runs


def test_report_has_the_tables_of_what_was_run(tmp_path: Path) -> None:
    made = Study(DEMO, tmp_path / "data", tmp_path / "out", [0])
    folder = made.folder(made.runs["dual_decoder"], 0)
    folder.mkdir(parents=True)
    record = {"train_seconds": 60.0, "test_seconds": 6.0, "summary": SUMMARY}
    (folder / "record.json").write_text(json.dumps(record))
    text = demo._report(made, tmp_path / "data").read_text()
    for words in ("0.812", "dual decoder (full method)", "Regression: thickness", "1.1 minutes"):
        assert words in text


def options(tmp_path: Path, **content: object) -> argparse.Namespace:
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [ENTRY], **content}))
    study = ROOT / "studies" / "demo.json"
    return argparse.Namespace(data=tmp_path, output=tmp_path / "out", seed=0, study=study, device=None, jobs=None)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The datalists that were planned for; the plan itself is a tiny one."""
    seen: list[Path] = []
    monkeypatch.setattr(study, "make_plan", lambda path, **settings: seen.append(path) or {"spacing": [1, 1, 1]})
    return seen


def call(monkeypatch: pytest.MonkeyPatch, failing: str | None) -> None:
    """Runs leave a summary instead of training; one of them fails."""

    def fake(command: list[str], log: IO[str], cores: object) -> int:
        folder = Path(command[command.index("--output_dir") + 1])
        if failing is not None and failing in folder.parts:
            log.write("error: volume_7.nii.gz: truncated\n")
            log.flush()
            return 1
        folder.mkdir(parents=True)
        if folder.name == "test":
            (folder / "summary.json").write_text(json.dumps(SUMMARY))
        return 0

    monkeypatch.setattr(study, "_call", fake)


def test_a_run_that_fails_costs_its_own_rows_only(tmp_path, monkeypatch, capsys, planned) -> None:
    call(monkeypatch, "student")
    assert demo.main(options(tmp_path, unlabeled=["c.nii.gz"], validation=[ENTRY])) == 1
    shown = capsys.readouterr()
    assert "error: run student, seed 0 failed" in shown.err
    assert "volume_7.nii.gz: truncated" in shown.err
    report = (tmp_path / "out" / "report.html").read_text()
    assert "teacher: supervised nnU-Net" in report
    assert "0.812" in report
    assert "student: + unlabelled volumes" not in report, "it has no row"
    assert "Failed: run student" in report
    assert "volume_7.nii.gz: truncated" in report
    assert planned == [tmp_path / "datalist.json"], "one's own data are planned for"


def test_a_demonstration_without_failures(tmp_path, monkeypatch, capsys, planned) -> None:
    call(monkeypatch, None)
    assert demo.main(options(tmp_path, unlabeled=["c.nii.gz"], validation=[ENTRY])) == 0
    assert "error" not in capsys.readouterr().err
    assert "Failed" not in (tmp_path / "out" / "report.html").read_text()


def test_data_without_validation(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="validation"):
        demo.main(options(tmp_path))


@pytest.mark.parametrize(
    ("device", "gpu", "cores", "jobs", "expected"),
    [
        (None, False, 2, None, 2),
        (None, False, 1, None, 1),
        (None, True, 8, None, 1),
        ("cpu", True, 8, None, 2),
        (None, False, 2, 3, 3),
    ],
)
def test_two_runs_at_a_time_where_cores_would_idle(monkeypatch, device, gpu, cores, jobs, expected) -> None:
    monkeypatch.setattr(demo.torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(demo.os, "cpu_count", lambda: cores)
    assert demo._jobs(argparse.Namespace(device=device, jobs=jobs)) == expected
