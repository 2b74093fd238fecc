"""Parameters and FLOPs of the U-Net made of DyBAC beside the plain one of the same widths.

    python -m benchmarks dynamic_convolution

FLOPs are those of one forward pass of one crop, two a multiply-add. Nothing is computed: the tensors have shapes only.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import table
from common.networks import SegmentationNetwork
from common.networks.dynamic_convolution import DyBACNetwork

# What it is for, features, and the crop in voxels; every stage but the first halves the crop.
SIZES = (
    ("bundles' default", (16, 32, 64, 128), (32, 32, 32)),
    ("left atrium, V-Net's widths", (16, 32, 64, 128, 256), (112, 112, 80)),
    ("nnU-Net, 3D", (32, 64, 128, 256, 320, 320), (128, 128, 128)),
    ("nnU-Net, 2D", (32, 64, 128, 256, 512, 512, 512), (256, 256)),
)


def cost(network: type[SegmentationNetwork], features: Sequence[int], crop: Sequence[int]) -> tuple[int, int]:
    """Number of parameters, and FLOPs of one crop of one channel with two classes."""
    stages = len(features)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = network(len(crop), 1, 2, features, [3] * stages, [1] + [2] * (stages - 1))
        model(torch.empty(1, 1, *crop))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks dynamic_convolution``: none of its own."""


def main(options: argparse.Namespace) -> str:
    """The Markdown."""
    rows = []
    for name, features, crop in SIZES:
        plain, dynamic = cost(SegmentationNetwork, features, crop), cost(DyBACNetwork, features, crop)
        cells = [name, " ".join(map(str, features)), " x ".join(map(str, crop))]
        for before, after, unit, digits in zip(plain, dynamic, (1e6, 1e9), (2, 1), strict=True):
            suffix = " M" if unit == 1e6 else ""
            cells += [f"{value / unit:.{digits}f}{suffix}" for value in (before, after)]
            cells.append(f"{1 - after / before:.0%}")
        rows.append(cells)
    titles = ["network", "features", "crop", "parameters, plain", "DyBAC", "saved", "GFLOPs, plain", "DyBAC", "saved"]
    return table(titles, rows)
