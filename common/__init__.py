"""What the three bundles share: networks, losses, methods, engine, handlers, data and metrics."""

from __future__ import annotations

from pathlib import Path

__all__ = ["__version__", "bundle_root"]

__version__ = "0.1.0"


def bundle_root(name: str) -> str:
    """The folder of one of the bundles in this checkout, for instance ``bundle_root("teacher")``."""
    return str(Path(__file__).resolve().parents[1] / "bundles" / name)
