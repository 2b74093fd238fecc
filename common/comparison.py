"""What a comparison of methods found: the table, paired tests against one of them, and a picture of the same slices."""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .comparison_picture import save_comparison
from .data.checks import patient_key
from .data.datalist import case_name, load_section, read_datalist
from .files import to_json, write_atomically
from .handlers.evaluation import CONVENTIONS
from .handlers.mlflow_store import SQLITE, failing_plainly, open_store, store_address
from .metrics import DISTANCE_METRICS, OVERLAP_METRICS
from .report import markdown_table
from .significance import holm, paired_test
from .study import Run, Study
from .tables import best_among_equals, config_versions, deployed_parameters, machine, outdated_rows

__all__ = ["Comparison", "case_dice", "trained_parameters"]

_MEASURES = (*OVERLAP_METRICS, *DISTANCE_METRICS)
_TABLE: list[dict[str, Any]] = [
    {"key": "labelled", "title": "labelled", "better": None, "digits": 0},
    {"key": "unlabelled", "title": "unlabelled", "better": None, "digits": 0},
    {"key": "dice", "title": "Dice", "better": "higher", "digits": 3},
    {"key": "jaccard", "title": "Jaccard", "better": "higher", "digits": 3},
    {"key": "hd95", "title": "HD95 [mm]", "better": "lower", "digits": 2},
    {"key": "asd", "title": "ASD [mm]", "better": "lower", "digits": 2},
    {"key": "failed", "title": "failed", "better": None, "digits": 0},
    {"key": "minutes", "title": "training [min]", "better": None, "digits": 1},
    {"key": "parameters", "title": "parameters [M]", "better": None, "digits": 2},
    {"key": "trained", "title": "trained [M]", "better": None, "digits": 2},
]
#: beside a published protocol, whose figures are in these
_IN_VOXELS: list[dict[str, Any]] = [
    {"key": "hd95_pooled_voxels", "title": "95HD pooled [voxels]", "better": "lower", "digits": 2},
    {"key": "asd_voxels", "title": "ASD [voxels]", "better": "lower", "digits": 2},
]
_VOXELS = (
    "In voxels, as medpy has them: the 95th percentile of both directions' distances together; ASD from the prediction "
    "to the reference, not back."
)
_MOST_FAILURES = 10  # named in a sentence
_TESTS: list[dict[str, Any]] = [
    {"key": "seeds", "title": "seeds", "better": None, "digits": 0},
    {"key": "cases", "title": "n", "better": None, "digits": 0},
    {"key": "difference", "title": "difference in Dice", "better": None, "digits": 3},
    {"key": "t_test", "title": "t-test p", "better": None},
    {"key": "t_test_holm", "title": "Holm", "better": None},
    {"key": "wilcoxon", "title": "Wilcoxon p", "better": None},
    {"key": "wilcoxon_holm", "title": "Holm", "better": None},
]


def trained_parameters(path: Path) -> int | None:
    """Weights that the optimisers of a ``checkpoint.pt`` moved: each has a momentum; None where momentum is off."""
    states = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state"].values()
    total = 0
    for state in (s for s in states if "param_groups" in s):
        for kept in state["state"].values():
            momentum = kept.get("momentum_buffer", kept.get("exp_avg"))
            if momentum is None:
                return None
            total += momentum.numel()
    return total or None


def case_dice(path: Path) -> dict[str, float]:
    """Mean Dice over structures of each case of a ``metrics.csv``; without cases that hold none."""
    scores: dict[str, list[float]] = defaultdict(list)
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            # Several rows of one case are labels of other structures each.
            scores[row["case"]] += [float(value) for key, value in row.items() if key.startswith("dice/") and value]
    return {case: statistics.fmean(values) for case, values in scores.items() if values}


def _p_value(p: float) -> str | None:
    if math.isnan(p):
        return None
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def _failures(content: Mapping[str, Any]) -> list[str]:
    """A sentence for each row with cases in which a structure is missed altogether, or found where there is none."""
    sentences = []
    for row in content["rows"]:
        cases = [
            f"{failure['case']} ({failure['label']}, seed {seed})"
            for seed, failures in zip(content["seeds"], row["failures"], strict=True)
            for failure in failures or ()
        ]
        if cases:
            shown = ", ".join(cases[:_MOST_FAILURES])
            more = f" and {len(cases) - _MOST_FAILURES} more, in compare.json" if len(cases) > _MOST_FAILURES else ""
            sentences.append(f"Failed of {row['name']}: {shown}{more}.")
    return sentences


