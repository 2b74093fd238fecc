"""What the prediction of a whole chest CT takes: memory and time of the bundle's own command, from file to files.

    python -m benchmarks large_volume

The scan is made up: noisy air, a body of soft tissue, two lungs. Weights are random, which costs
what trained ones do. Memory is the most that the process held, its libraries included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from monai.bundle import ConfigParser

from benchmarks.measuring import ROOT, device_name, in_own_process, table
from common.study import bundle_command

THIN, THICK = (0.8, 0.8, 0.6), (0.8, 0.8, 5.0)
WHOLE = (512, 512, 600)
#: rows: bundle, voxels, mm
ROWS: dict[str, tuple[str, tuple[int, int, int], tuple[float, float, float]]] = {
    "segmentation": ("teacher", WHOLE, THIN),
    "- of few thick slices": ("teacher", (256, 256, 60), THICK),
    "segmentation and thickness": ("dual_decoder", WHOLE, THIN),
    "- of an eighth of the voxels": ("dual_decoder", (256, 256, 300), THIN),
}
WINDOW = [96, 96, 96]


def make_scan(size: tuple[int, int, int], spacing: tuple[float, float, float], path: Path) -> None:
    """Write a CT of Hounsfield units: an elliptic cylinder of tissue with two lungs in it, and noise."""
    generator = np.random.default_rng(0)
    x, y = np.meshgrid(*(np.linspace(-1, 1, side) for side in size[:2]), indexing="ij")
    body = (x / 0.85) ** 2 + (y / 0.6) ** 2 < 1
    lungs = ((np.abs(x) - 0.4) / 0.3) ** 2 + (y / 0.4) ** 2 < 1
    plane = np.where(lungs, -850, np.where(body, 40, -1000)).astype(np.int16)
    image = np.empty(size, np.int16)
    for index in range(size[2]):
        image[..., index] = plane + generator.integers(-30, 31, size[:2], dtype=np.int16)
    nibabel.save(nibabel.Nifti1Image(image, np.diag([*spacing, 1.0])), path)


def measure(name: str, device: str) -> dict[str, Any]:
    """Seconds and peak memory of one command."""
    bundle, size, spacing = ROWS[name]
    config = ROOT / "bundles" / bundle / "configs" / "inference.json"
    parser = ConfigParser()
    parser.read_config(str(config))
    with tempfile.TemporaryDirectory() as folder:
        make_scan(size, spacing, Path(folder) / "scan.nii")
        torch.save({"model": parser.get_parsed_content("network_def").state_dict()}, Path(folder) / "model.pt")
        paths = {"input": f"{folder}/scan.nii", "ckpt_dir": folder, "output_dir": f"{folder}/results"}
        settings = {"patch_size": WINDOW, "device": device, **paths}
        command = bundle_command([str(config)], settings)
        began, most = time.perf_counter(), 0
        with open(Path(folder) / "log.txt", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
            while process.poll() is None:
                most = max(most, _held(process.pid))
                time.sleep(0.05)
        seconds = time.perf_counter() - began
        if process.returncode or not (Path(folder) / "results" / "scan_seg.nii.gz").exists():
            raise SystemExit(f"the prediction failed:\n{(Path(folder) / 'log.txt').read_text()[-2000:]}")
    return {"seconds": seconds, "bytes": most}


def _held(process: int) -> int:
    """Bytes that a process held at most, up to now; 0 when it is gone.

    What the operating system says of children that have ended begins with what their parent held.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks large_volume``."""
    parser.add_argument("--one", help=argparse.SUPPRESS)


def main(options: argparse.Namespace) -> str:
    """The Markdown."""
    if options.one is not None:
        return json.dumps(measure(options.one, options.device))
    cells = []
    for name, (_, size, spacing) in ROWS.items():
        found = in_own_process("large_volume", ["--one", name, "--device", options.device])
        voxels = int(np.prod(size))
        cells.append(
            [
                name,
                " x ".join(map(str, size)),
                " x ".join(map(str, spacing)),
                f"{found['seconds']:.0f}",
                f"{found['bytes'] / 1e9:.1f}",
                f"{found['bytes'] / voxels:.0f}",
            ]
        )
    titles = ["", "voxels", "mm", "seconds", "memory [GB]", "bytes a voxel"]
    return "\n".join([f"{device_name(options.device)}.", "", table(titles, cells)])
