"""Seconds, memory and FLOPs of a training step: every bundle and recipe beside supervised training, as Markdown.

    python -m benchmarks training                          # crops of 32 x 32 x 32, the bundles' default network
    python -m benchmarks training --plan plan.json         # the networks and crops of a plan
    python -m benchmarks training --only supervised,ua_mt

Each row is measured in a process of its own, on random crops that go through the recipe's own augmentation once, so
nothing is loaded. A step is everything between two batches: forward and backward passes of all networks, optimisers,
moving averages. The last steps of a run are measured, when no term waits for its ramp-up. Memory is what the process
holds at its peak beyond what it held before the networks were made; on a GPU, what PyTorch had allocated at most.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import (
    convolution_share,
    device_name,
    in_own_process,
    matrix_rate,
    peak_memory,
    table,
    time_steps,
)
from common.data import collate_plain
from common.engines import SemiSupervisedTrainer, precision, start
from common.networks import save_weights, state_digest
from common.recipes import read_recipes
from common.study import ROOT
from common.targets import dense_names

SUPERVISED, LOCKED = "supervised", "dual_decoder"
#: rows of the dual decoder, and the overlays of each
DUAL = {LOCKED: (), "dual_decoder_end_to_end": ("ablations/from_scratch.json",)}
#: rows that learn a number a case, from whole volumes of two windows an axis, and their GB of cached features
WHOLE = {"dual_decoder_severity": 2.0, "dual_decoder_severity_without_cache": 0.0}
SEVERITY = {"name": "severity", "unit": "", "kind": "mean", "structure": 1}
PARTIAL_LABELS = ("co_training", "dodnet", "ms_kd")
WARM_UP, STEPS = 2, 6


def rows() -> list[str]:
    """Everything that is trained, supervised training first; no ablations."""
    recipes = [recipe.name for recipe in read_recipes().values() if not recipe.is_ablation]
    return [SUPERVISED, *recipes, *PARTIAL_LABELS, *DUAL, *WHOLE]


def configuration(name: str, folder: Path, plan: str | None, device: str) -> ConfigParser:
    """The config that trains a row, with random weights in place of those it starts from."""
    if name == SUPERVISED:
        bundle, overlays = "teacher", ()
    elif name in (*DUAL, *WHOLE):
        bundle, overlays = "dual_decoder", DUAL.get(name, ())
    else:
        recipes = read_recipes()
        bundle = "student"
        overlays = recipes[name].overlays if name in recipes else (f"recipes/{name}.json",)
    configs = ROOT / "bundles" / bundle / "configs"
    parser = ConfigParser()
    parser.read_config([str(configs / file) for file in ("train.json", *overlays)] + ([plan] if plan else []))
    parser.update({"device": device, "output_dir": str(folder), "ckpt_dir": str(folder)})
    if name in WHOLE:
        parser.update({"targets": [SEVERITY], "feature_cache": WHOLE[name]})
    if bundle == "student" and parser["teacher_path"] is not None:
        parser["teacher_path"] = str(folder / "teacher.pt")
        save_weights(parser.get_parsed_content("teacher_def"), parser["teacher_path"])
    if name == "ms_kd":
        network_def = {
            key: parser.get_parsed_content(value[1:]) if isinstance(value, str) and value.startswith("@") else value
            for key, value in parser["network_def"].items()
        }
        parser["teacher_paths"] = write_organ_teachers(folder, parser["labels"], network_def)
    return parser


def write_organ_teachers(
    folder: Path, labels: Mapping[str, str], network_def: Mapping[str, Any], **settings: Any
) -> dict[str, str]:
    """Untrained teachers of one organ each and their records, as the teacher bundle leaves them: weights by organ."""
    paths = {}
    network_def = {**network_def, "out_channels": "$len(@classes)"}
    for organ in [name for number, name in labels.items() if number != "0"]:
        network = ConfigParser({"network": {**network_def, "out_channels": 2}}).get_parsed_content("network")
        path = folder / organ / "model.pt"
        save_weights(network, path)
        config = {"labels": labels, "organ": organ, "network_def": network_def, **settings}
        record = {"weights": state_digest(network.state_dict()), "config": config}
        path.with_suffix(".json").write_text(json.dumps(record))
        paths[organ] = str(path)
    return paths


def crops(parser: ConfigParser, name: str, seed: int = 0) -> dict[str, dict[str, Any]]:
    """A batch of random crops in the row's own views: two labelled and, for a student, two unlabelled ones."""
    generator = torch.Generator().manual_seed(seed)
    size, count = parser["patch_size"], int(parser["batch_size"])
    organs = len(parser["labels"])

    def image() -> MetaTensor:
        return MetaTensor(torch.randn(int(parser["channels"]), *size, generator=generator))

    # Slabs, one a class: every class is there, in one piece.
    label = (torch.arange(size[0]) * organs // size[0]).reshape(1, -1, *[1] * (len(size) - 1)).expand(1, *size)
    labelled: list[dict[str, Any]] = [
        {"image": image(), "label": MetaTensor(label.to(torch.uint8))} for _ in range(count)
    ]
    for case, organ in zip(labelled, range(count), strict=True):
        if name in PARTIAL_LABELS:
            case["annotated"] = [1 + organ % (organs - 1)]
            case["label"] = case["label"] * (case["label"] == case["annotated"][0])
        for target in dense_names(parser.get("targets") or ()):
            case[target] = MetaTensor(torch.rand(1, *size, generator=generator) + 1)
    streams = {"labeled": labelled}
    views = {"labeled": "train#augmentation"}
    if "unlabeled" in parser["train#dataloader#streams"] and parser["train#dataloader#streams#unlabeled"] is not None:
        streams["unlabeled"] = [{"image": image()} for _ in range(count)]
        views["unlabeled"] = "train#unlabeled_augmentation"
    chains = {stream: parser.get_parsed_content(view).set_random_state(seed) for stream, view in views.items()}
    batches = {stream: collate_plain([chains[stream](case) for case in cases]) for stream, cases in streams.items()}
    if name in WHOLE:
        volume = torch.randn(1, int(parser["channels"]), *(2 * side for side in size), generator=generator)
        batches["case"] = {"image": volume, SEVERITY["name"]: torch.tensor([1.0])}
    return batches


def measure(name: str, plan: str | None, device: str) -> dict[str, Any]:
    """Seconds, FLOPs and peak memory of a step of one row; takes this process's memory for its own."""
    with tempfile.TemporaryDirectory() as temporary:
        start(0, device)
        parser = configuration(name, Path(temporary), plan, device)
        batch = crops(parser, name)
        before = peak_memory(device, reset=True)
        method = parser.get_parsed_content("train#method")
        optimizer = parser.get_parsed_content("train#optimizer")
        handlers = [parser.get_parsed_content("lock_in")] if "lock_in" in parser else []
        steps = [batch] * (WARM_UP + STEPS + 2)
        trainer = SemiSupervisedTrainer(
            device, 20, steps, method, optimizer, parser["amp"], parser["gradient_clip"], train_handlers=handlers
        )
        trainer.state.epoch, trainer.state.iteration = 19, 19 * len(steps)
        seconds, counter, profiler = time_steps(trainer, device), FlopCounterMode(display=False), profile()
        # The last step but one is profiled, the last one only counts.
        last = 20 * len(steps)
        trainer.add_event_handler(Events.ITERATION_STARTED(once=last - 1), profiler.__enter__)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=last - 1), profiler.__exit__, None, None, None)
        trainer.add_event_handler(Events.ITERATION_STARTED(once=last), counter.__enter__)
        try:
            trainer.run()
        finally:
            counter.__exit__(None, None, None)
        network = method.deployed
        return {
            "seconds": statistics.median(seconds[WARM_UP:-2]),
            "convolutions": convolution_share(profiler),
            "bytes": peak_memory(device) - before,
            "flops": counter.get_total_flops(),
            "trained": sum(p.numel() for p in method.trainable_parameters()),
            "parameters": sum(p.numel() for p in network.parameters()),
            "crop": [len(batch["labeled"]["image"]), *batch["labeled"]["image"].shape[2:]],
            "losses": {key: float(value) for key, value in trainer.state.output.items()},
        }


