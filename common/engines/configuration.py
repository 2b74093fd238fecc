"""The configuration of the run that is under way, as one JSON-able dictionary."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from monai.bundle import ConfigParser

from ..errors import BadInput

__all__ = ["config_values", "loaded_checkpoint", "read_json_words", "running_config"]

_JSON_WORDS = {"null": None, "true": True, "false": False}
_PATHS = ("input", "output_dir", "ckpt_dir", "dataset_dir")  # a folder may be called 2024


def _running_parser() -> ConfigParser | None:
    """The parser that is instantiating the caller, from the call stack: MONAI hands it to no component."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, ConfigParser):
            return owner
        frame = frame.f_back
    return None


def read_json_words() -> None:
    """Make of the texts ``null``, ``true`` and ``false`` in the running config what they say in JSON.

    MONAI's command line hands these words on as texts, and the text ``"false"`` counts as true in Python. The name of a
    folder that is a whole number it hands on as that number, which becomes the name again. Called before anything else
    of the config is made.

    Raises:
        BadInput: the command line gives an option the value ``None``, which MONAI drops as if it had not been given.
    """
    for name, value in zip(sys.argv, sys.argv[1:], strict=False):
        if name.startswith("--") and value == "None":
            raise BadInput(f"{name} None: MONAI passes over it, and the config's own value would stay. Write null.")
    parser = _running_parser()
    if parser is None:
        return
    config = parser.config = _with_words_read(parser.config)
    for name in _PATHS:
        if type(config.get(name)) is int:
            config[name] = str(config[name])
    for name, item in parser.ref_resolver.items.items():
        value = _with_words_read(item.get_config())
        item.update_config(str(value) if name in _PATHS and type(value) is int else value)


def _with_words_read(config: Any) -> Any:
    """The same objects, changed in place where they hold such a word."""
    if isinstance(config, str):
        return _JSON_WORDS.get(config, config)
    if isinstance(config, (dict, list)):
        for key, value in config.items() if isinstance(config, dict) else enumerate(config):
            config[key] = _with_words_read(value)
    return config


def running_config() -> dict[str, Any]:
    """The merged config (files, overlays and command-line overrides) of the bundle that is calling.

    MONAI gives a config's components no way to see the config they come from, while a record of a run is worth little
    without it. Written to a file it is a config that ``python -m monai.bundle run --config_file`` runs again.

    Returns:
        The config with ``@`` references and ``$`` expressions as written; empty outside a bundle run.
    """
    parser = _running_parser()
    if parser is None:
        return {}
    config = {key: value for key, value in parser.get().items() if key != "_meta_"}
    return json.loads(json.dumps(config, default=str))


def loaded_checkpoint(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The weights that a handler of MONAI's loads first: with MONAI Label the teacher goes on from its own.

    Args:
        config: of a training.

    Returns:
        The setting that names the file, and the file; None where no handler loads one.
    """
    handlers = (config.get("train") or {}).get("handlers") or ()
    for number, handler in enumerate(handlers):
        if str(handler.get("_target_")).rpartition(".")[2] == "CheckpointLoader" and handler.get("load_path"):
            return f"train#handlers#{number}#load_path", str(handler["load_path"])
    return None


def config_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config by their place in it, ``train#trainer#max_epochs`` as ``train/trainer/max_epochs``.

    A reference to a value counts as that value; one to anything else, and a remark, are left out.
    """
    return dict(_leaves(config, config))


def _leaves(value: Any, config: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    if _is_value(value):
        value = _referred(value, config)
        if not _is_reference(value):
            yield name, value
        return
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        if not str(key).startswith("_comment"):
            part = re.sub(r"[^\w.-]", "_", str(key))  # MLflow takes no other characters
            yield from _leaves(item, config, f"{name}/{part}" if name else part)


def _is_value(item: Any) -> bool:
    """Whether it is no part of the config's structure: a number, a text, or a list of such."""
    return not isinstance(item, Mapping) and not (isinstance(item, list) and any(isinstance(i, Mapping) for i in item))


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"@[\w:#]+", value) is not None


def _referred(value: Any, config: Mapping[str, Any]) -> Any:
    """What ``@place#in#config`` refers to, where that is a value; else ``value`` as it is."""
    if not _is_reference(value):
        return value
    found: Any = config
    for part in re.split("#|::", value[1:]):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            return value
    return _referred(found, config) if _is_value(found) else value
