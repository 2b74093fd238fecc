"""Options that are on or off."""

from __future__ import annotations

from typing import Any

from .errors import BadInput

__all__ = ["is_on"]


def is_on(value: Any, name: str) -> bool:
    """Whether an option is on: a config's ``true``, or the text that MONAI's command line makes of ``--name true``.

    Raises:
        BadInput: it is neither on nor off.
    """
    text = str(value).lower()
    if text not in ("true", "false"):
        raise BadInput(f"{name}: found {value!r}, expected true or false.")
    return text == "true"
