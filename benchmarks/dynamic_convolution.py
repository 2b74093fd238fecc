"""Parameters and FLOPs of the U-Net and the V-Net made of DyBAC beside the plain ones of the same widths.

    python -m benchmarks dynamic_convolution

FLOPs are those of one forward pass of one crop, two a multiply-add. Nothing is computed: the tensors have shapes only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import table
from common.networks import SegmentationNetwork
from common.networks.dynamic_convolution import DyBACNetwork, DyBACVNet
from common.networks.vnet import VNet

# What it is for, features, and the crop in voxels; every stage but the first halves the crop.
SIZES = (
    ("bundles' default", (16, 32, 64, 128), (32, 32, 32)),
    ("left atrium, the protocol's V-Net", (16, 32, 64, 128, 256), (112, 112, 80)),
    ("nnU-Net, 3D", (32, 64, 128, 256, 320, 320), (128, 128, 128)),
    ("nnU-Net, 2D", (32, 64, 128, 256, 512, 512, 512), (256, 256)),
)


def cost(make: Callable[[], nn.Module], crop: Sequence[int]) -> tuple[int, int]:
    """Number of parameters, and FLOPs of one crop of one channel with two classes."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = make()
        model(torch.empty(1, 1, *crop))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks dynamic_convolution``: none of its own."""


def main(options: argparse.Namespace) -> str:
    """The Markdown."""
    rows = []
    for name, features, crop in SIZES:
        if "V-Net" in name:
            makes = [partial(kind, len(crop), 1, 2, features) for kind in (VNet, DyBACVNet)]
        else:
            stages = ([3] * len(features), [1] + [2] * (len(features) - 1))
            makes = [partial(kind, len(crop), 1, 2, features, *stages) for kind in (SegmentationNetwork, DyBACNetwork)]
        plain, dynamic = (cost(make, crop) for make in makes)
        cells = [name, " ".join(map(str, features)), " x ".join(map(str, crop))]
        for before, after, unit, digits in zip(plain, dynamic, (1e6, 1e9), (2, 1), strict=True):
            suffix = " M" if unit == 1e6 else ""
            cells += [f"{value / unit:.{digits}f}{suffix}" for value in (before, after)]
            cells.append(f"{1 - after / before:.0%}")
        rows.append(cells)
    titles = ["network", "features", "crop", "parameters, plain", "DyBAC", "saved", "GFLOPs, plain", "DyBAC", "saved"]
    return table(titles, rows)
