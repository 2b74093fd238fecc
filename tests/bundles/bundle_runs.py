"""What the tests of the bundles share: a tiny plan, MONAI's command line, and where the stages leave their files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from ignite.engine import Engine, Events
from torch import Tensor, nn

from benchmarks import training
from common.engines import SemiSupervisedTrainer

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = ("teacher", "student", "dual_decoder")
PARENT = {"student": "teacher", "dual_decoder": "student"}

# A network of some thousand weights; what a plan would decide.
PLAN = {
    "patch_size": [16, 16, 16],
    "features": [4, 8, 8, 8],
    "kernel_sizes": [3, 3, 3, 3],
    "strides": [1, 2, 2, 1],
    "alignment_stages": [2],
    "attention_window": [2, 2, 2],
}
SHORT = {"train#trainer#max_epochs": 2, "iterations_per_epoch": 2, "val_interval": 1, "device": "cpu", "amp": False}


def config(bundle: str, name: str) -> str:
    return str(ROOT / "bundles" / bundle / "configs" / name)


def recipe_files(recipe: str) -> list[str]:
    """A recipe's files, in their order: some go on top of another."""
    base = recipe.split("_without_")[0].removesuffix("_dybac")
    return [config("student", f"recipes/{name}.json") for name in dict.fromkeys([base, recipe])]


def run(files: list[str], settings: dict[str, Any], processes: int = 1) -> subprocess.CompletedProcess[str]:
    """``python -m monai.bundle run`` as a user types it, or the same under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *torchrun, "-m", "monai.bundle", "run", "--config_file", str(files)]
    for key, value in settings.items():
        command += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


class Crash:
    """A handler that ends a training in the middle, as a power cut does."""

    def __init__(self, after_iteration: int) -> None:
        self.after_iteration = after_iteration

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=self.after_iteration), self._fail)

    def _fail(self) -> None:
        raise RuntimeError("power cut")


class DoublePrecision:
    """A handler that trains in float64, so that what two runs learn differs by what they do and not by rounding.

    In float32 that decides now and then on which side of a leaky ReLU's bend a voxel lies, and its gradient is a
    hundred times another's.
    """

    def attach(self, engine: SemiSupervisedTrainer) -> None:
        for module in engine.method.modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.double().register_forward_pre_hook(self._cast)

    def _cast(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        floating = (isinstance(item, Tensor) and item.is_floating_point() for item in inputs)
        return tuple(item.double() if cast else item for item, cast in zip(inputs, floating, strict=True))


def write_organ_teachers(folder: Path, labels: dict[str, str], **settings: Any) -> dict[str, str]:
    """Untrained teachers of one organ each with the tiny network: their weights by organ."""
    network_def = {
        "_target_": "common.networks.SegmentationNetwork",
        "spatial_dims": 3,
        "in_channels": 1,
        **{key: PLAN[key] for key in ("features", "kernel_sizes", "strides")},
    }
    return training.write_organ_teachers(folder, labels, network_def, **settings)


def write_partial_labels(phantoms: Path, folder: Path) -> Path:
    """A copy of the phantoms with the lumen labelled in the first training case, and the wall in the second."""
    shutil.copytree(phantoms, folder)
    path = folder / "datalist.json"
    content = json.loads(path.read_text())
    for entry, organ in zip(content["training"], (1, 2), strict=True):
        volume = nibabel.load(folder / entry["label"])
        label = np.asarray(volume.dataobj)
        label = np.where(label == organ, label, 0).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(label, volume.affine), folder / entry["label"])
        entry["annotated"] = [organ]
    del content["unlabeled"]
    path.write_text(json.dumps(content))
    return folder


@dataclass
class Chain:
    """What the three stages left behind."""

    data: Path
    plan: Path
    root: Path

    def model(self, bundle: str) -> Path:
        return self.root / bundle / "models" / "model.pt"

    def output(self, bundle: str) -> Path:
        return self.root / bundle / "train"

    def settings(self, bundle: str) -> dict[str, Any]:
        settings = {"dataset_dir": str(self.data), **SHORT}
        if bundle in PARENT:
            settings[f"{PARENT[bundle]}_path"] = str(self.model(PARENT[bundle]))
        return settings
