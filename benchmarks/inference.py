"""Prediction of a whole volume: the project's windows beside the literature's, and two answers in one pass.

    python -m benchmarks inference

Networks have random weights, which costs the same as trained ones. Each row is measured in a process of its own; memory
is what the process holds at its peak beyond what it held before the volume was made.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.measuring import device_name, fastest, in_own_process, peak_memory, table
from common.engines import start
from common.inferers import SlidingWindow
from common.networks import DualDecoderNetwork, RegressionNetwork, SegmentationNetwork
from common.networks.vnet import VNet

TARGETS = [{"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": 0, "scale": 2.0}]
SHAPE = {"features": [16, 32, 64, 128], "kernel_sizes": [3, 3, 3, 3], "strides": [1, 2, 2, 2]}
LEFT_ATRIUM = {"roi_size": (112, 112, 80)}
LITERATURE = {**LEFT_ATRIUM, "stride": (18, 18, 4), "mode": "constant", "average": "probabilities"}


@dataclass(frozen=True)
class Row:
    """Networks that read one volume, one after the other.

    Args:
        networks: what makes each.
        volume: voxels.
        windows: settings of the inferer.
    """

    networks: tuple[Callable[[], nn.Module], ...]
    volume: tuple[int, int, int]
    windows: dict[str, Any] = field(default_factory=dict)


def _segmentation() -> nn.Module:
    return SegmentationNetwork(3, 1, 3, **SHAPE)


def _regression() -> nn.Module:
    return RegressionNetwork(3, 1, **SHAPE, targets=TARGETS)


def _dual(stages: Sequence[int] = (2,), width: float = 1.0, last_stage: int = 0, convolutions: int = 2) -> nn.Module:
    return DualDecoderNetwork(
        *(3, 1, 3),
        **SHAPE,
        targets=TARGETS,
        attention_stages=stages,
        attention_window=4,
        regression_width=width,
        regression_stage=last_stage,
        regression_convolutions=convolutions,
    )


def _vnet() -> nn.Module:
    return VNet(3, 1, 2)


TURNS = 5
ATRIUM, CHEST = (175, 132, 88), (128, 128, 128)
SMALL = {"roi_size": (64, 64, 64)}
TITLES = {
    "left_atrium": "Left atrium, 175 x 132 x 88, V-Net, windows of 112 x 112 x 80",
    "thickness": "Segmentation and thickness, 128 x 128 x 128, windows of 64 x 64 x 64",
}
#: tables, the first row of each is what the others are compared with
TABLES = {
    "left_atrium": {
        "stride 18/18/4, fp32 (literature)": Row((_vnet,), ATRIUM, {**LITERATURE, "amp": False}),
        "stride 18/18/4": Row((_vnet,), ATRIUM, LITERATURE),
        "overlap 0.5, fp32": Row((_vnet,), ATRIUM, {**LEFT_ATRIUM, "amp": False}),
        "overlap 0.5 (default)": Row((_vnet,), ATRIUM, LEFT_ATRIUM),
        "overlap 0.25": Row((_vnet,), ATRIUM, {**LEFT_ATRIUM, "overlap": 0.25}),
    },
    "thickness": {
        "two networks": Row((_segmentation, _regression), CHEST, SMALL),
        "segmentation network": Row((_segmentation,), CHEST, SMALL),
        "regression network": Row((_regression,), CHEST, SMALL),
        "dual decoder": Row((_dual,), CHEST, SMALL),
        "- no attention": Row((partial(_dual, []),), CHEST, SMALL),
        "- attention at stage 1, too": Row((partial(_dual, [1, 2]),), CHEST, SMALL),
        "- half the channels in the regression decoder": Row((partial(_dual, [2], 0.5),), CHEST, SMALL),
        "- and one convolution a stage": Row((partial(_dual, [2], 0.5, 0, 1),), CHEST, SMALL),
        "- regression at half resolution": Row((partial(_dual, [2], 1.0, 1),), CHEST, SMALL),
        "- and half the channels in the regression decoder": Row((partial(_dual, [2], 0.5, 1),), CHEST, SMALL),
    },
}


def _prediction(row: Row, device: str) -> tuple[Callable[[], Any], int]:
    """What predicts a row's volume, and its number of weights."""
    networks = [make().to(device).eval() for make in row.networks]
    inferer = SlidingWindow(**row.windows)
    volume = torch.randn(1, 1, *row.volume)
    weights = sum(p.numel() for network in networks for p in network.parameters())
    return lambda: [inferer(volume, network) for network in networks], weights


@torch.no_grad()
def measure(row: Row, base: Row, device: str) -> dict[str, Any]:
    """Seconds and peak memory of one volume, and how it compares with another row, by turns: machines have moods."""
    start(0, device)
    before = peak_memory(device, reset=True)
    predict, weights = _prediction(row, device)
    predict()
    most = peak_memory(device) - before
    of_base, _ = _prediction(base, device)
    of_base()
    times = [[fastest(call, device, repeats=1, warm_up=0) for call in (predict, of_base)] for _ in range(TURNS)]
    return {
        "seconds": statistics.median(own for own, _ in times),
        "ratios": sorted(own / other for own, other in times),
        "bytes": most,
        "parameters": weights,
    }


def report(table_name: str, device: str) -> str:
    """One table."""
    found = {
        name: in_own_process("inference", ["--one", json.dumps([table_name, name]), "--device", device])
        for name in TABLES[table_name]
    }
    cells = [
        [
            name,
            f"{item['seconds']:.2f}",
            f"{statistics.median(item['ratios']):.2f}",
            f"{item['ratios'][0]:.2f} to {item['ratios'][-1]:.2f}",
            f"{1 / statistics.median(item['ratios']):.1f}",
            f"{item['bytes'] / 2**20:.0f}",
            f"{item['parameters'] / 1e6:.2f}",
        ]
        for name, item in found.items()
    ]
    titles = ["", "volume [s]", "ratio", "in single turns", "times as fast", "memory [MiB]", "weights [M]"]
    return "\n".join([f"### {TITLES[table_name]}", "", f"{device_name(device)}.", "", table(titles, cells)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks inference``."""
    parser.add_argument("--only", choices=TABLES, help="one table; by default all")
    parser.add_argument("--one", help=argparse.SUPPRESS)


def main(options: argparse.Namespace) -> str:
    """The Markdown."""
    if options.one is not None:
        table_name, name = json.loads(options.one)
        base = next(iter(TABLES[table_name].values()))
        return json.dumps(measure(TABLES[table_name][name], base, options.device))
    return "\n\n".join(report(name, options.device) for name in ([options.only] if options.only else TABLES))
