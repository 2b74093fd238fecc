"""What the tests of random transforms draw, and how."""

from __future__ import annotations

from monai.transforms import Compose

THICKNESS = {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": -1}
VOLUME = {"name": "volume", "unit": "mL", "kind": "sum"}
ALL = ("image", "label", "thickness", "volume")


def draw(transform: Compose, data: dict, seed: int) -> dict:
    drawn = transform.set_random_state(seed)(data)
    return drawn[0] if isinstance(drawn, list) else drawn
