"""What the tests of datalists, grids and checks share: empty volumes, and targets that cases may have."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np

TARGETS = [
    {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": 0, "scale": 1.0},
    {"name": "volume", "unit": "mL", "kind": "sum"},
]


def write(path: Path, shape=(6, 5, 4), affine=None, dtype=np.float32) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros(shape, dtype), np.eye(4) if affine is None else affine), path)
    return str(path)