class Comparison:
    """The results of a study whose runs are rows of one table.

    Args:
        study: with its runs done, or some of them.
        rows: names of the runs to show; the others are steps on the way.
        reference: the row that the others are tested against.
    """

    def __init__(self, study: Study, rows: Sequence[str], reference: str) -> None:
        self.study = study
        self.runs = [study.runs[name] for name in rows]
        self.reference = study.runs[reference]
        self.section = study.description.get("set", {}).get("section", "validation")
        self.cases = {
            case_name(entry): entry
            for entry in load_section(study.data / self.reference.datalist, self.section, required=False)
        }
        patients = {case: patient_key(entry) for case, entry in self.cases.items()}
        #: the patient of each case that has one
        self.patients = {case: patient for case, patient in patients.items() if patient is not None}

    def write(self, failures: Sequence[str] = ()) -> str:
        """Write ``compare.md``, ``compare.json`` and ``compare.png``, log them, and return the Markdown."""
        output = self.study.output
        content = {
            "title": self.study.description.get("title", "Comparison"),
            **self._origin(),
            "note": self.study.description.get("note"),
            "seeds": self.study.seeds,
            "conventions": CONVENTIONS,
            "rows": [self.row(run) for run in self.runs],
            "reference": self.reference.name,
            "tests": self.tests(),
            "failures": list(failures),
        }
        # Neither the picture nor another's store is a reason to keep the figures of days back.
        try:
            content["picture"] = self._picture(output / "compare.png")
        except Exception as error:
            content["picture"] = None
            content["failures"].append(f"picture: {error}")
            (output / "compare.png").unlink(missing_ok=True)
        text = self._save(content)
        beside = output.resolve() / "mlruns.db"
        uri = store_address(self.study.description.get("set", {}).get("tracking_uri"), beside)
        try:
            with failing_plainly(uri):
                self._log(content, uri, output.resolve() / "mlartifacts" if uri == f"{SQLITE}{beside}" else None)
        except Exception as error:
            content["failures"].append(f"MLflow: {error}")
            text = self._save(content)
        return text

    def _save(self, content: Mapping[str, Any]) -> str:
        text = self._markdown(content)
        write_atomically(self.study.output / "compare.json", to_json(content))
        write_atomically(self.study.output / "compare.md", text + "\n")
        return text

    def _origin(self) -> dict[str, Any]:
        """The machines and the commits that the rows come from, those that they start from included; and what to know.

        A remark says which rows are not as their description now asks for, and what their evaluations say of
        themselves.
        """
        study = self.study
        needed = {name for run in self.runs for name in (run.name, *run.parents)}
        while more := {name for run in needed for name in study.runs[run].parents} - needed:
            needed |= more
        runs = [run for run in study.runs.values() if run.name in needed]
        records = [record for run in runs for record in study.records(run)]
        remarks = outdated_rows(study, needed)
        remarks += dict.fromkeys(record["summary"]["note"] for record in records if record["summary"].get("note"))
        return {
            "machine": "; ".join(dict.fromkeys(record.get("machine") or machine() for record in records)) or machine(),
            "commits": sorted({str(record.get("commit")) for record in records}),
            "remarks": [*config_versions(study), *remarks],
        }

    def row(self, run: Run) -> dict[str, Any]:
        """A row: one value a seed where it depends on the seed, None for a seed that is not done.

        ``dice`` and its like are means over structures of the means over cases, ``dice/<label>`` those of one; a mean
        over structures of which one has no figure does not exist.
        """
        records = self.study.records_by_seed(run)
        summaries = [records[seed]["summary"] if seed in records else None for seed in self.study.seeds]
        names = next((list(summary["labels"]) for summary in summaries if summary), [])
        datalist = read_datalist(self.study.data / run.datalist)
        row: dict[str, Any] = {
            "run": run.name,
            "name": run.title or run.name,
            "labelled": len(datalist.get("training", ())),
            "unlabelled": len(datalist.get("unlabeled", ())) if run.bundle == "student" else 0,
        }
        for measure in _MEASURES:
            per_label: list[list[Any]] = [
                [s["labels"][name][measure]["mean"] for name in names] if s else [None] for s in summaries
            ]
            row[measure] = [statistics.fmean(values) if None not in values else None for values in per_label]
            for index, name in enumerate(names):
                row[f"{measure}/{name}"] = [values[index] if values != [None] else None for values in per_label]
        failed = [sum(s["labels"][name]["failed"] for name in names) if s else None for s in summaries]
        row["failed"] = failed
        row["failures"] = [s.get("failures", []) if s else None for s in summaries]
        row["minutes"] = [self._minutes(run, seed) for seed in self.study.seeds]
        row["parameters"], row["trained"] = self._parameters(run, next(iter(records), None))
        return row

    def _minutes(self, run: Run, seed: int) -> float | None:
        """Training time, that of the runs whose weights it starts from included."""
        record = self.study.records_by_seed(run).get(seed)
        if record is None:
            return None
        parents = [self.study.runs[name] for name in run.parents]
        return record["train_seconds"] / 60 + sum(self._minutes(parent, seed) or 0.0 for parent in parents)

    def _parameters(self, run: Run, seed: int | None) -> tuple[int | None, int | None]:
        if seed is None:
            return None, None
        folder = self.study.folder(run, seed)
        model, checkpoint = folder / "models" / "model.pt", folder / "train" / "checkpoint.pt"
        return (
            deployed_parameters(model) if model.exists() else None,
            trained_parameters(checkpoint) if checkpoint.exists() else None,
        )

    def scores(self, run: Run, seeds: Sequence[int]) -> dict[str, float]:
        """Mean Dice of each case, averaged over seeds; only cases that have a figure with each of them."""
        tables = [case_dice(self.study.folder(run, seed) / "test" / "metrics.csv") for seed in seeds]
        cases = set.intersection(*map(set, tables)) if tables else set()
        return {case: statistics.fmean(table[case] for table in tables) for case in sorted(cases)}

    def tests(self) -> list[dict[str, Any]]:
        """Every row against the reference: paired over what is independent, the datalist's patients or else its cases.

        Each pair is compared over the seeds that both rows have.
        """
        units = {case: f"patient {patient}" for case, patient in self.patients.items()}
        found = []
        for run in self.runs:
            done = [self.study.records_by_seed(r) for r in (run, self.reference)]
            seeds = [seed for seed in self.study.seeds if all(seed in records for records in done)]
            if run is self.reference or not seeds:
                continue
            scored = [self.scores(side, seeds) for side in (run, self.reference)]
            both = scored[0].keys() & scored[1].keys()
            sides = []
            for scores in scored:
                grouped = defaultdict(list)
                for case in sorted(both):
                    grouped[units.get(case, case)].append(scores[case])
                sides.append({unit: statistics.fmean(values) for unit, values in grouped.items()})
            test = paired_test(*sides)
            left_out = sorted((scored[0].keys() | scored[1].keys()) - both)
            entry = {"run": run.name, "name": run.title or run.name, "seeds": seeds, **vars(test)}
            found.append({**entry, "left_out": left_out})
        for key in ("t_test", "wilcoxon"):
            for entry, corrected in zip(found, holm([entry[key] for entry in found]), strict=True):
                entry[f"{key}_holm"] = corrected
        return found

    def _markdown(self, content: Mapping[str, Any]) -> str:
        def shown(row: Mapping[str, Any]) -> dict[str, Any]:
            failed = [count for count in row["failed"] if count is not None]
            millions = {k: None if row[k] is None else row[k] / 1e6 for k in ("parameters", "trained")}
            counts = {k: str(row[k]) for k in ("labelled", "unlabelled")}
            return {**row, **millions, **counts, "failed": str(sum(failed)) if failed else None}

        rows = [shown(row) for row in content["rows"]]
        names = list(dict.fromkeys(key for row in rows for key in row if key.startswith("dice/")))
        lines = [f"## {content['title']}", ""]
        seeds = ", ".join(map(str, content["seeds"]))
        lines += [f"{content['machine']}; seeds {seeds}; mean ± standard deviation over seeds.", ""]
        if len(content["commits"]) > 1:
            short = [commit.rstrip("+")[:7] + "+" * commit.endswith("+") for commit in content["commits"]]
            lines += [f"Rows were trained by several versions of the code: {', '.join(short)}.", ""]
        for sentence in content["remarks"]:
            lines += [sentence, ""]
        columns = _TABLE[:6] + (_IN_VOXELS if self.study.description.get("protocol") else []) + _TABLE[6:]
        lines += [markdown_table(best_among_equals(columns, rows), rows), ""]
        if "note" in self.study.description:
            lines += [self.study.description["note"], ""]
        if any(run.teacher for run in self.runs):
            lines += ["Rows that start from a teacher: its steps and minutes are counted among theirs.", ""]
        lines += [
            "Means over structures of the means over cases.",
            *(f"{name.upper()}: {CONVENTIONS[name]}." for name in ("hd95", "asd")),
            *([_VOXELS] if self.study.description.get("protocol") else []),
            f"Failed, all seeds together: {CONVENTIONS['failed']}; then no distance is marked as best.",
            "Parameters are those of the weights to use; trained those that an optimiser moved.",
            *_failures(content),
            "",
        ]
        if len(names) > 1:
            columns = [{"key": key, "title": key.replace("dice/", "Dice "), "better": "higher"} for key in names]
            lines += [markdown_table(columns, rows), ""]
        reference = self.reference.title or self.reference.name
        if content["tests"]:
            unit = "patient" if self.patients else "case"
            lines += [f"### Against {reference}", ""]
            tests = [
                {k: _p_value(v) if k.startswith(("t_", "wil")) else v for k, v in test.items()}
                for test in content["tests"]
            ]
            texts = [
                {"cases": str(test["cases"]), "seeds": ", ".join(map(str, test["seeds"]))} for test in content["tests"]
            ]
            lines += [markdown_table(_TESTS, [{**test, **text} for test, text in zip(tests, texts, strict=True)]), ""]
            count = sum(math.isfinite(test["t_test"]) for test in content["tests"])
            lines += [
                f"Paired over the {unit}s (n), whose Dice is averaged over structures and the seeds that both rows "
                "have: two-sided p of the paired t-test and of Wilcoxon's signed-rank test, each corrected by Holm for "
                f"{count} rows. They say whether a difference would hold on other cases, not how much training again "
                "would change it.",
                *(
                    f"Left out against {test['name']}, since of one of the two nothing can be scored there with every "
                    f"seed: {', '.join(test['left_out'])}."
                    for test in content["tests"]
                    if test["left_out"]
                ),
                "",
            ]
        if content["picture"]:
            picture = content["picture"]
            lines += [f"Median case of {reference}, {picture['case']}, seed {picture['seed']}:", ""]
            lines += ["![Image, reference and every method](compare.png)", ""]
        lines += [f"Not done: {failure}" for failure in content["failures"]]
        return "\n".join(lines).rstrip()

    def _picture(self, path: Path) -> dict[str, Any] | None:
        """Draw the case whose Dice is the median of the reference's first seed that is done; says which it is."""
        seed = next(iter(self.study.records_by_seed(self.reference)), None)
        scores = {} if seed is None else self.scores(self.reference, [seed])
        ranked = sorted((case for case in scores if case in self.cases), key=scores.__getitem__)
        if seed is None or not ranked:
            return None
        case = ranked[(len(ranked) - 1) // 2]
        predictions = {}
        for run in self.runs:
            folder = self.study.folder(run, seed) / "test"
            file = folder / "predictions" / f"{case}_seg.nii.gz"
            if seed in self.study.records_by_seed(run) and file.exists():
                dice = case_dice(folder / "metrics.csv").get(case, math.nan)
                predictions[f"{run.title or run.name}\n{dice:.3f}"] = file
        save_comparison(path, self.cases[case]["image"], self.cases[case]["label"], predictions)
        return {"case": case, "seed": seed}

    def _log(self, content: Mapping[str, Any], uri: str, artifacts: Path | None) -> None:
        """The means as one MLflow run, with the three files, which go to ``artifacts`` if the store has no place."""
        from mlflow import MlflowClient  # takes seconds

        open_store(uri)
        client = MlflowClient(uri)
        found = client.get_experiment_by_name("compare")
        place = artifacts.as_uri() if artifacts else None
        experiment = found.experiment_id if found else client.create_experiment("compare", place)
        run = client.create_run(experiment, run_name=content["title"]).info.run_id
        client.log_param(run, "seeds", str(content["seeds"]))
        client.log_param(run, "reference", content["reference"])
        for row in content["rows"]:
            for measure in (*_MEASURES, "minutes"):
                values = [value for value in row[measure] if value is not None]
                if values:
                    client.log_metric(run, f"{measure}/{row['run']}", statistics.fmean(values))
        for path in sorted(self.study.output.glob("compare.*")):
            client.log_artifact(run, str(path))
        client.set_terminated(run)
