"""What the pictures of the tests show."""

from __future__ import annotations

import numpy as np

THICKNESS = {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 1, "missing": 0}


def make_volume(shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(0).normal(size=(12, 16, 6)).astype(np.float32)
    labels = np.zeros((12, 16, 6), dtype=np.uint8)
    labels[3:8, 4 + shift : 9 + shift, 2:4] = 1
    labels[4:6, 5 + shift : 7 + shift, 3] = 2
    return image, labels
