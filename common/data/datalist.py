"""Datalists in the style of the Medical Segmentation Decathlon (Antonelli et al. 2022), read and checked early.

A datalist is a JSON file with the sections ``training``, ``unlabeled``, ``validation`` and ``testing``. An entry names
the ``image``, the ``label`` and any regression target; its paths are relative to the datalist's own folder. ``labels``
maps ids to names::

    {
        "labels": {"0": "background", "1": "lumen", "2": "wall"},
        "training": [{"image": "images/a.nii.gz", "label": "labels/a.nii.gz", "thickness": "maps/a.nii.gz"}],
        "unlabeled": [{"image": "images/b.nii.gz"}]
    }
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BadInput
from .grids import VOLUME_SUFFIXES, PathOrPaths

__all__ = [
    "CHANNEL",
    "SECTIONS",
    "case_keys",
    "case_name",
    "first_path",
    "is_path",
    "load_section",
    "read_datalist",
    "with_names",
]

SECTIONS = ("training", "unlabeled", "validation", "testing")
CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")  # nnU-Net's names of files, one a channel
_SUFFIXES = (".seg.nrrd", *VOLUME_SUFFIXES, ".dcm")
_IMAGE_ONLY = ("unlabeled",)
_EVALUATED = ("validation", "testing")
_MOST_FILES = 5


def first_path(value: PathOrPaths) -> str:
    """The path, or of several, one a channel, the first."""
    return os.fspath(value) if isinstance(value, (str, os.PathLike)) else os.fspath(value[0])


def case_name(case: PathOrPaths | Mapping[Any, Any]) -> str:
    """The name of a case: its ``case_name``, else the image's file name without its suffix or that of a DICOM folder.

    Args:
        case: an entry or the meta data of a loaded image (whose ``image`` or ``filename_or_obj`` counts where they have
            no ``case_name``), a path, or one path a channel (the first counts; of nnU-Net's ``a_0000.nii.gz``,
            ``a_0001.nii.gz`` and so on the case is ``a``).
    """
    if isinstance(case, Mapping):
        if "case_name" in case:
            return case["case_name"]
        return case_name(case["image"] if "image" in case else case["filename_or_obj"])
    if isinstance(case, (str, os.PathLike)):
        return _without_suffix(Path(case).name)
    names = [_without_suffix(Path(path).name) for path in case]
    channels = [CHANNEL.match(name) for name in names]
    stems = {match["case"] for match in channels if match}
    alike = all(channels) and len(stems) == 1 and len({match["channel"] for match in channels if match}) > 1
    return stems.pop() if alike else names[0]


def _without_suffix(name: str) -> str:
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def with_names(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Cases whose names are alike get the names of parent folders in front: of one, or of as few as tell them apart.

    Their new name is their ``case_name``. Cases of one image are one case, and keep one name.

    Args:
        cases: entries, each with its ``image``.

    Raises:
        BadInput: no folder tells two cases apart.
    """
    named = [dict(case) for case in cases]
    of_name: dict[str, dict[str, str]] = {}  # the first file of each image
    for case in named:
        of_name.setdefault(case_name(case), {})[str(case["image"])] = first_path(case["image"])
    taken = set(of_name)
    for name, images in of_name.items():
        if len(images) == 1:
            continue
        parents = [Path(path).absolute().parts[1:-1][::-1] for path in images.values()]
        levels = range(max(map(len, parents)))
        for chosen in (*(slice(level, level + 1) for level in levels), *(slice(level + 1) for level in levels)):
            names = ["_".join((*reversed(folders[chosen]), name)) for folders in parents]
            if len(set(names)) == len(names) and not taken.intersection(names):
                break
        else:
            raise BadInput(
                f"{' and '.join(list(images.values())[:2])} are both named {name!r}, and what is written for one would "
                "replace what is written for the other. Rename one of them, or give them one by one, each an output "
                "folder."
            )
        new = dict(zip(images, names, strict=True))
        for case in (case for case in named if case_name(case) == name):
            case["case_name"] = new[str(case["image"])]
        taken.update(names)
    return named


def case_keys(targets: Sequence[Mapping[str, Any]] = (), label: bool = True) -> list[str]:
    """The keys of a training entry: ``image``, ``label`` and the names of the regression targets."""
    return ["image", *(["label"] if label else []), *(target["name"] for target in targets)]


