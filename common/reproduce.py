"""Repeat a training from its record, and say what differs here from what it was made with.

    python -m common reproduce output/teacher --output output/again          # prints the command
    python -m common reproduce output/teacher --output output/again --run    # runs it and compares the weights

The record is ``run.json`` in the ``output_dir`` of a training. The config in it can run Python, as any config of MONAI
can: repeat runs of people you trust.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .engines.configuration import loaded_checkpoint
from .errors import BadInput
from .files import write_atomically
from .handlers.tracking import RUN_FILE, weights_digest
from .provenance import ROOT, different, digests_below, environment, file_digest

__all__ = ["add_arguments", "command_line", "data_faults", "main", "parent_faults", "read_run"]

_MOST_SHOWN = 10


def read_run(run: Path) -> tuple[Path, dict[str, Any]]:
    """The record of a run, and where it is.

    Args:
        run: the record, or the folder of the run, which has it in itself or in its folder ``train``.

    Raises:
        BadInput: there is none, or it is of before records held what a repetition needs.
    """
    places = [run / RUN_FILE, run / "train" / RUN_FILE] if run.is_dir() else [run]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise BadInput(f"{run}: no record of a run there; expected the output_dir of a training, with its {RUN_FILE}.")
    try:
        record = json.loads(path.read_text())
        complete = all(isinstance(record[key], dict) for key in ("config", "made_with", "parents"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path}: it does not hold what a repetition needs ({type(error).__name__}: {error}); expected the record "
            "that a training writes. One of an earlier version has run_id and tracking_uri alone."
        ) from error
    if not complete:
        raise BadInput(f"{path}: config, made_with and parents must be objects, as a training writes them.")
    return path, record


def data_faults(data: Mapping[str, Any] | None, datalist: Path | None = None) -> list[str]:
    """What differs between the data that are here and those of a record, in words.

    Args:
        data: the record's, see :func:`~common.provenance.data_digests`.
        datalist: where it lies here; None for the record's own place.
    """
    if data is None:
        return ["the record has no digests of the data: the run was stopped before they were taken"]
    faults = []
    datalist = datalist or (Path(data["datalist"]) if data["datalist"] else None)
    if datalist is not None and data["sha256"]:
        if not datalist.is_file():
            return [f"{datalist}: not here; say where it is with --datalist"]
        if file_digest(datalist) != data["sha256"]:
            faults.append(f"{datalist}: another content")
    folder = datalist.resolve().parent if datalist is not None else Path(data["folder"] or ".")
    for name, digest in digests_below(folder, data["files"]).items():
        if digest is None:
            faults.append(f"{folder / name}: not here")
        elif digest != data["files"][name]:
            faults.append(f"{folder / name}: another content")
    return faults


def parent_faults(parents: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What differs between the weights that a run started from or learnt from and those that are here, in words.

    Args:
        parents: ``path`` and ``weights``, their digest, by role.
    """
    faults = []
    for role, parent in parents.items():
        try:
            same = weights_digest(parent["path"]) == parent["weights"]
        except BadInput:
            faults.append(f"{role}, {parent['path']}: no weights here; say where they are with --weights {role}=FILE")
            continue
        if not same:
            faults.append(f"{role}, {parent['path']}: other weights")
    return faults


def command_line(
    record: Mapping[str, Any], output: Path, datalist: Path | None = None, weights: Mapping[str, Path] | None = None
) -> tuple[list[str], dict[str, str], Path]:
    """What repeats a run: the command, what its environment must say, and the folder to call it from.

    Args:
        record: of the run.
        output: folder of the repetition; its ``config.json`` is to be the record's config.
        datalist: where it lies here; None for the record's own place.
        weights: files of the stages before by role, where they lie elsewhere than the record says.
    """
    made_with, output = record["made_with"], output.resolve()
    processes = made_with.get("processes", 1)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *torchrun, "-m", "monai.bundle", "run", "--config_file", str(output / "config.json")]
    settings: dict[str, Any] = {"output_dir": output, "ckpt_dir": output / "models", "resume": "false"}
    on_cpu = made_with.get("device") == "cpu"
    if processes == 1:
        settings["device"] = record["device"] if on_cpu or torch.cuda.is_available() else "cpu"
    if on_cpu or torch.cuda.is_available():
        settings["amp"] = record["amp"]
    if "num_workers" in record:
        settings["num_workers"] = record["num_workers"]
    if datalist is not None:
        settings |= {"dataset_dir": datalist.resolve().parent, "datalist": datalist.resolve()}
    for role, path in (weights or {}).items():
        settings[_weights_setting(role, record["config"])] = path.resolve()
    for key, value in settings.items():
        command += [f"--{key}", str(value)]
    variables = {"OMP_NUM_THREADS": str(made_with["threads"])} if on_cpu else {}
    if record.get("bundle_folder"):  # a packed one brings its own code
        variables["PYTHONPATH"] = record["bundle_folder"]
    folder = Path(record.get("folder", "."))
    return command, variables, folder if folder.is_dir() else Path.cwd()


