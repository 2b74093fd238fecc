"""A bundle's configs as a package carries them: plan and overlays merged, and the code found beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.reference_resolver import ReferenceResolver
from monai.bundle.utils import merge_kv

from ..errors import BadInput

__all__ = ["carried", "is_target", "merge_configs", "read_json", "strings"]

PACKAGE = "common"
CARRIED_AS = f"scripts.{PACKAGE}"
_TARGET = re.compile(r"(^|#|::)_target_$")
_IMPORT = re.compile(rf"^\$(\s*import|\s*from) {PACKAGE}(?![\w])")
# Overlays that go with a training or stand alone, beside the four configs that a bundle has.
_OVERLAYS = ("evaluate.json", "multi_gpu_train.json")
_NOT_CONFIGS = ("metadata.json",)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        BadInput: it can't be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: can't be read ({error.strerror}).") from error
    except ValueError as error:
        raise BadInput(f"{path}: is not valid JSON ({error}). Correct it.") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path}: holds a {type(content).__name__}, expected an object.")
    return content


def strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a JSON value, with the id by which MONAI finds it, such as ``train#handlers#0#_target_``."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from strings(item, f"{key}#{name}" if key else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from strings(item, f"{key}#{index}")
    elif isinstance(value, str):
        yield key, value


def is_target(key: str) -> bool:
    """Whether an id is that of a ``_target_``, the name of what MONAI calls."""
    return _TARGET.search(key) is not None


def _root(key: str) -> str:
    return ReferenceResolver.split_id(key.lstrip("+"))[0]


def _lay_over(config: Mapping[str, Any], overlay: Mapping[str, Any], source: Path, new: bool) -> dict[str, Any]:
    """``overlay`` laid over ``config`` as MONAI does.

    Args:
        config: is not changed.
        overlay: its ids of something that ``config`` lacks are left out: they are meant for another config.
        source: the overlay's file, for errors.
        new: whether the overlay may bring keys of its own.
    """
    parser = ConfigParser(deepcopy(dict(config)))
    for key, value in overlay.items():
        if _root(key) in parser.get() or (new and _root(key) == key.lstrip("+")):
            try:
                merge_kv(parser, key, deepcopy(value))
            except (KeyError, ValueError, TypeError, IndexError) as error:
                raise BadInput(
                    f"{source}: {key} can't be laid over the bundle's config ({error}). Give what was laid over the "
                    "training's, not what is for an evaluation alone."
                ) from error
    return parser.get()


def _merge(files: Sequence[Mapping[str, Any]], overlays: Mapping[Path, Mapping[str, Any]], new: bool) -> dict[str, Any]:
    config = dict(files[0])
    for content in files[1:]:
        config = _lay_over(config, content, Path(), new=True)
    for source, content in overlays.items():
        config = _lay_over(config, content, source, new)
    return config


def _references(config: Mapping[str, Any]) -> set[str]:
    return {
        ReferenceResolver.split_id(reference)[0]
        for _, text in strings(config)
        for reference in ReferenceResolver.match_refs_pattern(text)
    }


def merge_configs(folder: Path, overlays: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The configs of a bundle with overlays merged, by path below ``folder``.

    ``train.json`` and ``inference.json`` become plain; ``evaluate.json`` and ``multi_gpu_train.json`` stay overlays of
    ``train.json``, with what the given overlays change in them; other overlays (recipes, ablations, protocols) stay as
    they are.

    Args:
        folder: the bundle's ``configs``.
        overlays: the plan, then what else was laid over the training's config, in that order.

    Raises:
        BadInput: a file can't be read, or an overlay doesn't fit the configs.
    """
    own = {
        path.relative_to(folder).as_posix(): read_json(path)
        for path in sorted(folder.rglob("*.json"))
        if path.name not in _NOT_CONFIGS
    }
    given = {path: read_json(path) for path in overlays}
    train = _merge([own["train.json"]], given, new=True)
    inference = _merge([own["inference.json"]], given, new=False)
    while missing := {name for name in _references(inference) - set(inference) if name in train}:
        inference.update({name: train[name] for name in sorted(missing)})
    configs = {**own, "train.json": train, "inference.json": inference}
    for name in _OVERLAYS:
        merged = ConfigParser(_merge([own["train.json"], own[name]], given, new=True))
        configs[name] = {key.lstrip("+"): merged[key.lstrip("+")] for key in own[name]}
    return configs


def carried(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The configs of a bundle that carries the package as ``scripts/common``.

    MONAI puts a bundle's folder on Python's path after ``initialize`` and before ``run``. So that a bundle works in
    whatever folder it is called from, what ``initialize`` lists comes first in ``run``.
    """
    train = configs["train.json"]
    return {name: _carried(_at_once(config, train)) for name, config in configs.items()}


def _at_once(config: Mapping[str, Any], train: Mapping[str, Any]) -> dict[str, Any]:
    if not {"initialize", "run"} & set(config):
        return dict(config)
    steps = [*config.get("initialize", train["initialize"]), *config.get("run", train["run"])]
    return {**{key: value for key, value in config.items() if key != "initialize"}, "run": steps}


def _carried(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _carried(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_carried(item) for item in value]
    if isinstance(value, str) and is_target(key) and value.startswith(f"{PACKAGE}."):
        return f"scripts.{value}"
    if isinstance(value, str):
        # The expressions go on saying `common`, which is what this import names.
        text = re.sub(rf"^\$\s*import {PACKAGE}$", f"$import {CARRIED_AS} as {PACKAGE}", value)
        return _IMPORT.sub(rf"$\1 {CARRIED_AS}", text)
    return value
