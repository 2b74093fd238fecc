"""What a regression target's description says; see ``docs/data.md`` for its keys."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import BadInput

__all__ = ["check_targets", "dense_names", "is_dense", "structure_ids"]

KINDS = ("dense", "sum", "mean")
# Keys of an entry, and what else is written for a case: <case>_seg.nii.gz, <case>_overview.png, volumes and warnings
# in <case>.json.
TAKEN: tuple[str, ...]
TAKEN = ("image", "label", "annotated", "patient", "completed", "seg", "segmentation", "overview", "volumes", "areas")
TAKEN += ("pred", "reference", "result", "warnings", "not_compared", "entropy")


def check_targets(targets: Any, labels: Mapping[str, str] | None = None, source: str = "targets") -> None:
    """Check the regression targets' descriptions.

    Args:
        targets: the descriptions.
        labels: names of the classes by id; None leaves the structures unchecked.
        source: what holds the descriptions, for messages.

    Raises:
        BadInput: one is no description, its name can't be part of a file's name or is taken, its kind isn't known, its
            structure is no label, its scale no positive number, or its range not two numbers.
    """
    if not isinstance(targets, Sequence) or isinstance(targets, str):
        raise BadInput(f"{source}: found {targets!r}, expected a list of targets; docs/data.md describes them.")
    names: list[str] = []
    for target in targets:
        if not isinstance(target, Mapping) or not isinstance(target.get("name"), str):
            raise BadInput(f'{source}: found {target!r}, expected one such as {{"name": "thickness", "unit": "mm"}}.')
        name = target["name"]
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise BadInput(f"{source}: the name {name!r} becomes a part of files' names: use letters, digits, _ and -.")
        if name in TAKEN:
            raise BadInput(f"{source}: the name {name!r} is taken by the project itself; choose another.")
        if name in names:
            raise BadInput(f"{source}: two targets are called {name!r}; choose another name for one.")
        names.append(name)
        if target.get("kind", "dense") not in KINDS:
            raise BadInput(f"{source}: {name} is of the kind {target['kind']!r}; choose from {', '.join(KINDS)}.")
        scale = target.get("scale", 1.0)
        if not _is_number(scale) or scale <= 0:
            raise BadInput(f"{source}: {name} has the scale {scale!r}; expected a positive number, its typical size.")
        edges = target.get("range") or [0, 0]
        if not isinstance(edges, list) or len(edges) != 2 or not all(_is_number(edge) for edge in edges):
            raise BadInput(f"{source}: {name} has the range {edges!r}; expected two numbers, lowest and highest.")
        try:
            structures = structure_ids(target)
        except (TypeError, ValueError):
            structures = [-1]
        unknown = [number for number in structures if labels is not None and str(number) not in labels]
        if unknown or any(number < 0 for number in structures):
            known = "label ids" if labels is None else f"among the labels {', '.join(labels)}"
            raise BadInput(f"{source}: {name} lies in the structure {target['structure']!r}; expected {known}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


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
