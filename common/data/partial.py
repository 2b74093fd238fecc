"""Cases that label only some of the structures: which of them serve for one organ, and what they are taken for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import BadInput

__all__ = ["organ_cases", "organ_id", "unknown_as_background"]


def organ_id(labels: Mapping[str, str], organ: str) -> int:
    """The id of a structure by its name.

    Raises:
        BadInput: ``labels`` has no such structure.
    """
    structures = {str(name): int(number) for number, name in labels.items() if int(number) != 0}
    if str(organ) not in structures:
        raise BadInput(f"organ: found {organ!r}, expected one of the structures in `labels`: {', '.join(structures)}.")
    return structures[str(organ)]


def organ_cases(
    entries: Sequence[Mapping[str, Any]], labels: Mapping[str, str], organ: str | None, required: bool = True
) -> list[dict[str, Any]]:
    """The cases whose label speaks of one organ: those ``annotated`` for it, or for everything.

    Args:
        entries: entries of a datalist's section.
        labels: label ids and names.
        organ: name of the organ; None keeps all cases.
        required: whether it is an error that there are cases and none labels the organ.

    Raises:
        BadInput: see ``required``; or ``labels`` has no such organ.
    """
    if organ is None:
        return [dict(entry) for entry in entries]
    wanted = organ_id(labels, organ)
    chosen = [
        dict(entry)
        for entry in entries
        if entry.get("annotated") is None or str(wanted) in map(str, entry["annotated"])
    ]
    if entries and required and not chosen:
        raise BadInput(
            f"organ: none of the {len(entries)} cases labels {organ!r}: no `annotated` of theirs names its id {wanted}."
        )
    return chosen


def unknown_as_background(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cases as if every label knew all structures: what it does not know then counts as background.

    That is wrong, and what a training does that has never heard of ``annotated``: the baseline to be compared with.
    """
    return [{key: value for key, value in entry.items() if key != "annotated"} for entry in entries]
