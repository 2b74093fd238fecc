"""The demonstration: data, three stages, the comparisons, and a report with pictures."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .data.datalist import read_datalist
from .data.descriptions import NOT_TARGETS
from .data.grids import VOLUME_SUFFIXES
from .data.phantom_set import generate_phantoms
from .errors import BadInput
from .report import write_report
from .study import ROOT, Study, read_study
from .tables import cost_table, machine, markdown, measured_targets, regression_table, segmentation_table

__all__ = ["add_arguments", "main"]

_PLAN = {"datalist": "datalist.json", "width": 16, "max_width": 128, "memory": "2GB"}
_SHOWN = ("teacher", "student", "dual_decoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m common demo``."""
    parser.add_argument("--data", type=Path, help="a folder with datalist.json; by default phantoms are made")
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder for everything that is made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--study", type=Path, default=ROOT / "studies" / "demo.json", help="which runs")
    parser.add_argument("--device", help="for instance cpu or cuda:0; by default a GPU when there is one")
    parser.add_argument("--jobs", type=int, help="runs at a time; by default 2 on a CPU, a share of its cores each")


def _has_targets(datalist: dict[str, Any]) -> bool:
    """Whether there is something to regress: targets that the datalist describes, or maps that its entries name."""
    if "targets" in datalist:
        return bool(datalist["targets"])
    return any(
        isinstance(value, str)
        and key not in NOT_TARGETS
        and value.lower().endswith(VOLUME_SUFFIXES)
        and (Path(datalist["folder"]) / value).is_file()
        for entry in datalist.get("training", [])
        for key, value in entry.items()
    )


def _fit(description: dict[str, Any], datalist: dict[str, Any]) -> dict[str, Any]:
    """The study with the runs that the data allow: unlabelled images for the student, targets for the dual decoder."""
    runs = dict(description["runs"])
    if not datalist.get("unlabeled"):
        runs = {name: run for name, run in runs.items() if run["bundle"] != "student" and name != "no_student"}
        for name, run in runs.items():
            if run.get("student") == "student":
                runs[name] = {**run, "student": "teacher"}
    if not any(target.get("inner") for target in datalist.get("targets", [])):
        # Which labels are the cavity can't be told from the files.
        runs.pop("geometric", None)
    if not _has_targets(datalist):
        runs = {name: run for name, run in runs.items() if run["bundle"] != "dual_decoder"}
    return {**description, "runs": runs}


def _jobs(options: argparse.Namespace) -> int:
    """How many runs at a time. Starting a run keeps one core busy for seconds, and another run the others."""
    if options.jobs is not None:
        return options.jobs
    on_cpu = options.device == "cpu" or (options.device is None and not torch.cuda.is_available())
    return 2 if on_cpu and (os.cpu_count() or 1) > 1 else 1


def main(options: argparse.Namespace) -> int:
    """Run the demonstration; returns 1 when a run failed."""
    output = options.output.resolve()
    description = read_study(options.study)
    if options.data is None:
        data = generate_phantoms(output / "phantoms", seed=options.seed).parent
    else:
        data = options.data.resolve()
        datalist = read_datalist(data / "datalist.json")
        if not datalist.get("validation"):
            raise BadInput(f"{data / 'datalist.json'}: `validation` is empty: nothing can be measured.")
        description = {**_fit(description, datalist), "plan": _PLAN}
    study = Study(description, data, output, [options.seed], options.device)
    failures = study.run_all(jobs=_jobs(options))
    report = _report(study, data, failures)
    print(markdown(study))
    print(f"report: {report}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _report(study: Study, data: Path, failures: Sequence[str] = ()) -> Path:
    seed = study.seeds[0]
    tables = []
    columns, rows = segmentation_table(study)
    if rows:
        note = "Dice and 95th percentile of the surface distance on the validation cases, which chose nothing."
        tables.append({"title": "Segmentation", "note": note, "columns": columns, "rows": rows})
    for target in measured_targets(study):
        columns, rows = regression_table(study, target)
        note = (
            "Error inside the reference structure; 'covered' where the prediction has a value, which is all that a "
            "measurement in the predicted mask can be judged by."
        )
        tables.append({"title": f"Regression: {target}", "note": note, "columns": columns, "rows": rows})
    columns, rows = cost_table(study)
    if rows:
        tables.append({"title": "Cost", "note": "Start-up included.", "columns": columns, "rows": rows})
    pictures = []
    for name in (name for name in _SHOWN if name in study.runs):
        folder = study.folder(study.runs[name], seed)
        for kind, paths in (
            ("median case", sorted((folder / "test").glob("median_*.png"))),
            ("training", [folder / "train" / "curves.png"]),
        ):
            pictures += [{"title": f"{name}: {kind}", "path": path} for path in paths if path.exists()]
    total = sum(r["train_seconds"] + r["test_seconds"] for run in study.runs.values() for r in study.records(run))
    facts = [
        ("data", str(data)),
        ("machine", machine()),
        ("seed", str(seed)),
        ("time", f"{total / 60:.1f} minutes, summed over the runs"),
        ("runs", json.dumps({name: run.epochs for name, run in study.runs.items()})),
    ]
    path = study.output / "report.html"
    failed = [f"Failed: {failure}" for failure in failures]
    write_report(path, study.description.get("title", "Report"), facts, tables, pictures, footnotes=failed)
    return path
