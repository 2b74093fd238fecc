"""Teachers of one organ each, with all that they need to answer: it is in the records beside their weights."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BadInput
from ..networks import load_frozen, read_record
from .configuration import running_config
from .origin import differences, trained_settings

__all__ = ["load_organ_teachers", "read_organ_teacher", "teachers_in_order"]


def teachers_in_order(paths: Mapping[str, str] | None, labels: Mapping[str, str]) -> dict[int, str]:
    """The weights file of each structure's teacher by the structure's id, in the order of the ids.

    Args:
        paths: weights by the name of the organ.
        labels: label ids and names.

    Raises:
        BadInput: there is not one for each structure, or one for something else.
    """
    names = {int(number): str(name) for number, name in labels.items() if int(number) != 0}
    given = {str(name): str(path) for name, path in (paths or {}).items()}
    if set(given) != set(names.values()):
        raise BadInput(
            f"teacher_paths: found teachers of {', '.join(given) or 'nothing'}, expected one of each structure in "
            f"`labels`: {', '.join(names.values())}. Train the teacher bundle with --organ NAME for each, and give "
            "their models/model.pt by name."
        )
    return {number: given[names[number]] for number in sorted(names)}


def read_organ_teacher(path: str | Path, organ: str) -> tuple[nn.Module, dict[str, Any]]:
    """A frozen teacher of background and one organ, as its record describes it, and the record's settings.

    Args:
        path: weights that the teacher bundle has written; ``model.json`` lies beside them.
        organ: name of the organ that they must be of.

    Raises:
        BadInput: there is no record, or it is of another organ or of more than one.
    """
    settings = read_record(path).get("config", {})
    network = settings.get("network_def")
    if not network:
        raise BadInput(
            f"teacher of {organ}, {path}: no model.json beside it says what these weights are; expected those that the "
            "teacher bundle wrote. Copy both files together."
        )
    labels = settings.get("labels", {})
    structures = [name for number, name in labels.items() if int(number) != 0]
    of = [settings["organ"]] if settings.get("organ") else structures
    if of != [organ]:
        raise BadInput(
            f"teacher of {organ}, {path}: it was trained for {', '.join(map(str, of))}; expected a teacher of {organ} "
            f"alone. Train the teacher bundle with --organ {organ}."
        )
    # Weights are drawn only to be replaced: what is drawn after them must not depend on whether teachers were needed.
    with torch.random.fork_rng(devices=[]):
        made = _make_network(network, f"teacher of {organ}, {Path(path).with_suffix('.json')}")
    return load_frozen(made, path, f"teacher of {organ}"), settings


def _make_network(definition: Mapping[str, Any], source: str) -> nn.Module:
    """One of the project's networks, of two classes, from a record, which may come from anywhere: nothing else is run.

    Raises:
        BadInput: the definition names no network of the project, or has an expression among its arguments.
    """
    # A packed bundle carries the package below `scripts`, and its weights may be used outside it, or the other way.
    name = str(definition.get("_target_", "")).removeprefix("scripts.").removeprefix("common.")
    networks = import_module(f"{__package__.rpartition('.engines')[0]}.networks")
    module, _, kind = name.removeprefix("networks.").rpartition(".")
    if module in {found.name for found in pkgutil.iter_modules(networks.__path__)}:
        networks = import_module(f"{networks.__name__}.{module}")
    made = getattr(networks, kind, None)
    arguments = {key: value for key, value in definition.items() if not key.startswith("_")}
    arguments["out_channels"] = 2  # which the record has as an expression
    try:
        if isinstance(made, type) and issubclass(made, nn.Module) and made.__module__.startswith(networks.__name__):
            return made(**arguments)
    except (TypeError, ValueError):  # of an expression where a number should be
        pass
    raise BadInput(
        f"{source}: its network_def is {dict(definition)}; expected a network of this project and plain values. Use "
        "weights that the teacher bundle wrote."
    )


def load_organ_teachers(paths: Mapping[str, str] | None, labels: Mapping[str, str]) -> nn.ModuleList:
    """The frozen teachers of all structures in the order of their ids, for a student that sees the same images.

    Args:
        paths: weights by the name of the organ.
        labels: label ids and names.

    Raises:
        BadInput: as :func:`teachers_in_order` and :func:`read_organ_teacher`; or a teacher was trained with other
            channels, voxels or intensities than the running config's.
    """
    teachers, now = nn.ModuleList(), trained_settings(running_config())
    for number, path in teachers_in_order(paths, labels).items():
        organ = str(labels[str(number)])
        network, settings = read_organ_teacher(path, organ)
        # By which number its organ goes does not matter.
        found = differences({**settings, "labels": None, "organ": None}, now, own=False)
        if found:
            raise BadInput(
                f"teacher of {organ}, {path}: it was trained with other settings than its student is to be:\n  "
                + "\n  ".join(found)
                + "\nUse one plan for all teachers and the student."
            )
        teachers.append(network)
    return teachers
