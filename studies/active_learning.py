"""Which image to label next: uncertainty against chance, with the images nobody labelled and without them.

    python studies/active_learning.py --data <folder> --output output/active_learning --seeds 0,1,2

An annotator is played by a datalist all of whose training cases have labels: they count as unlabelled until a strategy
has asked for them. All strategies of a seed begin with the same cases; in each round teacher and student are trained
anew, and, to compare with, a teacher alone for as many steps as both take together. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from tqdm import tqdm

from common.data import case_name, load_section, read_datalist
from common.errors import BadInput, explain
from common.files import write_atomically
from common.metrics.uncertainty import disagreement, entropy
from common.networks import hand_over
from common.provenance import file_digest
from common.study import ROOT, Study

STRATEGIES = ("random", "entropy", "disagreement")
RUNS = {"supervised": "supervised only", "student": "with unlabelled images"}
# As studies/hippocampus.json, with smaller batches: there are many trainings. A third of the steps is the teacher's.
SETTINGS = {
    "iterations_per_epoch": 50,
    "val_interval": 1000,
    "momentum": 0.9,
    "learning_rate": 0.05,
    "mirror_axes": [0],
}
PLAN = {"width": 16, "max_width": 128, "set": {"patch_size": [32, 48, 32], "batch_size": 2}}

Case = dict[str, Any]


class Campaign:
    """The rounds of one strategy with one seed.

    Args:
        options: of the command line.
        strategy: how the next cases are chosen.
        seed: of the first cases, of chance and of the trainings.
    """

    def __init__(self, options: argparse.Namespace, strategy: str, seed: int) -> None:
        self.options = options
        self.strategy = strategy
        self.seed = seed
        content = read_datalist(options.data / options.datalist)
        self.labels = content["labels"]
        self.validation = load_section(content, "validation")
        self.pool = load_section(content, "training")

    def run(self, bar: tqdm) -> list[dict[str, Any]]:
        """All rounds; returns for each the number of labels, the cases, and the Dice of each run."""
        chance = random.Random(self.seed)
        labeled = chance.sample(self.pool, self.options.step)
        rounds = []
        for number in range(self.options.rounds):
            study = self._study(labeled, number)
            for run in study.runs.values():
                study.execute(run, self.seed)
                bar.update()
            dice = {name: study.record(study.runs[name], self.seed)["summary"]["mean_dice"] for name in RUNS}
            rounds.append({"labels": len(labeled), "cases": [case_name(case) for case in labeled], "dice": dice})
            if number + 1 < self.options.rounds:
                rest = [case for case in self.pool if case not in labeled]
                labeled = [*labeled, *self._choose(study, rest, chance)]
        return rounds

    def _study(self, labeled: Sequence[Case], number: int) -> Study:
        # The first round is that of all strategies.
        folder = self.options.output / (self.strategy if number else "first") / f"round{number}_seed{self.seed}"
        unlabeled = [{"image": case["image"]} for case in self.pool if case not in labeled]
        datalist = folder / "datalist.json"
        sections = {"training": list(labeled), "unlabeled": unlabeled, "validation": self.validation}
        write_atomically(datalist, json.dumps({"labels": self.labels, **sections}, indent=1))
        steps = self.options.epochs
        runs = {
            "teacher": {"bundle": "teacher", "datalist": str(datalist), "epochs": steps},
            "student": {"bundle": "student", "datalist": str(datalist), "epochs": 2 * steps, "teacher": "teacher"},
            "supervised": {"bundle": "teacher", "datalist": str(datalist), "epochs": 3 * steps},
        }
        plan = json.loads((self.options.output / "plan.json").read_text())
        description = {"plan": {"set": plan}, "set": SETTINGS, "runs": runs}
        return Study(description, self.options.data, folder, [self.seed], self.options.device)

    def _choose(self, study: Study, cases: Sequence[Case], chance: random.Random) -> list[Case]:
        if self.strategy == "random":
            return chance.sample(list(cases), self.options.step)
        scores = self._scores(study, cases)
        best = sorted(cases, key=lambda case: -scores[case_name(case)])
        return best[: self.options.step]

    @torch.no_grad()
    def _scores(self, study: Study, cases: Sequence[Case]) -> Mapping[str, float]:
        path = study.output / f"{self.strategy}.json"
        weights = {stage: study.model(stage, self.seed) for stage in ("teacher", "student")}
        # Scores of other weights, or of other cases, would choose as if nothing had changed.
        made_with = {stage: file_digest(file) for stage, file in weights.items()}
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get("made_with") == made_with and set(known["scores"]) == {case_name(case) for case in cases}:
            return known["scores"]
        device = self.options.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
        parsers = {}
        for stage in ("teacher", "student"):
            parsers[stage] = parser = ConfigParser()
            parser.read_config(
                [str(ROOT / "bundles" / stage / "configs" / "inference.json"), str(self.options.output / "plan.json")]
            )
            parser["device"] = device
            hand_over(parser.get_parsed_content("network").eval(), weights[stage])
        scores = {}
        for case in cases:
            image = parsers["student"].get_parsed_content("preprocessing")({"image": case["image"]})["image"][None]
            logits = {
                stage: parser.get_parsed_content("inferer")(image, parser.get_parsed_content("network"))[0].as_tensor()
                for stage, parser in parsers.items()
            }
            both = logits["teacher"], logits["student"]
            scores[case_name(case)] = entropy(both[1]) if self.strategy == "entropy" else disagreement(*both)
        write_atomically(path, json.dumps({"made_with": made_with, "scores": scores}, indent=1))
        return scores


def table(results: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]) -> str:
    """A Markdown table: mean Dice over the seeds, and its standard deviation, for each number of labels."""
    first = next(iter(next(iter(results.values())).values()))
    counts = [entry["labels"] for entry in first]
    lines = ["| next image | training | " + " | ".join(f"{count} labels" for count in counts) + " |"]
    lines.append("|---|---|" + "---|" * len(counts))
    for strategy, seeds in results.items():
        for run, title in RUNS.items():
            cells = []
            for number in range(len(counts)):
                values = [rounds[number]["dice"][run] for rounds in seeds.values()]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.3f}{spread}")
            lines.append(f"| {strategy} | {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Mean Dice over the number of labels: a line a strategy and training, a thin one a seed."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for index, (strategy, seeds) in enumerate(results.items()):
        for run, title in RUNS.items():
            style = {"color": f"C{index}", "linestyle": "-" if run == "student" else "--"}
            curves = [[entry["dice"][run] for entry in rounds] for rounds in seeds.values()]
            counts = [entry["labels"] for entry in next(iter(seeds.values()))]
            for curve in curves:
                axes.plot(counts, curve, linewidth=0.5, alpha=0.5, **style)
            mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            axes.plot(counts, mean, linewidth=2, marker="o", label=f"{strategy}, {title}", **style)
    axes.set(xlabel="labelled volumes", ylabel="mean Dice of the validation volumes", xticks=counts)
    axes.legend(fontsize="small", handlelength=5)  # long enough to tell dashed lines from others
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the datalist, such as hippocampus")
    parser.add_argument("--datalist", default="datalist_full.json", help="one whose training cases all have labels")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--seeds", default="0", help="comma-separated, for instance 0,1,2")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--step", type=int, default=4, help="labels at the start, and more a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=6, help="of a teacher; a student takes twice as many")
    parser.add_argument("--device", help="for instance cpu or cuda:0; by default a GPU when there is one")
    options = parser.parse_args(arguments)
    options.data, options.output = options.data.resolve(), options.output.resolve()
    strategies = options.strategies.split(",")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if unknown := set(strategies) - set(STRATEGIES):
        raise BadInput(f"--strategies: found {sorted(unknown)}, expected some of {list(STRATEGIES)}.")
    # One plan for all rounds, so that they differ by their labels alone.
    Study({"plan": {"datalist": options.datalist, **PLAN}, "runs": {}}, options.data, options.output).write_plan()
    total = len(strategies) * len(seeds) * options.rounds * 3
    results: dict[str, dict[int, list[dict[str, Any]]]] = {}
    with tqdm(total=total, desc="active learning", unit="run", disable=None) as bar:
        for strategy in strategies:
            for seed in seeds:
                rounds = Campaign(options, strategy, seed).run(bar)
                results.setdefault(strategy, {})[seed] = rounds
                write_atomically(options.output / "results.json", json.dumps(results, indent=1))
    write_atomically(options.output / "results.md", table(results))
    plot(results, options.output / "results.png")
    print(table(results))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BadInput, OSError, ValueError) as error:
        print(f"error: {explain(error) or error}", file=sys.stderr)
        sys.exit(1)