def read_datalist(path: str | os.PathLike) -> dict[str, Any]:
    """Read a datalist and check its form (not its files).

    Args:
        path: the JSON file.

    Returns:
        The file's content with every entry a dict (a plain string becomes ``{"image": string}``) and the datalist's own
        folder and path under ``"folder"`` and ``"path"``.

    Raises:
        BadInput: the file is missing, is not JSON, has no section, or an entry is malformed.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise BadInput(
            f"datalist {path} not found; set `datalist` to a JSON file with the sections {', '.join(SECTIONS)}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BadInput(
            f"datalist {path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # no text, a number of thousands of digits, nested too deep
        raise BadInput(f"datalist {path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(
            f"datalist {path} holds a {type(content).__name__}; expected an object with {', '.join(SECTIONS)}"
        )
    if not any(section in content for section in SECTIONS):
        raise BadInput(
            f"datalist {path} has none of the sections {', '.join(SECTIONS)}; found the keys {sorted(content)}"
        )
    if not isinstance(content.get("labels", {}), dict):
        raise BadInput(f'datalist {path}: `labels` must map ids to names, like {{"0": "background", "1": "liver"}}')
    for section in SECTIONS:
        if section in content:
            content[section] = _checked_entries(path, section, content[section])
    return {**content, "folder": str(path.resolve().parent), "path": str(path)}


def _checked_entries(path: Path, section: str, entries: Any) -> list[dict[str, Any]]:
    if not isinstance(entries, list):
        raise BadInput(f"datalist {path}: `{section}` is a {type(entries).__name__}; expected a list of entries")
    checked = []
    for index, item in enumerate(entries):
        where = f"datalist {path}: entry {index} of `{section}`"
        entry = {"image": item} if isinstance(item, str) else item
        if not isinstance(entry, dict):
            raise BadInput(
                f'{where} is a {type(item).__name__}; expected an object like {{"image": "images/a.nii.gz"}}'
            )
        if "image" not in entry:
            raise BadInput(f"{where} has no `image`; found the keys {sorted(entry)}")
        for key in ("image", "label"):
            if key in entry and not is_path(entry[key]):
                raise BadInput(
                    f"{where}: `{key}` is {entry[key]!r}; expected a file path (or a list of them, one a channel)"
                )
        if not isinstance(entry.get("annotated", []), list):
            raise BadInput(
                f"{where}: `annotated` is {entry['annotated']!r}; expected a list of label ids like [0, 1, 3]"
            )
        checked.append(entry)
    return checked


def is_path(value: Any) -> bool:
    """Whether an entry's value is a path, or a list of them."""
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item for item in value)


def load_section(
    datalist: str | os.PathLike | Mapping[str, Any],
    section: str,
    keys: Sequence[str] = ("image", "label"),
    required: bool = True,
    optional: Sequence[str] = (),
    exist: bool = True,
) -> list[dict[str, Any]]:
    """The entries of a section, with absolute paths and no other keys than asked for.

    Args:
        datalist: a datalist's path, or what :func:`read_datalist` returned.
        section: ``training``, ``unlabeled``, ``validation`` or ``testing``.
        keys: what every entry must have; ``unlabeled`` is only asked for ``image``, whatever ``keys`` says.
        required: whether an empty or absent section is an error.
        optional: keys that are taken along where an entry has them (besides ``annotated`` and ``patient``).
        exist: whether an absent file is an error. Where it is none, nothing is evaluated, and names may be alike.

    Returns:
        One dict an entry. Empty when the section is and ``required`` is False. Entries of ``validation`` and
        ``testing`` whose files have one name have a ``case_name``, too, see :func:`with_names`.

    Raises:
        BadInput: the section is unknown or (if ``required``) empty, an entry lacks a key, files do not exist, or cases
            to evaluate can't be told apart.
    """
    content = datalist if isinstance(datalist, Mapping) else read_datalist(datalist)
    name = content.get("path", "datalist")
    if section not in SECTIONS:
        raise BadInput(f"`{section}` is no section of a datalist; choose from {', '.join(SECTIONS)}")
    entries = content.get(section) or []
    if not entries:
        if not required:
            return []
        raise BadInput(f"datalist {name} has no entries in `{section}`. {_ADVICE[section]}")
    if section in _IMAGE_ONLY:
        keys = ("image",)
    folder = Path(content.get("folder", "."))
    wanted = [*keys, *(key for key in (*optional, "annotated", "patient") if key not in keys)]
    loaded, absent = [], []
    for index, entry in enumerate(entries):
        for key in keys:
            if entry.get(key) is None:
                raise BadInput(
                    f"datalist {name}: entry {index} of `{section}` ({case_name(entry)}) has no `{key}`; "
                    f"found the keys {sorted(entry)}"
                )
        case = {}
        for key in wanted:
            if entry.get(key) is None:
                continue
            case[key] = _absolute(folder, entry[key]) if key not in ("annotated", "patient") else entry[key]
            if key not in ("annotated", "patient") and is_path(case[key]):
                paths = [case[key]] if isinstance(case[key], str) else case[key]
                absent += [path for path in paths if not os.path.exists(path)]
        loaded.append(case)
    if absent and exist:
        shown = ", ".join(absent[:_MOST_FILES])
        more = f" and {len(absent) - _MOST_FILES} more" if len(absent) > _MOST_FILES else ""
        raise BadInput(
            f"datalist {name}: {len(absent)} file(s) of `{section}` do not exist: {shown}{more}. "
            f"Paths are taken relative to {folder}"
        )
    return with_names(loaded) if exist and section in _EVALUATED else loaded


_ADVICE = {
    "training": "Training needs labelled cases: list their `image` and `label` there.",
    "unlabeled": (
        "Semi-supervised training needs images without labels there; "
        "where there are none, train the teacher bundle instead, which needs only `training`."
    ),
    "validation": "List a few labelled cases there: they show how the training goes, and what a table is of.",
    "testing": "List the cases to evaluate there.",
}


def _absolute(folder: Path, value: Any) -> Any:
    if isinstance(value, str):
        return os.path.normpath(folder / os.path.expanduser(value))
    if isinstance(value, list):
        return [_absolute(folder, item) for item in value]
    return value
