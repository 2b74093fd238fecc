"""The demonstration fits its runs to the data, and reports what there is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from common import demo
from common.errors import BadInput
from common.study import ROOT, Study, read_study

DEMO = read_study(ROOT / "studies" / "demo.json")
ENTRY = {"image": "a.nii.gz", "label": "b.nii.gz"}


def test_all_runs_for_data_that_have_everything() -> None:
    target = {"name": "thickness", "inner": [1]}
    datalist = {"training": [{**ENTRY, "thickness": "c.nii.gz"}], "unlabeled": [{}], "targets": [target]}
    assert demo._fit(DEMO, datalist)["runs"] == DEMO["runs"]


def test_without_unlabeled_images_the_dual_decoder_starts_from_the_teacher() -> None:
    runs = demo._fit(DEMO, {"training": [{**ENTRY, "thickness": "c.nii.gz"}]})["runs"]
    assert not [run for run in runs.values() if run["bundle"] == "student"]
    assert runs["dual_decoder"]["student"] == "teacher"
    assert "geometric" not in runs
    Study({"runs": runs}, Path("data"), Path("output"))  # no run has lost its parent


def test_without_targets_there_is_segmentation_only() -> None:
    runs = demo._fit(DEMO, {"training": [ENTRY], "unlabeled": [{}]})["runs"]
    assert list(runs) == ["teacher", "student"]


def test_report_has_the_tables_of_what_was_run(tmp_path: Path) -> None:
    figures = {"mae": 1.0, "rmse": 2.0, "r2": 0.5}
    summary = {
        "labels": {"wall": {"dice": {"mean": 0.81234}, "hd95": {"mean": 2.0}, "failed": 0}},
        "mean_dice": 0.81234,
        "targets": {"thickness": {"unit": "mm", "voxels": figures, "case_means": figures}},
    }
    study = Study(DEMO, tmp_path / "data", tmp_path / "out", [0])
    folder = study.folder(study.runs["dual_decoder"], 0)
    folder.mkdir(parents=True)
    record = {"train_seconds": 60.0, "test_seconds": 6.0, "summary": summary}
    (folder / "record.json").write_text(json.dumps(record))
    text = demo._report(study, tmp_path / "data").read_text()
    for words in ("0.812", "dual decoder (full method)", "Regression: thickness", "1.1 minutes"):
        assert words in text


def test_data_without_validation(tmp_path: Path) -> None:
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [ENTRY]}))
    options = argparse.Namespace(
        data=tmp_path, output=tmp_path / "out", seed=0, study=ROOT / "studies" / "demo.json", device=None
    )
    with pytest.raises(BadInput, match="validation"):
        demo.main(options)