def _weights_setting(role: str, config: Mapping[str, Any]) -> str:
    """The setting that names the file of a role's weights."""
    if role == "start" and (loaded := loaded_checkpoint(config)):
        return loaded[0]
    return f"{role}_path" if f"{role}_path" in config else f"teacher_paths#{role}"


def _weights(pairs: list[str], parents: Mapping[str, Any]) -> dict[str, Path]:
    found = dict(pair.partition("=")[::2] for pair in pairs)
    if not all(found.values()) or not found.keys() <= parents.keys():
        raise BadInput(
            f"--weights {' '.join(pairs)}: expected ROLE=FILE, and of the roles of this run: "
            f"{', '.join(parents) or 'it started from no weights'}."
        )
    return {role: Path(path) for role, path in found.items()}


def _list(title: str, items: list[str]) -> None:
    print(f"{title}:")
    for item in items[:_MOST_SHOWN]:
        print(f"  {item}")
    if len(items) > _MOST_SHOWN:
        print(f"  and {len(items) - _MOST_SHOWN} more")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m common reproduce``."""
    parser.add_argument("run", type=Path, help="output_dir of a training, or the run.json in it")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the repetition")
    parser.add_argument("--datalist", type=Path, help="the datalist, where the data lie elsewhere than they did")
    help_text = "those of a stage before, such as teacher=model.pt, where they lie elsewhere"
    parser.add_argument("--weights", nargs="+", default=[], metavar="ROLE=FILE", help=help_text)
    parser.add_argument("--run", dest="execute", action="store_true", help="run it, and compare the weights")


def main(options: argparse.Namespace) -> int:
    """Print or run what repeats a training; the exit code is 1 where the data or the weights differ."""
    path, record = read_run(options.run)
    config = options.output / "config.json"  # there when the command was only printed before
    content = json.dumps(record["config"], indent=2)
    there = [item for item in options.output.iterdir() if item != config] if options.output.exists() else []
    if there or (config.exists() and config.read_text() != content):
        raise BadInput(f"--output {options.output}: something is there already; choose a new folder.")
    weights = _weights(options.weights, record["parents"])
    parents = {
        role: {**parent, "path": str(weights.get(role, parent["path"]))} for role, parent in record["parents"].items()
    }
    made_with = record["made_with"]
    finished = "finished" if record.get("weights") else "not finished"
    print(f"record: {path}, {record.get('stage')}, seed {record.get('seed')}, {finished}")
    for resumed in record.get("resumed", ()):
        changed = resumed["changed"]
        print(f"resumed after epoch {resumed['after_epoch']}" + (" with the same settings" if not changed else ""))
        if changed:
            _list("  which no single command repeats, since from then on", changed)
    here = environment(
        "cuda" if made_with.get("device") == "cuda" and torch.cuda.is_available() else "cpu",
        made_with.get("processes", 1),
    )
    here["threads"] = made_with.get("threads")  # the command says how many
    changes = different(made_with, here)
    _list("differs here", changes) if changes else print("versions, code and machine: as in the record")
    faults = data_faults(record.get("data"), options.datalist) + parent_faults(parents)
    if faults:
        _list("the data differ", faults)
    else:
        count = len(record["data"]["files"])
        print(f"data: {count} files as in the record" + "".join(f"; weights of {role}, too" for role in parents))

    write_atomically(config, content)
    command, variables, folder = command_line(record, options.output, options.datalist, weights)
    go = f"cd {shlex.quote(str(folder))} && " if folder.resolve() != Path.cwd().resolve() else ""
    settings = "".join(f"{name}={shlex.quote(value)} " for name, value in variables.items())
    print(f"command:\n  {go}{settings}{shlex.join(['python', *command[1:]])}", flush=True)
    if faults or not options.execute:
        if faults and options.execute:
            print("not run: with other data it is another training")
        return 1 if faults else 0
    python_path = os.pathsep.join(filter(None, [variables.pop("PYTHONPATH", str(ROOT)), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=folder, env={**os.environ, **variables, "PYTHONPATH": python_path}, check=False)
    if done.returncode:
        return 1
    digest = weights_digest(options.output / "models" / "model.pt")
    if not record.get("weights"):
        print(f"weights: {digest}; the recorded run was not finished, so there is nothing to compare with")
        return 0
    if digest == record["weights"]:
        print(f"weights: the same as in the record, bit for bit ({digest})")
        return 0
    print(f"weights: {digest}, others than in the record: {record['weights']}")
    return 1
