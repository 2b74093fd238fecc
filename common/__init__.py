"""What the three bundles share: networks, losses, methods, engine, handlers, data and metrics."""

from __future__ import annotations

from pathlib import Path

from .switches import is_on

__all__ = ["__version__", "bundle_root", "is_on"]

__version__ = "0.1.0"


def bundle_root(name: str) -> str:
    """The folder of one of the bundles in this checkout, for instance ``bundle_root("teacher")``.

    In a packed bundle, which carries this package below its ``scripts``, it is that bundle's own folder.
    """
    above = Path(__file__).absolute().parents[1]
    return str(above.parent if __name__ == "scripts.common" else above / "bundles" / name)
