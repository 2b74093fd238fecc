"""A training step of the project beside the plain loop that one writes by hand, and what each setting brings.

    python -m benchmarks plain_loop                 # the left atrium's V-Net, small crops and flat ones
    python -m benchmarks plain_loop --only small

The plain loop is fp32, PyTorch's default order in memory and the system's default allocator. Every row does the same
arithmetic on the same crops from the same weights with the same optimiser, in a process of its own; ``project`` is the
engine as the bundles run it. How far a loss of any step lies from the plain loop's says whether the result is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ignite.engine import Events
from monai.networks.nets import DynUNet, UNet
from torch import Tensor, nn
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
from common.engines import SemiSupervisedTrainer, precision, start
from common.engines.allocator import keep_pages
from common.losses import SegmentationLoss
from common.methods import Supervised
from common.networks import SegmentationNetwork
from common.networks.layout import ChannelsLast
from common.networks.vnet import VNet

WARM_UP = 1


@dataclass(frozen=True)
class Size:
    """Networks on crops of one size.

    Args:
        title: of the table.
        crop: batch and voxels.
        networks: by name, the project's own first.
        steps: of which the first is not timed.
    """

    title: str
    crop: tuple[int, ...]
    networks: dict[str, Callable[[], nn.Module]]
    steps: int


def _dynunet(channels: Sequence[int]) -> DynUNet:
    strides = [1] + [2] * (len(channels) - 1)
    return DynUNet(3, 1, 2, [3] * len(channels), strides, strides[1:], filters=list(channels), norm_name="instance")


def _unet(channels: Sequence[int]) -> UNet:
    return UNet(3, 1, 2, channels, [2] * (len(channels) - 1), num_res_units=2, norm="batch")


SIZES = {
    "left_atrium": Size(
        "V-Net, 4 crops of 112 x 112 x 80: the left atrium's protocol",
        (4, 112, 112, 80),
        {
            "V-Net": lambda: VNet(3, 1, 2, dropout=0.0),
            "MONAI UNet 16-256": lambda: _unet([16, 32, 64, 128, 256]),
            "MONAI DynUNet 16-256": lambda: _dynunet([16, 32, 64, 128, 256]),
        },
        4,
    ),
    "small": Size(
        "nnU-Net's network of the hippocampus, 4 crops of 32 x 48 x 32",
        (4, 32, 48, 32),
        {
            "network 16-128": lambda: SegmentationNetwork(3, 1, 2, [16, 32, 64, 128], [3] * 4, [1, 2, 2, 2]),
            "MONAI UNet 16-128": lambda: _unet([16, 32, 64, 128]),
            "MONAI DynUNet 16-128": lambda: _dynunet([16, 32, 64, 128]),
        },
        31,
    ),
    "heart": Size(
        "nnU-Net's network of the heart, 2 crops of 96 x 96 x 8",
        (2, 96, 96, 8),
        {
            "network 16-128": lambda: SegmentationNetwork(
                *(3, 1, 4, [16, 32, 64, 128, 128]),
                kernel_sizes=[[3, 3, 1], [3, 3, 1], 3, 3, 3],
                strides=[1, [2, 2, 1], [2, 2, 1], 2, [2, 2, 1]],
            )
        },
        16,
    ),
}
#: settings of a row, in the order of the table; MONAI's networks are run in the plain loop alone
VARIANTS = {
    "plain loop": set(),
    "+ allocator": {"allocator"},
    "+ bf16": {"allocator", "bf16"},
    "+ channels last": {"allocator", "bf16", "channels_last"},
    "project": {"engine", "bf16"},
    "project, compile true": {"engine", "bf16", "compile"},
    "project, amp false": {"engine"},
}


def crops(size: Size, steps: int) -> list[dict[str, Tensor]]:
    """Random crops with something to learn: the label is where a smoothed image is bright."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(steps):
        image = torch.randn(size.crop[0], 1, *size.crop[1:], generator=generator)
        kernel = [min(9, (length - 1) // 2 * 2 + 1) for length in size.crop[1:]]
        around = [length // 2 for length in kernel]
        smooth = nn.functional.avg_pool3d(image, kernel, stride=1, padding=around, count_include_pad=False)
        batches.append({"image": image + 20 * smooth, "label": (smooth > 0.03).long()})
    return batches


def measure(size: Size, network_name: str, variant: str, device: str) -> dict[str, Any]:
    """Seconds of a step, peak memory, FLOPs and losses of one row."""
    settings = VARIANTS[variant]
    if "engine" in settings:
        start(0, device)
    torch.manual_seed(0)
    network = size.networks[network_name]().to(device)
    batches = crops(size, size.steps)
    if "allocator" in settings:
        keep_pages()
    if hasattr(network, "encoder") and not settings & {"channels_last", "engine"}:
        network.encoder.lay_out = ChannelsLast(False)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    loss_function = SegmentationLoss()
    dtype = precision(True, device) if "bf16" in settings else None
    before = peak_memory(device, reset=True)
    losses: list[float] = []
    seconds: list[float] = []
    if "engine" in settings:
        trainer = SemiSupervisedTrainer(
            *(device, 1, [{"labeled": batch} for batch in batches], Supervised(network), optimizer),
            amp="auto" if "bf16" in settings else False,
            gradient_clip=None,
            compile="compile" in settings,
        )
        seconds = time_steps(trainer, device)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output["loss"]))
        trainer.run()
    else:
        network.train()
        for batch in batches:
            began_at = time.perf_counter()
            image, label = batch["image"].to(device), batch["label"].to(device)
            optimizer.zero_grad()
            with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
                loss = loss_function(_logits(network, image), label)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - began_at)
    peak = peak_memory(device) - before
    image, label = batches[0]["image"].to(device), batches[0]["label"].to(device)

    def passes() -> None:
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
            loss = loss_function(_logits(network, image), label)
        loss.backward()

    with FlopCounterMode(display=False) as counter:
        passes()
    with profile() as profiler:
        passes()
    return {
        "seconds": statistics.median(seconds[WARM_UP:]),
        "first": seconds[0],
        "bytes": peak,
        "flops": counter.get_total_flops(),
        "convolutions": convolution_share(profiler),
        "losses": losses,
        "parameters": sum(p.numel() for p in network.parameters()),
    }


