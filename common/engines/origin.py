"""What weights were trained for, and whether that is what they are used for.

A network's weights say little about themselves: with another voxel size, another order of the classes or another scale
of a target they load and predict nonsense. So the settings they were trained with lie beside them, in ``model.json``,
and whoever loads the weights compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import BadInput
from ..networks import hand_over, load_frozen, read_record
from .configuration import running_config

__all__ = [
    "check_origin",
    "differences",
    "load_teacher",
    "load_weights",
    "selected_on",
    "start_from",
    "trained_settings",
]

# What an image must be for the weights to mean anything, and what their output means.
DATA = ("labels", "organ", "channels", "spacing", "orientation", "intensity", "spatial_dims")
# What a network has for its training alone.
TRAINING_ONLY = ("channels_last", "deep_supervision", "dropout")
# A target's other keys say how its maps were made or are compared.
TARGET = ("name", "unit", "kind", "structure", "scale", "head_scale")


def trained_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a merged config that its weights depend on, to be kept with them.

    Args:
        config: what :func:`running_config` returns.
    """
    settings = {key: config[key] for key in (*DATA, "patch_size", "targets", "select") if key in config}
    network = config.get("network_def")
    if isinstance(network, Mapping):
        settings["network_def"] = {key: _resolved(value, config) for key, value in network.items()}
    return settings


def _resolved(value: Any, config: Mapping[str, Any]) -> Any:
    return config.get(value[1:], value) if isinstance(value, str) and value.startswith("@") else value


def _targets(targets: Any) -> Any:
    if not isinstance(targets, Sequence) or isinstance(targets, str):
        return targets
    return [{"kind": "dense", **{key: t[key] for key in TARGET if key in t}} for t in targets]


def _short(value: Any) -> Any:
    """One number where there is the same one for each axis, as configs may say either."""
    alike = isinstance(value, list) and len(value) > 1 and all(item == value[0] for item in value)
    return value[0] if alike and isinstance(value[0], int) else value


def differences(before: Mapping[str, Any], now: Mapping[str, Any], own: bool) -> list[str]:
    """What differs between two :func:`trained_settings`, in words; what only one of them has does not count.

    Args:
        before: those that some weights were trained with.
        now: those that they are to be used with.
        own: whether network and targets must be the same, too, as for the bundle that trained the weights.
    """
    pairs = {key: (before.get(key), now.get(key)) for key in DATA}
    if before:  # weights of before there was a choice
        pairs["orientation"] = before.get("orientation", "RAS"), now.get("orientation")
    if own:
        networks = before.get("network_def", {}), now.get("network_def", {})
        if any("targets" in network for network in networks):  # a plan names targets for the other stages, too
            pairs["targets"] = _targets(before.get("targets")), _targets(now.get("targets"))
        for name in set(networks[0]) & set(networks[1]) - {*DATA, *TRAINING_ONLY, "targets"}:
            pairs[f"network_def#{name}"] = networks[0][name], networks[1][name]
        if "network_def#_target_" in pairs:  # a packed bundle carries the package below `scripts`
            pairs["network_def#_target_"] = tuple(n["_target_"].removeprefix("scripts.") for n in networks)
    return [
        f"{name}: trained with {then}, found {found}"
        for name, (then, found) in pairs.items()
        # That a network is of all organs is said by null.
        if (None not in (then, found) or (own and name == "organ")) and _short(then) != _short(found)
    ]


def check_origin(
    model_path: str | Path, source: str, own: bool = False, config: Mapping[str, Any] | None = None
) -> None:
    """Compare with what the weights were trained for.

    Args:
        model_path: the weights.
        source: what they are, for the error.
        own: whether this bundle has trained them, so that network and targets must be the same as well.
        config: the merged config that they are to be used with; None for the running one.

    Raises:
        BadInput: they were trained with other settings.
    """
    now = trained_settings(running_config() if config is None else config)
    found = differences(read_record(model_path).get("config", {}), now, own)
    if found:
        raise BadInput(
            f"{source} {model_path}: they were trained with other settings than those they are to be used with:\n  "
            + "\n  ".join(found)
            + "\nUse the plan and the overlays of that training, or train that stage again with these."
        )


def load_weights(network: nn.Module, model_path: str | Path) -> None:
    """Load what this bundle has trained, for evaluation and inference.

    Weights without a record, as those from elsewhere, are taken as they are.

    Raises:
        BadInput: they don't fit the network, or were trained with other settings than the running config's.
    """
    check_origin(model_path, "trained weights", own=True)
    hand_over(network, model_path, source="trained weights")


def start_from(
    network: nn.Module,
    model_path: str | Path | None,
    source: str,
    parts: Sequence[str] | None = None,
    locked: Sequence[str] | None = None,
) -> None:
    """Load an earlier stage's weights to train on from, or those of its ``parts``; see :func:`hand_over`.

    Args:
        network: what to load them into.
        model_path: the file; may be null where ``locked`` is given, and training starts from random weights then.
        source: what the weights are, for errors.
        parts: first components of the names to load; None for all.
        locked: what will never be trained.

    Raises:
        BadInput: they don't fit the network, or were trained for other classes, channels, voxels or intensities; or
            there are none, and ``locked`` parts would stay random for good.
    """
    if not model_path:
        if locked is None:
            raise BadInput(f"{source}: none are given, so there is nothing to start from.")
        if locked:
            raise BadInput(
                f"locked: {list(locked)} would keep random weights for good, since no {source} are given. Name the "
                "weights, or set locked to []."
            )
        return
    check_origin(model_path, source)
    hand_over(network, model_path, parts, source)


def load_teacher(network: nn.Module, model_path: str | Path, source: str = "teacher weights") -> nn.Module:
    """An earlier stage's network that only answers: no gradients, evaluation mode.

    Raises:
        BadInput: as :func:`start_from`.
    """
    check_origin(model_path, source)
    return load_frozen(network, model_path, source)


def selected_on(model_path: str | Path, section: str) -> str | None:
    """The name of the cases that chose the weights, when they are those of ``section``; else None."""
    chosen = section == "validation" and read_record(model_path).get("config", {}).get("select") == "best"
    return "the validation section" if chosen else None
