"""The configuration of the run that is under way, as one JSON-able dictionary."""

from __future__ import annotations

import inspect
import json
from typing import Any

from monai.bundle import ConfigParser

__all__ = ["running_config"]


def running_config() -> dict[str, Any]:
    """The merged config (files, overlays and command-line overrides) of the bundle that is calling.

    MONAI gives a config's components no way to see the config they come from, while a record of a run is worth little
    without it. The parser that is instantiating the caller is on the call stack, so it is taken from there. Writing the
    result to a file gives a config that ``python -m monai.bundle run --config_file`` runs again.

    Returns:
        The config with ``@`` references and ``$`` expressions as written; empty outside a bundle run.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigParser):
            config = {key: value for key, value in owner.get().items() if key != "_meta_"}
            return json.loads(json.dumps(config, default=str))
        frame = frame.f_back
    return {}
