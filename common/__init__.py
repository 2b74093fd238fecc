"""What the three bundles share: networks, losses, methods, engine, handlers, data and metrics."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .errors import BadInput
from .switches import is_on

__all__ = ["__version__", "bundle_root", "is_on", "unload"]

__version__ = "0.1.0"

_CARRIED = "scripts"


def bundle_root(name: str, stamp: str | None = None) -> str:
    """The folder of one of the bundles in this checkout, for instance ``bundle_root("teacher")``.

    In a packed bundle, which carries this package below its ``scripts``, it is that bundle's own folder.

    Args:
        name: of the bundle.
        stamp: what the config that asks knows of its packed bundle: version and digest of the weights.

    Raises:
        BadInput: the config is one packed bundle's, but the process holds the code of another.
    """
    above = Path(__file__).absolute().parents[1]
    if __name__ != f"{_CARRIED}.common":
        return str(above / "bundles" / name)
    root = above.parent
    if stamp is not None:
        metadata = json.loads((root / "configs" / "metadata.json").read_text())
        if stamp != f"{metadata['version']}+{metadata['lineage']['weights']}":
            raise BadInput(
                f"The code in this process is that of another packed bundle, {root}, which would predict with its own "
                "weights. Run each bundle in a process of its own, or one after the other."
            )
    return str(root)


def unload() -> None:
    """Forget a packed bundle's code when its run has ended, so that the next one in this process finds its own.

    MONAI puts the folder of the bundle that it runs first on Python's path. It stays there: who put it there may take
    it away, as MONAI Label does.
    """
    if __name__ != f"{_CARRIED}.common":
        return
    for module in [name for name in sys.modules if name.split(".")[0] == _CARRIED]:
        del sys.modules[module]
