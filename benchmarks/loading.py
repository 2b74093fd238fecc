"""Loading of training batches, from files, from the cache and by worker processes, beside the step that waits for them.

    python -m benchmarks loading                                            # phantoms
    python -m benchmarks loading --data DATA/hippocampus --plan plan.json   # a folder of yours, and its plan

Batches are those of supervised training. Where loading takes longer than the step, training waits for data; the end of
each training says how long it did.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from benchmarks.measuring import device_name, in_own_process, table, time_steps
from common.data.phantom_set import generate_phantoms
from common.engines import SemiSupervisedTrainer, start
from common.study import ROOT

BATCHES, STEPS = 20, 10
#: by row: whether the deterministic part is cached, and the worker processes
VARIANTS = {"from files": (False, 0), "cached": (True, 0), "cached, 2 workers": (True, 2)}


def configuration(data: str, datalist: str, plan: str | None, folder: Path, device: str) -> ConfigParser:
    """The teacher's training on a data folder."""
    parser = ConfigParser()
    parser.read_config([str(ROOT / "bundles/teacher/configs/train.json"), *([plan] if plan else [])])
    settings = {"dataset_dir": data, "datalist": str(Path(data) / datalist), "device": device}
    parser.update({**settings, "output_dir": str(folder), "ckpt_dir": str(folder)})
    return parser


def measure(variant: str, data: str, datalist: str, plan: str | None, device: str) -> dict[str, Any]:
    """Seconds until the first batch, and a batch after it."""
    cached, workers = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as temporary:
        start(0, device)
        parser = configuration(data, datalist, plan, Path(temporary), device)
        parser["num_workers"], parser["iterations_per_epoch"] = workers, BATCHES + 1
        if not cached:
            entries = parser["train#dataset"]
            parser["train#dataset"] = {"_target_": "Dataset", **{key: entries[key] for key in ("data", "transform")}}
        began = time.perf_counter()
        batches = iter(parser.get_parsed_content("train#dataloader"))
        next(batches)
        ready = time.perf_counter()
        for _ in itertools.islice(batches, BATCHES):
            pass
        return {"first": ready - began, "seconds": (time.perf_counter() - ready) / BATCHES}


def measure_step(data: str, datalist: str, plan: str | None, device: str) -> dict[str, Any]:
    """Seconds of a training step on batches that lie ready."""
    with tempfile.TemporaryDirectory() as temporary:
        start(0, device)
        parser = configuration(data, datalist, plan, Path(temporary), device)
        parser["iterations_per_epoch"] = STEPS
        batches = list(parser.get_parsed_content("train#dataloader"))
        method, optimizer = (parser.get_parsed_content(f"train#{key}") for key in ("method", "optimizer"))
        clip = parser["gradient_clip"]
        trainer = SemiSupervisedTrainer(device, 1, batches, method, optimizer, parser["amp"], clip)
        seconds = time_steps(trainer, device)
        trainer.run()
        return {"seconds": statistics.median(seconds[1:])}


def report(data: str, datalist: str, plan: str | None, device: str) -> str:
    """The table."""
    given = ["--data", data, "--datalist", datalist, "--device", device, *(["--plan", plan] if plan else [])]
    found = {name: in_own_process("loading", ["--one", name, *given]) for name in [*VARIANTS, "step"]}
    step = found.pop("step")["seconds"]
    cells = [
        [name, f"{item['first']:.1f}", f"{item['seconds'] * 1000:.0f}", f"{item['seconds'] / step:.2f}"]
        for name, item in found.items()
    ]
    titles = ["", "first batch [s]", "batch [ms]", "batch / step"]
    return "\n".join([f"{device_name(device)}; a step takes {step * 1000:.0f} ms.", "", table(titles, cells)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks loading``."""
    parser.add_argument("--data", help="folder with a datalist; by default phantoms are made")
    parser.add_argument("--datalist", default="datalist.json", help="file name in that folder")
    parser.add_argument("--plan", help="JSON overlay: voxel size, crops, network")
    parser.add_argument("--one", help=argparse.SUPPRESS)


def main(options: argparse.Namespace) -> str:
    """The Markdown."""
    if options.one == "step":
        return json.dumps(measure_step(options.data, options.datalist, options.plan, options.device))
    if options.one is not None:
        return json.dumps(measure(options.one, options.data, options.datalist, options.plan, options.device))
    if options.data is not None:
        return report(options.data, options.datalist, options.plan, options.device)
    with tempfile.TemporaryDirectory() as folder:
        generate_phantoms(Path(folder) / "phantoms", progress=False)
        return report(str(Path(folder) / "phantoms"), options.datalist, options.plan, options.device)
