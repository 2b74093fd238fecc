"""Studies: several trainings and their evaluations, described in one JSON file, run in order and set side by side.

A study's file lists runs. Each trains one of the bundles through ``python -m monai.bundle run``, as a user would, and
evaluates it on the datalist's validation section. What is done already is not done again, and a run that fails does not
end the others, so a study can be stopped and continued. See ``studies/`` for examples::

    {
        "title": "Hippocampus, 4 labelled volumes",
        "plan": {"datalist": "datalist_4.json", "width": 16, "max_width": 128},
        "set": {"iterations_per_epoch": 50, "val_interval": 1000},
        "runs": {
            "teacher": {"bundle": "teacher", "datalist": "datalist_4.json", "epochs": 6, "title": "4 labels"},
            "student": {"bundle": "student", "datalist": "datalist_4.json", "epochs": 6, "teacher": "teacher"}
        }
    }
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .errors import BadInput
from .files import write_atomically
from .plan import make_plan, parse_memory

__all__ = ["Run", "Study", "add_arguments", "main"]

ROOT = Path(__file__).resolve().parents[1]
_PARENTS = {"teacher": "teacher_path", "student": "student_path"}


@dataclass(frozen=True)
class Run:
    """One training with its evaluation.

    Args:
        name: key in the study's file.
        bundle: ``teacher``, ``student`` or ``dual_decoder``.
        datalist: file name in the data folder.
        epochs: epochs to train; 0 trains nothing and evaluates the parent's weights.
        title: name in the tables.
        overlays: config files laid over the bundle's ``train.json``, relative to its ``configs``.
        set: overrides of this run.
        teacher, student: the run that the weights come from.
    """

    name: str
    bundle: str
    datalist: str = "datalist.json"
    epochs: int = 0
    title: str = ""
    overlays: tuple[str, ...] = ()
    set: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    student: str | None = None


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class Study:
    """A study on one data folder.

    Args:
        description: the content of the study's file.
        data: folder with the datalists.
        output: where everything goes; ``<run>/seed<k>`` a run.
        seeds: each run is repeated with each of them.
        device: for all runs; None leaves it to the bundles.

    Raises:
        BadInput: a run with unknown keys, an unknown parent or bundle.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        data: Path,
        output: Path,
        seeds: Sequence[int] = (0,),
        device: str | None = None,
    ) -> None:
        self.description = description
        self.data = data
        self.output = output
        self.seeds = list(seeds)
        self.device = device
        self.runs: dict[str, Run] = {}
        for name, content in description["runs"].items():
            try:
                run = Run(name=name, **{**content, "overlays": tuple(content.get("overlays", ()))})
            except TypeError as error:
                raise BadInput(f"study, run {name!r}: {error}.") from error
            for parent in (run.teacher, run.student):
                if parent is not None and parent not in self.runs:
                    raise BadInput(f"study, run {name!r}: its parent {parent!r} must be a run listed before it.")
            if not (ROOT / "bundles" / run.bundle / "configs" / "train.json").is_file():
                raise BadInput(f"study, run {name!r}: there is no bundle {run.bundle!r}.")
            self.runs[name] = run

    def folder(self, run: Run, seed: int) -> Path:
        """Where a run's files go."""
        return self.output / run.name / f"seed{seed}"

    def _model(self, name: str, seed: int) -> Path:
        run = self.runs[name]
        if run.epochs == 0:
            return self._model(run.student or run.teacher, seed)
        return self.folder(run, seed) / "models" / "model.pt"

    def write_plan(self) -> list[str]:
        """Plan for the data when the study asks for it; returns the overlays that every run gets."""
        wanted = self.description.get("plan")
        if wanted is None:
            return []
        path = self.output / "plan.json"
        if not path.exists():
            options = {key: value for key, value in wanted.items() if key not in ("datalist", "set")}
            if "memory" in options:
                options["memory"] = parse_memory(options["memory"])
            plan = make_plan(self.data / wanted.get("datalist", "datalist.json"), **options)
            write_atomically(path, json.dumps({**plan, **wanted.get("set", {})}, indent=2))
        return [str(path)]

    def commands(self, run: Run, seed: int) -> list[list[str]]:
        """The command lines of a run: training, then evaluation."""
        folder = self.folder(run, seed)
        configs = ROOT / "bundles" / run.bundle / "configs"
        overlays = [*self.write_plan(), *(str((configs / name).resolve()) for name in run.overlays)]
        own = {"dataset_dir": str(self.data), "datalist": str(self.data / run.datalist), "seed": seed}
        if self.device is not None:
            own["device"] = self.device
        settings = {**self.description.get("set", {}), **run.set, **own}
        for parent, key in _PARENTS.items():
            if getattr(run, parent) is not None:
                settings[key] = str(self._model(getattr(run, parent), seed))
        trained = folder / "models"
        commands = []
        if run.epochs > 0:
            settings["train#trainer#max_epochs"] = run.epochs
            files = [str(configs / "train.json"), *overlays]
            commands.append(
                self._command(files, {**settings, "output_dir": str(folder / "train"), "ckpt_dir": str(trained)})
            )
        else:
            trained = self._model(run.name, seed).parent
        files = [str(configs / "train.json"), str(configs / "evaluate.json"), *overlays]
        test = {**settings, "output_dir": str(folder / "test"), "ckpt_dir": str(trained)}
        commands.append(self._command(files, test))
        return commands

    @staticmethod
    def _command(files: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(list(files))]
        for key, value in settings.items():
            command += [f"--{key}", _value(value)]
        return command

    def execute(self, run: Run, seed: int) -> None:
        """Train and evaluate, unless that was done.

        Raises:
            BadInput: a command failed; its output is in ``log.txt`` of the run's folder.
        """
        folder = self.folder(run, seed)
        record = folder / "record.json"
        if record.exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        seconds = []
        with open(folder / "log.txt", "w") as log:
            for command in self.commands(run, seed):
                log.write(shlex.join(command) + "\n")
                log.flush()
                start = time.perf_counter()
                done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, check=False)
                seconds.append(time.perf_counter() - start)
                if done.returncode:
                    tail = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-3:]
                    raise BadInput(f"run {run.name}, seed {seed} failed; see {folder / 'log.txt'}: " + " | ".join(tail))
        summary = json.loads((folder / "test" / "summary.json").read_text())
        content = {"train_seconds": sum(seconds[:-1]), "test_seconds": seconds[-1], "summary": summary}
        write_atomically(record, json.dumps(content, indent=2))

    def run_all(self, only: Sequence[str] | None = None) -> list[str]:
        """Execute every run, or those named in ``only``, with every seed; returns what failed."""
        failures: list[str] = []
        todo = [(run, seed) for seed in self.seeds for run in self.runs.values() if only is None or run.name in only]
        with tqdm(todo, desc=self.description.get("title", "study"), unit="run", disable=None) as bar:
            for run, seed in bar:
                bar.set_postfix_str(f"{run.name}, seed {seed}")
                start = time.perf_counter()
                try:
                    self.execute(run, seed)
                    tqdm.write(f"{run.name}, seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
                except BadInput as error:
                    failures.append(str(error))
                    tqdm.write(f"error: {error}", file=sys.stderr)
        return failures

    def records(self, run: Run) -> list[dict[str, Any]]:
        """What is known of a run, a dict a seed that is done."""
        paths = [self.folder(run, seed) / "record.json" for seed in self.seeds]
        return [json.loads(path.read_text()) for path in paths if path.exists()]

    def segmentation_table(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Dice and HD95 a structure and over structures: columns and rows, a list of seeds in each cell."""
        names: list[str] = []
        rows = []
        for run in self.runs.values():
            records = [r["summary"] for r in self.records(run)]
            if not records or not records[0]["labels"]:
                continue
            names = names or list(records[0]["labels"])
            row: dict[str, Any] = {"name": run.title or run.name}
            row["dice"] = [summary["mean_dice"] for summary in records]
            hd95 = [[s["labels"][name]["hd95"]["mean"] for name in names] for s in records]
            row["hd95"] = [statistics.fmean(values) if None not in values else math.nan for values in hd95]
            for name in names:
                row[f"dice/{name}"] = [summary["labels"][name]["dice"]["mean"] for summary in records]
            row["failed"] = str(sum(s["labels"][name]["failed"] for s in records for name in names))
            row["minutes"] = [r["train_seconds"] / 60 for r in self.records(run)]
            rows.append(row)
        columns = [{"key": "dice", "title": "mean Dice", "better": "higher", "digits": 3}]
        columns += [{"key": f"dice/{name}", "title": f"Dice {name}", "better": "higher", "digits": 3} for name in names]
        columns.append({"key": "hd95", "title": "mean HD95 [mm]", "better": "lower", "digits": 2})
        columns.append({"key": "failed", "title": "failed", "better": None, "digits": 0})
        columns.append({"key": "minutes", "title": "training [min]", "better": None, "digits": 1})
        return columns, rows

    def regression_table(self, target: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """MAE, RMSE and R2 of a dense target: inside the reference, where covered, and of the case means."""
        groups = {"voxels": "", "covered": "covered: ", "case_means": "case means: "}
        rows, unit = [], ""
        for run in self.runs.values():
            summaries = [r["summary"]["targets"].get(target) for r in self.records(run)]
            if not summaries or None in summaries:
                continue
            unit = summaries[0]["unit"]
            row: dict[str, Any] = {"name": run.title or run.name}
            for group in groups:
                found = [s.get(group) for s in summaries]
                found = [f.get("voxels") if f and group == "covered" else f for f in found]
                for measure in ("mae", "rmse", "r2"):
                    if None not in found:
                        row[f"{group}/{measure}"] = [f[measure] if f[measure] is not None else math.nan for f in found]
            row["minutes"] = [r["train_seconds"] / 60 for r in self.records(run)]
            rows.append(row)
        columns = [
            {
                "key": f"{group}/{measure}",
                "title": f"{text}{measure.upper()}" + (f" [{unit}]" if unit and measure != "r2" else ""),
                "better": "higher" if measure == "r2" else "lower",
                "digits": 3,
            }
            for group, text in groups.items()
            for measure in ("mae", "rmse", "r2")
        ]
        columns.append({"key": "minutes", "title": "training [min]", "better": None, "digits": 1})
        return columns, rows

    def targets(self) -> list[str]:
        """Names of the dense targets that any run measured."""
        found: dict[str, None] = {}
        for run in self.runs.values():
            for record in self.records(run):
                found.update(
                    dict.fromkeys(name for name, value in record["summary"]["targets"].items() if "voxels" in value)
                )
        return list(found)

    def markdown(self) -> str:
        """The study's tables."""
        from .report import markdown_table

        lines = [f"## {self.description.get('title', 'Study')}", ""]
        if "note" in self.description:
            lines += [self.description["note"], ""]
        lines += [f"{machine()}; seeds {', '.join(map(str, self.seeds))}.", ""]
        columns, rows = self.segmentation_table()
        if rows:
            lines += [markdown_table(columns, rows), ""]
        for target in self.targets():
            columns, rows = self.regression_table(target)
            lines += [f"### {target}", "", markdown_table(columns, rows), ""]
        return "\n".join(lines)


def machine() -> str:
    """The machine in words, for a table's caption."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {model}{gpu}, torch {torch.__version__}"


def read_study(path: Path) -> dict[str, Any]:
    """The content of a study's file.

    Raises:
        BadInput: it is missing, not JSON, or has no runs.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"study {path}: can't be read ({error}).") from error
    if not isinstance(content, dict) or not content.get("runs"):
        raise BadInput(f"study {path}: it lists no `runs`.")
    return content


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m common study``."""
    parser.add_argument("study", type=Path, help="a file such as studies/hippocampus.json")
    parser.add_argument("--data", type=Path, required=True, help="folder with the datalists")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--seeds", default="0", help="comma-separated, for instance 0,1,2")
    parser.add_argument("--device", help="for instance cpu or cuda:0; by default a GPU when there is one")
    parser.add_argument("--only", help="comma-separated names of runs; by default all")


def main(options: argparse.Namespace) -> int:
    """Run a study, write ``results.md`` and print it."""
    description = read_study(options.study)
    if not options.data.is_dir():
        raise BadInput(f"--data {options.data}: no such folder; it must hold the datalists that the study names.")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    study = Study(description, options.data.resolve(), options.output.resolve(), seeds, options.device)
    only = options.only.split(",") if options.only else None
    unknown = set(only or ()) - set(study.runs)
    if unknown:
        raise BadInput(f"--only: the study has no run {', '.join(sorted(unknown))}; it has {', '.join(study.runs)}.")
    failures = study.run_all(only)
    text = study.markdown()
    write_atomically(study.output / "results.md", text + "\n")
    print(text)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0
