"""What must hold of cases before a training: files that open, one grid a case, sections that share nothing."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..targets import dense_names
from .datalist import case_name, first_path, is_path
from .grids import Grid, grid_difference, read_grid
from .units import number_doubt

__all__ = [
    "annotated_problems",
    "check_cases",
    "check_labels",
    "check_number",
    "check_output",
    "in_both",
    "patient_key",
]

_MOST_PROBLEMS = 20


def check_labels(datalist: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    """Check that the datalist and the config name the same structures.

    Args:
        datalist: what :func:`read_datalist` returned; one without ``labels`` passes.
        labels: the config's label ids and names, ids 0 to K - 1.

    Raises:
        BadInput: the ids are not 0 to K - 1, or the two differ.
    """
    wanted = {str(key): str(name) for key, name in labels.items()}
    if sorted(wanted) != sorted(str(index) for index in range(len(wanted))):
        raise BadInput(f"`labels` has the ids {sorted(wanted)}; expected 0 to {len(wanted) - 1} without a gap")
    found = {str(key): str(name) for key, name in (datalist.get("labels") or {}).items()}
    if found and found != wanted:
        raise BadInput(
            f"datalist {datalist.get('path', '')} has the labels {found}, the config's `labels` is {wanted}; "
            "make them the same"
        )


def check_cases(
    entries: Sequence[Mapping[str, Any]],
    labels: Mapping[str, str] | None = None,
    channels: int | None = None,
    targets: Sequence[Mapping[str, Any]] = (),
    patch_size: Sequence[int] | None = None,
    validation: Sequence[Mapping[str, Any]] = (),
    testing: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Check cases by their headers, which takes milliseconds a case, so that a run does not stop at its hundredth.

    Every file opens; label and dense targets are on the image's grid; the images have ``channels`` channels; case-level
    targets are numbers, and lengths and volumes that the image can have; ``annotated`` names known ids, and at least
    one structure; no patient and no file is in training and in validation or testing. What voxels hold is for
    ``python -m common check``.

    Args:
        entries: entries of :func:`load_section`; any of ``label`` and the targets may be absent.
        labels: label ids and names.
        channels: channels of an image.
        targets: descriptions of the regression targets.
        patch_size: the network's patch; its length is the number of spatial dimensions that an image must have.
        validation: entries of the validation section, checked likewise and for what they share with ``entries``.
        testing: entries of the testing section, only checked for what they share; their files may be absent.

    Raises:
        BadInput: one message with all problems (the first 20 and the count).
    """
    problems: list[str] = []
    for entry in (*entries, *validation):
        problems += _case_problems(entry, labels, channels, targets, patch_size)
    labelled = [entry for entry in entries if entry.get("label") is not None]
    # Images that are learnt from without labels may be tested on, if one says so: a transductive protocol.
    for section, learnt, others in (("validation", entries, validation), ("testing", labelled, testing)):
        problems += [
            f"{case_name(ours)} and {case_name(theirs)} are of one patient, and in training and in {section}; a "
            "patient belongs to one of them"
            for ours, theirs in in_both(learnt, others, patient_key)
        ]
        problems += [
            f"image {first_path(theirs['image'])} is in training and in {section}; it belongs to one of them"
            for _, theirs in in_both(learnt, others, lambda entry: os.path.realpath(first_path(entry["image"])))
        ]
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        listed = "\n  ".join(problems[:_MOST_PROBLEMS])
        raise BadInput(
            f"{len(problems)} problem(s) in the data:\n  {listed}" + (f"\n  and {more} more" if more > 0 else "")
        )


def patient_key(entry: Mapping[str, Any]) -> str | None:
    """The patient of an entry, whether written as text or number, in whatever case; None where it doesn't say."""
    return None if entry.get("patient") is None else " ".join(str(entry["patient"]).split()).casefold()


