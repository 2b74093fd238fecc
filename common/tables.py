"""The tables of a study: what its runs measured, a row a run, all seeds in a cell."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .networks import read_weights
from .report import markdown_table

if TYPE_CHECKING:
    from .study import Study

__all__ = [
    "best_among_equals",
    "config_versions",
    "cost_table",
    "deployed_parameters",
    "gap_table",
    "machine",
    "markdown",
    "measured_targets",
    "outdated_rows",
    "regression_table",
    "segmentation_table",
]

#: what a target's error is taken over, and how its columns begin
_GROUPS = {"cases": "", "voxels": "", "case_means": "case means: "}
#: ends of the names of buffers: what a network knows without having learnt it by gradients
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "temperature")


def segmentation_table(study: Study) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Dice and HD95 a structure and over structures: columns and rows, a list of seeds in each cell.

    Seeds that are not done stand at its end, as None.
    """
    measured = [(run, [r["summary"] for r in study.records(run)]) for run in study.runs.values()]
    measured = [(run, records) for run, records in measured if records and records[0]["labels"]]
    names = list(dict.fromkeys(name for _, records in measured for name in records[0]["labels"]))
    rows = []
    for run, records in measured:
        row: dict[str, Any] = {"name": run.title or run.name}
        own = list(records[0]["labels"])
        undone = [None] * (len(study.seeds) - len(records))
        if len(own) == len(names):  # the means of a network of one organ alone compare with no other's
            row["dice"] = [*(summary["mean_dice"] for summary in records), *undone]
            hd95 = [[_figure(s["labels"][name]["hd95"]["mean"]) for name in names] for s in records]
            row["hd95"] = [*(statistics.fmean(values) for values in hd95), *undone]
        for name in own:
            row[f"dice/{name}"] = [*(summary["labels"][name]["dice"]["mean"] for summary in records), *undone]
            row[f"hd95/{name}"] = [*(_figure(s["labels"][name]["hd95"]["mean"]) for s in records), *undone]
        row["failed"] = str(sum(s["labels"][name]["failed"] for s in records for name in own))
        rows.append(row)
    columns = [{"key": "dice", "title": "mean Dice", "better": "higher", "digits": 3}]
    columns += [{"key": f"dice/{name}", "title": f"Dice {name}", "better": "higher", "digits": 3} for name in names]
    columns.append({"key": "hd95", "title": "mean HD95 [mm]", "better": "lower", "digits": 2})
    columns += [{"key": f"hd95/{name}", "title": f"HD95 {name} [mm]", "better": "lower", "digits": 2} for name in names]
    columns.append({"key": "failed", "title": "failed", "better": None, "digits": 0})
    return best_among_equals(columns, rows), rows


