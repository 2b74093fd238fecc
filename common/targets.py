"""What a regression target's description says; see ``docs/data.md`` for its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["dense_names", "is_dense", "structure_ids"]


def is_dense(target: Mapping[str, Any]) -> bool:
    """Whether a target is a map (the default), rather than a number a case."""
    return target.get("kind", "dense") == "dense"


def dense_names(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the targets that are maps."""
    return [target["name"] for target in targets if is_dense(target)]


def structure_ids(target: Mapping[str, Any]) -> list[int]:
    """The label ids inside which a target has a meaning; empty for everywhere."""
    structure = target.get("structure")
    if structure is None:
        return []
    return [int(label) for label in structure] if isinstance(structure, (list, tuple)) else [int(structure)]
