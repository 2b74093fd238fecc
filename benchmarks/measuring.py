"""What the benchmarks share: processes of their own, peak memory, the machine's matrix rate, tables."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch.autograd import DeviceType
from torch.profiler import profile

from common.tables import machine

__all__ = [
    "convolution_share",
    "device_name",
    "fastest",
    "in_own_process",
    "matrix_rate",
    "peak_memory",
    "table",
    "time_steps",
]

ROOT = Path(__file__).resolve().parents[1]


def in_own_process(section: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What ``python -m benchmarks SECTION ...`` prints in its last line, as JSON.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    command = [sys.executable, "-m", "benchmarks", section, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _synchronize(device: str | torch.device) -> None:
    """Wait until the device has done all that it was asked for."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: str | torch.device, reset: bool = False) -> int:
    """Bytes that were taken at most: by this process, or on a GPU by PyTorch's tensors since the last ``reset``."""
    if torch.device(device).type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fastest(call: Callable[[], Any], device: str | torch.device, repeats: int = 3, warm_up: int = 1) -> float:
    """Seconds of the fastest of some calls; those to warm up, which take the memory, are not counted."""
    durations = []
    for _ in range(warm_up + repeats):
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        durations.append(time.perf_counter() - start)
    return min(durations[warm_up:])


def time_steps(trainer: Engine, device: str | torch.device) -> list[float]:
    """The seconds of each step of a trainer: a list that fills while it runs."""
    began, seconds = [0.0], []

    def begin() -> None:
        began[0] = time.perf_counter()

    def end() -> None:
        _synchronize(device)
        seconds.append(time.perf_counter() - began[0])

    trainer.add_event_handler(Events.ITERATION_STARTED, begin)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, end)
    return seconds


def matrix_rate(dtype: torch.dtype, device: str | torch.device, size: int | None = None) -> float:
    """FLOP/s of the product of two square matrices: what this machine can do at best."""
    size = size or (8192 if torch.device(device).type == "cuda" else 2048)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / fastest(lambda: left @ right, device, repeats=5, warm_up=2)


def convolution_share(profiler: profile) -> float:
    """The share of the profiled time that convolutions took, backward included; the device's time on a GPU."""
    # A GPU's kernels are events of their own, too, which would count their time twice.
    operations = [operation for operation in profiler.key_averages() if operation.device_type == DeviceType.CPU]
    on_device = any(operation.self_device_time_total for operation in operations)
    times = {o.key: o.self_device_time_total if on_device else o.self_cpu_time_total for o in operations}
    return sum(time for name, time in times.items() if "conv" in name) / sum(times.values())


def device_name(device: str | torch.device) -> str:
    """The machine and, where it computes, its GPU."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return machine()


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [list(titles), ["---", *["---:"] * (len(titles) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