def report(names: Sequence[str], plan: str | None, device: str) -> str:
    """The table."""
    options = ["--device", device, *(["--plan", plan] if plan else [])]
    found = {name: in_own_process("training", ["--one", name, *options]) for name in names}
    dtype = precision("auto", device) or torch.float32
    rate = matrix_rate(dtype, device)
    base = found.get(SUPERVISED) or next(iter(found.values()))
    count, *crop = base["crop"]
    lines = [
        f"{device_name(device)}; {count} labelled crops of {' x '.join(map(str, crop))}, and as many unlabelled ones "
        f"where they are used; autocast to {str(dtype).removeprefix('torch.')}, whose matrices are multiplied at "
        f"{rate / 1e9:.0f} GFLOP/s here.",
        "",
    ]
    cells = [
        [
            name,
            f"{item['seconds']:.3f}",
            f"{item['seconds'] / base['seconds']:.2f}",
            f"{item['bytes'] / 2**20:.0f}",
            f"{item['bytes'] / base['bytes']:.2f}",
            f"{item['flops'] / 1e9:.1f}",
            f"{item['flops'] / item['seconds'] / rate:.0%}",
            f"{item['convolutions']:.0%}",
            f"{item['trained'] / 1e6:.2f}",
        ]
        for name, item in found.items()
    ]
    titles = ["", "step [s]", "ratio", "memory [MiB]", "ratio", "GFLOPs", "of the matrix rate", "in convolutions"]
    titles += ["trained weights [M]"]
    return "\n".join([*lines, table(titles, cells)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks training``."""
    parser.add_argument("--only", help="comma-separated rows; by default all")
    parser.add_argument("--plan", help="JSON overlay: network, crops, batch")
    parser.add_argument("--one", help=argparse.SUPPRESS)


def main(options: argparse.Namespace) -> str:
    """The Markdown."""
    if options.one is not None:
        return json.dumps(measure(options.one, options.plan, options.device))
    names = options.only.split(",") if options.only else rows()
    unknown = set(names) - set(rows())
    if unknown:
        raise SystemExit(f"--only: there is no row {', '.join(sorted(unknown))}; choose from {', '.join(rows())}.")
    return report(names, options.plan, options.device)
