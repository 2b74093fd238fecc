"""What DoDNet's K tasks cost in one pass through encoder and decoder beside K whole passes.

    python -m benchmarks dodnet            # FLOPs, nothing is computed
    python -m benchmarks dodnet --seconds  # also seconds of one crop on this machine

FLOPs are those of a forward pass of one crop, two a multiply-add; a whole pass is that of a network with one task.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import fastest, table
from common.networks.dynamic_head import DynamicHeadNetwork

# What it is for, features, and the crop in voxels; every stage but the first halves the crop.
SIZES = (
    ("abdomen, 4 mm", (16, 32, 64, 128, 128), (48, 48, 48)),
    ("nnU-Net, 3D", (32, 64, 128, 256, 320, 320), (128, 128, 128)),
)
TASKS = (2, 4, 7, 14)


def make(features: Sequence[int], tasks: int) -> DynamicHeadNetwork:
    """A network of three dimensions for some tasks of one organ each."""
    stages = len(features)
    return DynamicHeadNetwork(3, 1, tasks + 1, features, [3] * stages, [1] + [2] * (stages - 1)).eval()


def flops(features: Sequence[int], crop: Sequence[int], tasks: int) -> int:
    """FLOPs of all tasks of one crop in one pass."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        make(features, tasks)(torch.empty(1, 1, *crop))
    return counter.get_total_flops()


@torch.no_grad()
def seconds(network: nn.Module, crop: Sequence[int], device: torch.device) -> float:
    """The fastest of some passes of one crop."""
    network, image = network.to(device), torch.randn(1, 1, *crop, device=device)
    return fastest(lambda: network(image), device, repeats=5)


def costs(device: torch.device | None = None) -> str:
    """The markdown table; with seconds where a device is given."""
    titles = ["network", "crop", "tasks", "GFLOPs, one pass", "K passes", "ratio"]
    titles += ["seconds, one pass", "K passes", "ratio"] if device is not None else []
    lines = []
    for name, features, crop in SIZES:
        single = flops(features, crop, 1)
        single_seconds = seconds(make(features, 1), crop, device) if device is not None else None
        for tasks in TASKS:
            together = flops(features, crop, tasks)
            cells = [name, " x ".join(map(str, crop)), str(tasks)]
            cells += [f"{together / 1e9:.1f}", f"{tasks * single / 1e9:.1f}", f"{together / (tasks * single):.3f}"]
            if device is not None:
                taken = seconds(make(features, tasks), crop, device)
                cells += [f"{taken:.3f}", f"{tasks * single_seconds:.3f}", f"{taken / (tasks * single_seconds):.3f}"]
            lines.append(cells)
    return table(titles, lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks dodnet``."""
    parser.add_argument("--seconds", action="store_true", help="measure seconds, too")


def main(options: argparse.Namespace) -> str:
    """The Markdown."""
    return costs(torch.device(options.device) if options.seconds else None)