def best_among_equals(columns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The columns, without a best distance where a row has ``failed`` cases: distances leave those out."""
    if all(row["failed"] in (None, "0") for row in rows):
        return [dict(column) for column in columns]
    return [
        {**column, "better": None if column["key"].startswith(("hd95", "asd")) else column["better"]}
        for column in columns
    ]


def regression_table(study: Study, target: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """MAE, RMSE and R2 of a target: of a number a case, or inside the reference, of all voxels and of the case means.

    The last columns of a dense target tell how much of the reference the predicted segmentation covers (or, for a
    measurement in it, how much of it has one), and the MAE there; and of intervals of 90 % how much they hold, as
    predicted and calibrated.
    """
    rows, unit, groups = [], "", {}
    for run in study.runs.values():
        summaries = [r["summary"]["targets"].get(target) for r in study.records(run)]
        if not summaries or None in summaries:
            continue
        unit = summaries[0]["unit"]
        row: dict[str, Any] = {"name": run.title or run.name}
        undone = [None] * (len(study.seeds) - len(summaries))
        for group in (name for name in _GROUPS if all(name in s for s in summaries)):
            groups[group] = _GROUPS[group]
            for measure in ("mae", "rmse", "r2"):
                row[f"{group}/{measure}"] = [*(_figure(s[group][measure]) for s in summaries), *undone]
        if all("covered" in s for s in summaries):
            row["coverage"] = [*(_figure(s["coverage"]["mean"]) for s in summaries), *undone]
            row["covered/mae"] = [*(_figure(s["covered"]["voxels"]["mae"]) for s in summaries), *undone]
        if all("interval" in s for s in summaries):
            for kind in ("raw", "calibrated"):
                row[f"interval/{kind}"] = [*(_figure(s["interval"][kind]) for s in summaries), *undone]
        rows.append(row)
    columns: list[dict[str, Any]] = [
        {
            "key": f"{group}/{measure}",
            "title": f"{text}{measure.upper()}" + (f" [{unit}]" if unit and measure != "r2" else ""),
            "better": "higher" if measure == "r2" else "lower",
            "digits": 3,
        }
        for group, text in groups.items()
        for measure in ("mae", "rmse", "r2")
    ]
    if any("coverage" in row for row in rows):
        columns.append({"key": "coverage", "title": "covered", "better": None, "digits": 2})
        columns.append(
            {"key": "covered/mae", "title": "MAE there" + f" [{unit}]" * bool(unit), "better": None, "digits": 3}
        )
    if any("interval/raw" in row for row in rows):
        for kind in ("raw", "calibrated"):
            columns.append({"key": f"interval/{kind}", "title": f"in 90 %, {kind}", "better": None, "digits": 3})
    return columns, rows


def cost_table(study: Study) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What each run cost, its start included, and how large the network is that it deploys."""
    rows = []
    for run in study.runs.values():
        records = study.records_by_seed(run)
        if not records:
            continue
        row: dict[str, Any] = {"name": run.title or run.name}
        undone = [None] * (len(study.seeds) - len(records))
        row["minutes"] = [*(record["train_seconds"] / 60 for record in records.values()), *undone]
        row["seconds"] = [*(record["test_seconds"] for record in records.values()), *undone]
        models = [model for seed in records if (model := study.model(run.name, seed)).exists()]
        if models:
            row["parameters"] = deployed_parameters(models[0]) / 1e6
        rows.append(row)
    columns = [
        {"key": "minutes", "title": "training [min]", "better": None, "digits": 1},
        {"key": "seconds", "title": "evaluation [s]", "better": None, "digits": 0},
        {"key": "parameters", "title": "parameters [M]", "better": None, "digits": 2},
    ]
    return columns, rows


def deployed_parameters(path: Path) -> int:
    """Parameters in a ``model.pt``: what inference needs, without buffers."""
    return sum(t.numel() for name, t in read_weights(path).items() if not name.endswith(_BUFFERS))


def _figure(value: float | None) -> float:
    return math.nan if value is None else value


def gap_table(study: Study) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """How much of the gap in mean Dice between few labels and all of them a method closes, for the study's ``gaps``.

    The share is ``(method - few) / (all - few)``, of the means over the seeds that all three have: a ratio of single
    seeds is mostly noise where the gap is small.
    """
    rows = []
    for gap in study.description.get("gaps", ()):
        runs = [study.runs[gap[key]] for key in ("few", "method", "all")]
        scores = [{s: r["summary"]["mean_dice"] for s, r in study.records_by_seed(run).items()} for run in runs]
        seeds = sorted(set.intersection(*map(set, scores)))
        if not seeds:
            continue
        few, method, everything = (statistics.fmean(score[seed] for seed in seeds) for score in scores)
        row = {
            "name": runs[1].title or runs[1].name,
            "gap": everything - few,
            "gain": [scores[1][seed] - scores[0][seed] for seed in seeds],
            "share": (method - few) / (everything - few) if everything != few else math.nan,
        }
        rows.append(row)
    columns: list[dict[str, Any]] = [
        {"key": "gap", "title": "gap", "better": None, "digits": 3},
        {"key": "gain", "title": "gain", "better": "higher", "digits": 3},
        {"key": "share", "title": "share closed", "better": "higher", "digits": 2},
    ]
    return columns, rows


def config_versions(study: Study) -> list[str]:
    """A sentence a bundle of which some runs were made with other configs of its own than others.

    Of runs whose record says nothing of their configs, as earlier ones', nothing is known.
    """
    found: dict[str, set[str]] = {}
    for run in study.runs.values():
        found.setdefault(run.bundle, set()).update(r["configs"] for r in study.records(run) if r.get("configs"))
    return [
        f"Runs of the bundle {bundle} were made with {len(versions)} versions of its train.json and evaluate.json."
        for bundle, versions in found.items()
        if len(versions) > 1
    ]


def outdated_rows(study: Study, names: Collection[str] | None = None) -> list[str]:
    """A sentence that names the runs, of ``names`` or all, that were done as the description no longer says."""
    runs = [run for run in study.runs.values() if names is None or run.name in names]
    old = [f"{run.title or run.name}, seed {seed}" for run in runs for seed in study.seeds if study.outdated(run, seed)]
    return [f"Made with other settings than now: {'; '.join(old)}."] if old else []


def measured_targets(study: Study) -> list[str]:
    """Names of the targets that any run measured."""
    found: dict[str, None] = {}
    for run in study.runs.values():
        for record in study.records(run):
            found.update(
                dict.fromkeys(name for name, value in record["summary"]["targets"].items() if _GROUPS.keys() & value)
            )
    return list(found)


def markdown(study: Study) -> str:
    """The study's tables."""
    lines = [f"## {study.description.get('title', 'Study')}", ""]
    if "note" in study.description:
        lines += [study.description["note"], ""]
    lines += [f"{machine()}; seeds {', '.join(map(str, study.seeds))}.", ""]
    for sentence in (*config_versions(study), *outdated_rows(study)):
        lines += [sentence, ""]
    columns, rows = segmentation_table(study)
    if rows:
        lines += [markdown_table(columns, rows), ""]
    for target in measured_targets(study):
        columns, rows = regression_table(study, target)
        lines += [f"### {target}", "", markdown_table(columns, rows), ""]
    columns, rows = gap_table(study)
    if rows:
        lines += ["### Share of the gap that is closed", "", markdown_table(columns, rows), ""]
    columns, rows = cost_table(study)
    if rows:
        lines += ["### Cost", "", markdown_table(columns, rows), ""]
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