def _logits(network: nn.Module, image: Tensor) -> list[Tensor]:
    """The outputs of all levels, as the project's loss takes them; of MONAI's networks the one they have."""
    if hasattr(network, "forward_all"):
        return network.forward_all(image)[1]
    return [network(image).float()]


def report(name: str, device: str) -> str:
    """The table of one size."""
    size = SIZES[name]
    own, *others = size.networks
    rows = [(own, variant) for variant in VARIANTS] + [(other, "plain loop") for other in others]
    found = {row: in_own_process("plain_loop", ["--one", json.dumps([name, *row]), "--device", device]) for row in rows}
    base = found[own, "plain loop"]
    formats = {True: precision("auto", device) or torch.float32, False: torch.float32}
    rates = {mixed: matrix_rate(dtype, device) for mixed, dtype in formats.items()}
    cells = [
        [
            f"{network}, {variant}",
            f"{item['first']:.1f}",
            f"{item['seconds']:.3f}",
            f"{base['seconds'] / item['seconds']:.2f}",
            f"{item['bytes'] / 2**20:.0f}",
            f"{item['flops'] / 1e9:.0f}",
            f"{item['flops'] / item['seconds'] / rates['bf16' in VARIANTS[variant]]:.0%}",
            "-" if "compile" in VARIANTS[variant] else f"{item['convolutions']:.0%}",  # profiled as it is
            f"{item['parameters'] / 1e6:.2f}",
            f"{item['losses'][0]:.4f}",
            f"{item['losses'][-1]:.4f}",
            f"{max(abs(a - b) for a, b in zip(item['losses'], base['losses'], strict=True)):.4f}"
            if network == own
            else "-",
        ]
        for (network, variant), item in found.items()
    ]
    titles = ["", "first step [s]", "step [s]", "times as fast", "memory [MiB]", "GFLOPs", "of the matrix rate"]
    titles += ["in convolutions", "weights [M]", "first loss", f"loss of step {size.steps}", "most apart"]
    reached = " and ".join(
        f"{rate / 1e9:.0f} GFLOP/s in {str(formats[mixed]).removeprefix('torch.')}" for mixed, rate in rates.items()
    )
    said = f"{device_name(device)}; matrices are multiplied at {reached} here."
    return "\n".join([f"### {size.title}", "", said, "", table(titles, cells)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks plain_loop``."""
    parser.add_argument("--only", choices=SIZES, help="one size; by default all")
    parser.add_argument("--one", help=argparse.SUPPRESS)


def main(options: argparse.Namespace) -> str:
    """The Markdown."""
    if options.one is not None:
        size, network, variant = json.loads(options.one)
        with tempfile.TemporaryDirectory() as nothing_compiled_yet:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = nothing_compiled_yet
            return json.dumps(measure(SIZES[size], network, variant, options.device))
    return "\n\n".join(report(name, options.device) for name in ([options.only] if options.only else SIZES))
