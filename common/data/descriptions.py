"""What a datalist says of its data as a whole: structures, channels, and targets, which are guessed where need be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import BadInput
from ..targets import check_targets
from .grids import VOLUME_SUFFIXES

__all__ = ["NOT_TARGETS", "described_targets", "is_ct", "label_names", "modalities"]

NOT_TARGETS = ("image", "label", "completed", "annotated", "patient")


def modalities(content: Mapping[str, Any]) -> list[str]:
    """Names of the channels, as far as the datalist tells them."""
    named = content.get("modality", content.get("channel_names", {}))
    return [str(name) for name in named.values()] if isinstance(named, dict) else [str(named)] if named else []


def is_ct(modality: str) -> bool:
    """Whether a channel of that name is CT: only then do intensities mean the same in every image."""
    return modality.strip().lower() == "ct"


def label_names(content: Mapping[str, Any]) -> dict[str, str]:
    """Names by label id, in the order of the ids.

    Raises:
        BadInput: the ids are not 0 to K - 1, or there is no structure.
    """
    labels = {str(key): str(name) for key, name in content.get("labels", {}).items()}
    if len(labels) < 2 or sorted(labels) != sorted(str(index) for index in range(len(labels))):
        raise BadInput(
            f"{content['path']}: `labels` is {content.get('labels')}; expected ids 0 (background) to K - 1 with names, "
            'like {"0": "background", "1": "lumen"}.'
        )
    return dict(sorted(labels.items(), key=lambda item: int(item[0])))


def described_targets(
    content: Mapping[str, Any], labels: Mapping[str, str] | None, sections: Sequence[str] = ("training",)
) -> list[dict[str, Any]]:
    """The datalist's own description of the targets; without one, a guess from the entries, with no unit.

    Args:
        content: what :func:`common.data.read_datalist` returned.
        labels: names by id; None where the datalist has none.
        sections: whose entries the guess is from.

    Raises:
        BadInput: a description or a guessed name can't be used.
    """
    if "targets" in content:
        check_targets(content["targets"], labels, f"{content['path']}, targets")
        return [{"kind": "dense", **target} for target in content["targets"]]
    dense, numbers = _target_names(content, sections)
    foreground = [int(index) for index in labels or () if index != "0"]
    structure: Any = foreground[0] if len(foreground) == 1 else foreground
    guessed = [
        *({"name": name, "unit": "", "kind": "dense", "missing": 0} for name in dense),
        *({"name": name, "unit": "", "kind": "mean", "structure": structure} for name in numbers),
    ]
    check_targets(guessed, labels, f"{content['path']}, keys of the entries")
    return guessed


def _target_names(content: Mapping[str, Any], sections: Sequence[str]) -> tuple[list[str], list[str]]:
    """Entry keys that hold a map (dense) and keys that hold a number (case), in the order of appearance."""
    dense: dict[str, None] = {}
    numbers: dict[str, None] = {}
    for entry in (entry for section in sections for entry in content.get(section, ())):
        for key, value in entry.items():
            if key in NOT_TARGETS:
                continue
            if isinstance(value, str) and value.lower().endswith(VOLUME_SUFFIXES):
                dense[key] = None
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers[key] = None
    return list(dense), list(numbers)
