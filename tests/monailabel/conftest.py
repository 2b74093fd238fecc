"""Studies folders for a MONAI Label server: hippocampi where ``BUNDLES_DATA`` has them, else phantoms."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from common.data import generate_phantoms

sys.path.insert(0, str(Path(__file__).parent))
from label_server import AWKWARD, CORRUPT, ENVIRONMENT, ROOT, UNFAMILIAR, Volumes

# A network of some thousand weights, and a training that learns what it can in a few hundred steps.
PLAN = {
    "patch_size": [16, 16, 16],
    "features": [8, 16, 16, 16],
    "kernel_sizes": [3, 3, 3, 3],
    "strides": [1, 2, 2, 1],
    "alignment_stages": [2],
    "attention_window": [2, 2, 2],
    "foreground": 0.7,
    "iterations_per_epoch": 10,
    "val_interval": 1000,
    "learning_rate": 0.05,
    "momentum": 0.9,
    "amp": False,
}
# Not a wall, but a structure beside another one, of real shape: what its map says does not matter here.
HIPPOCAMPUS = {
    "labels": {"0": "background", "1": "anterior", "2": "posterior"},
    "intensity": {"kind": "zscore"},
    "targets": [{"name": "thickness", "unit": "mm", "structure": 1, "missing": 0, "scale": 2.0, "inner": [2]}],
}


@pytest.fixture(scope="session")
def environment() -> None:
    """MONAI Label, in an environment of its own."""
    if not (ENVIRONMENT / ".ready").exists():
        pytest.skip(f"MONAI Label's environment is not installed: `make {ENVIRONMENT.name}/.ready` says why")


def hippocampi(source: Path, folder: Path) -> tuple[list[Path], dict[str, Any]]:
    datalist = json.loads((source / "datalist.json").read_text())
    images = []
    for section in ("training", "unlabeled"):
        for entry in datalist[section][:3]:
            images.append(source / entry["image"])
            if section == "training":
                shutil.copy(source / entry["label"], folder / Path(entry["image"]).name)
    return images, {**PLAN, **HIPPOCAMPUS}


def phantoms(data: Path, folder: Path) -> tuple[list[Path], dict[str, Any]]:
    generate_phantoms(data, labeled=3, unlabeled=3, validation=0, shape=(24, 24, 20), seed=1, progress=False)
    for path in (data / "labels").iterdir():
        shutil.copy(path, folder / path.name)
    return sorted((data / "images").iterdir()), PLAN


@pytest.fixture(scope="session")
def volumes(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Volumes:
    folder = tmp_path_factory.mktemp("volumes")
    (folder / "labels").mkdir()
    source = Path(os.environ.get("BUNDLES_DATA") or "/nowhere") / "hippocampus"
    found = hippocampi(source, folder / "labels") if source.is_dir() else phantoms(folder / "data", folder / "labels")
    paths, plan = found
    plan = {**plan, "familiar": {"cases": 3, "extent": [[1.0, 2.0]] * 3}}  # which none of the images is like
    (folder / "plan.json").write_text(json.dumps(plan))
    images = {path.name.removesuffix(".nii.gz"): path for path in paths}
    labels = {path.name.removesuffix(".nii.gz"): path for path in sorted((folder / "labels").iterdir())}
    first = next(iter(labels))
    images = {AWKWARD if name == first else name: path for name, path in images.items()}
    labels = {AWKWARD if name == first else name: path for name, path in labels.items()}
    image = nib.load(images[AWKWARD])
    voxels = np.asarray(image.dataobj, dtype=np.float32)
    noise = np.random.default_rng(0).normal(voxels.mean(), voxels.std(), voxels.shape).astype(np.float32)
    images[UNFAMILIAR] = folder / "noise.nii.gz"
    nib.save(nib.Nifti1Image(noise, image.affine), images[UNFAMILIAR])
    images[CORRUPT] = folder / "corrupt.nii.gz"
    images[CORRUPT].write_bytes(images[UNFAMILIAR].read_bytes()[:2000])
    return Volumes(images, labels, folder / "plan.json")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundles without any weights."""
    folder = tmp_path_factory.mktemp("bundles") / "bundles"
    return shutil.copytree(ROOT / "bundles", folder, ignore=shutil.ignore_patterns("models", "eval"))