def in_both(
    learnt: Sequence[Mapping[str, Any]],
    judged: Sequence[Mapping[str, Any]],
    key: Callable[[Mapping[str, Any]], str | None],
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """For each key that is on both sides the first entry of either side that has it.

    Args:
        learnt: entries of one side.
        judged: of the other.
        key: what an entry is known by; entries without one (None) are left out.
    """
    ours, theirs = ({key(entry): entry for entry in reversed(entries)} for entries in (learnt, judged))
    return [(ours[name], entry) for name, entry in reversed(theirs.items()) if name is not None and name in ours]


def _case_problems(
    entry: Mapping[str, Any],
    labels: Mapping[str, str] | None,
    channels: int | None,
    targets: Sequence[Mapping[str, Any]],
    patch_size: Sequence[int] | None,
) -> list[str]:
    case, problems = case_name(entry), []
    try:
        image = read_grid(entry["image"])
    except BadInput as error:
        return [str(error)]
    if channels is not None and image.channels != channels:
        problems.append(f"{case}: the image has {image.channels} channel(s), the network takes {channels}")
    if patch_size is not None and len(image.shape) != len(patch_size):
        problems.append(
            f"{case}: the image has {len(image.shape)} spatial dimensions, "
            f"`patch_size` {list(patch_size)} has {len(patch_size)}"
        )
    dense = dense_names(targets)
    for key in ("label", *dense):
        if entry.get(key) is None:
            continue
        if not is_path(entry[key]):
            problems.append(f"{case}: `{key}` is {entry[key]!r}; expected the path of a map")
            continue
        try:
            difference = grid_difference(image, read_grid(entry[key]))
        except BadInput as error:
            difference = None
            problems.append(str(error))
        if difference:
            problems.append(f"{case}: image and {key} are not on one grid: {difference} ({entry[key]})")
    for target in targets:
        value = entry.get(target["name"])
        if target["name"] in dense or value is None:
            continue
        try:
            check_number(target, value, image)
        except BadInput as error:
            problems.append(f"{case}: {error}")
    return problems + [f"{case}: {problem}" for problem in annotated_problems(entry, labels)]


def check_number(target: Mapping[str, Any], value: Any, image: Grid) -> None:
    """Check a case-level target's value.

    Args:
        target: its description.
        value: as in the entry.
        image: the grid of the case's image.

    Raises:
        BadInput: it is no number, or a length, area or volume that the image can't have.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isinf(value):
        raise BadInput(f"`{target['name']}` is {value!r}; expected a number (a {target['kind']} a case)", kind="value")
    doubt = number_doubt(target, value, image.shape, image.sides)
    if doubt:
        raise BadInput(doubt, kind="units")


def annotated_problems(entry: Mapping[str, Any], labels: Mapping[str, str] | None) -> list[str]:
    """What is wrong with the ids that an entry is ``annotated`` for."""
    problems = []
    if labels is not None and entry.get("annotated") is not None:
        unknown = [str(key) for key in entry["annotated"] if str(key) not in map(str, labels)]
        if unknown:
            problems.append(f"`annotated` names the ids {unknown}; `labels` has {list(labels)}")
        if entry.get("label") is not None and not any(str(key) != "0" for key in entry["annotated"]):
            problems.append(
                f"`annotated` is {entry['annotated']}, which names no structure; list the ids that the label "
                "speaks of, or leave `annotated` out where it speaks of all. A case without a label goes to `unlabeled`"
            )
    return problems


def check_output(folder: str | os.PathLike, key: str = "output_dir") -> Path:
    """Create an output folder, which the config calls ``key``, and prove that it can be written.

    Raises:
        BadInput: it is no path, or can't be created or written.
    """
    # Not even a whole number passes: what else the config does with the folder would fail on it.
    if not isinstance(folder, (str, os.PathLike)):
        raise BadInput(
            f"{key}: found {folder!r}, expected a path. The command line takes names such as 2024 and 1.10 for "
            "numbers; write ./ in front of the name, as in ./2024."
        )
    path = Path(os.path.expanduser(folder))
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe"):
            pass
    except OSError as error:
        raise BadInput(
            f"output folder {path} can't be written ({error.strerror}); set `{key}` to one that can"
        ) from error
    return path
