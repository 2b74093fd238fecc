"""Pack a trained bundle into one archive that others download, check and run.

What comes out is a bundle as MONAI describes it: configs with the plan merged in, metadata, weights, card and licence,
and the package itself as ``scripts/common``, so that nothing but the usual libraries is needed to run it. The same
input gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from .. import bundle_root
from ..data.datalist import read_datalist
from ..engines.origin import differences, trained_settings
from ..errors import BadInput, explain
from ..files import write_atomically
from ..networks import hand_over, read_record, read_weights, save_weights, state_digest
from .archive import CHECKSUMS, archive_bytes, checksum_list
from .configs import carried, merge_configs, read_json
from .inspection import value_faults
from .metadata import (
    NOT_STATED,
    classes_of,
    fill_metadata,
    lineage,
    make_card,
    output_channels,
    public_record,
    reached_metrics,
)
from .privacy import find_leaks, identifiers, plain_words, texts_of

__all__ = ["add_arguments", "main", "pack_bundle"]

PACKAGE = Path(__file__).resolve().parents[1]
_VERSION = re.compile(r"\d+\.\d+\.\d+(?:[-+.]?[0-9A-Za-z][\w.+-]*)?")
# Weights lie where these say; an overlay that says otherwise is for something else than a bundle of its own.
_PLACES = ("bundle_root", "ckpt_dir")
_MOST_LEAKS = 20


def pack_bundle(
    bundle: str,
    output: str | Path,
    plan: str | Path | None = None,
    weights: str | Path | None = None,
    overlays: Sequence[str | Path] = (),
    version: str | None = None,
    evaluation: str | Path | None = None,
    metadata: str | Path | None = None,
    datalist: str | Path | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Write a bundle and all it needs into one zip file.

    Args:
        bundle: ``teacher``, ``student`` or ``dual_decoder``.
        output: the zip file to write.
        plan: the plan of the training; None for the bundle's own settings.
        weights: None for the bundle's ``models/model.pt``.
        overlays: what else was laid over the training's config, after the plan.
        version: None for that of the bundle's metadata.
        evaluation: a ``summary.json``, whose means become the metadata's ``eval_metrics``, and its entropies what
            inference compares with, where the weights' record has none.
        metadata: JSON file with what can be said of data and authors, see :data:`.metadata.STATED`.
        datalist: names of its cases and patients are looked for in everything that goes in.

    Returns:
        The metadata of what was packed, and remarks on what could not be checked or was left open.

    Raises:
        BadInput: a file is missing or wrong, weights, plan and overlays don't belong together, or something would go
            in that must not leave the house.
    """
    output = Path(output)
    if output.suffix != ".zip" or output.is_dir():
        raise BadInput(f"output: found {output}, expected a new file whose name ends with .zip.")
    root = _bundle_folder(bundle)
    template = read_json(root / "configs" / "metadata.json")
    number = version or template["version"]
    if not _VERSION.fullmatch(number):
        raise BadInput(f"version: found {number!r}, expected three numbers such as 1.0.0.")

    model = Path(weights or root / "models" / "model.pt")
    state, record = read_weights(model), read_record(model)
    configs = merge_configs(root / "configs", [Path(path) for path in (*([plan] if plan else []), *overlays)])
    own, inference = read_json(root / "configs" / "inference.json"), configs["inference.json"]
    for key in _PLACES:
        if inference[key] != own[key]:
            raise BadInput(
                f"{key}: an overlay sets it to {inference[key]!r}; a packed bundle has its weights in its own "
                "models/model.pt. Remove it from the overlay, or pack the bundle that the weights are of."
            )
    _check_settings(model, record, inference)
    channels = output_channels(
        inference, configs["train.json"].get("segments", True), _try_network(inference, state, model)
    )

    metrics = {}
    if evaluation is not None:
        summary = read_json(Path(evaluation))
        metrics = reached_metrics(summary, classes_of(inference), inference.get("targets", ()), evaluation)
        if "entropy" in summary and "entropy" not in record:
            record = {"weights": state_digest(state), **record, "entropy": summary["entropy"]}
    facts: dict[str, Any] = {"number": number, "metrics": metrics, "origin": lineage(state_digest(state), record)}
    # By which the code tells that a config is its own: Python loads one `scripts` a process.
    for config in configs.values():
        if "bundle_root" in config:
            config["bundle_root"] = f"$common.bundle_root('{bundle}', '{number}+{facts['origin']['weights']}')"
        if "initialize" in config:
            config["initialize"] = ["$@bundle_root", *config["initialize"]]
    filled = fill_metadata(template, inference, channels, given=read_json(Path(metadata)) if metadata else {}, **facts)
    if fault := next(value_faults(filled), None):
        raise BadInput(f"metadata, {fault[0]}: {fault[1]}.")
    card = _text(root / "docs" / "README.md")
    texts = {
        **{f"configs/{name}": _json(config) for name, config in carried(configs).items()},
        "configs/metadata.json": _json(filled),
        "docs/README.md": make_card(bundle, card, filled, inference),
        "LICENSE": _text(root / "LICENSE"),
        "scripts/__init__.py": "",
        **{f"configs/{path.name}": _text(path) for path in sorted((root / "configs").glob("*.conf"))},
        **_package(),
    }
    if record:
        texts["models/model.json"] = _json(public_record(record))
    names = identifiers(read_datalist(datalist)) if datalist else set()
    # The same without anything that the user says.
    unsaid = fill_metadata(template, inference, channels, given={}, **{**facts, "metrics": {}})
    own_configs = carried(merge_configs(root / "configs", []))
    public = {
        **{f"configs/{name}": _json(config) for name, config in own_configs.items()},
        "configs/metadata.json": _json(unsaid),
        "docs/README.md": make_card(bundle, card, unsaid, inference),
        "LICENSE": texts["LICENSE"],
    }
    exempt = _refuse_leaks(texts, names, {part for name, text in public.items() for part in texts_of(name, text)})

    files = {name: text.encode() for name, text in texts.items()}
    files["models/model.pt"] = _weights_bytes(state)
    files[CHECKSUMS] = checksum_list(files)
    write_atomically(output, archive_bytes(bundle, files))
    remarks = {
        f"{model.with_suffix('.json')} doesn't say what these weights were trained for, so whether the plan is theirs "
        "was not checked but for the network": "config" not in record,
        "--metadata can say whose the bundle is and which data it was trained on": filled["data_source"] == NOT_STATED,
        "--evaluation can say what was reached": not metrics,
        "--datalist can say which names of cases and patients to look for": not names,
        f"not looked for, being words of the classes or of the bundle's own texts: {', '.join(sorted(exempt))}": exempt,
    }
    return filled, [remark for remark, holds in remarks.items() if holds]


def _bundle_folder(bundle: str) -> Path:
    root = Path(bundle_root(bundle))
    if (__package__ or "").startswith("scripts."):
        raise BadInput(f"{root}: is packed already. Pack from the project's checkout, with --weights of this bundle.")
    if not (root / "configs" / "train.json").is_file() or root.name != bundle:
        found = sorted(path.parents[1].name for path in root.parent.glob("*/configs/train.json"))
        raise BadInput(f"bundle {bundle!r}: there is none in {root.parent}, which has {', '.join(found) or 'none'}.")
    return root


def _check_settings(model: Path, record: Mapping[str, Any], inference: Mapping[str, Any]) -> None:
    found = differences(record.get("config", {}), trained_settings(inference), own=True)
    if found:
        raise BadInput(
            f"{model}: these weights were trained with other settings than those they are to be packed with:\n  "
            + "\n  ".join(found)
            + "\nGive the --plan and the --overlay of that training."
        )


def _try_network(config: Mapping[str, Any], state: Mapping[str, torch.Tensor], model: Path) -> int:
    """Load the weights into the network that the config describes; returns how many channels it puts out."""
    parser = ConfigParser(json.loads(json.dumps(config)))
    try:
        network = parser.get_parsed_content("network_def")
    except Exception as error:  # MONAI wraps whatever a network's constructor raises
        raise BadInput(f"network_def: can't be made from the plan: {explain(error) or error}") from error
    hand_over(network, state, source=str(model))
    # Twice the total stride is the smallest image whose deepest features can be normalised.
    divisor = getattr(network, "divisor", [16] * config["spatial_dims"])
    with torch.no_grad():
        return network.eval()(torch.zeros(1, config["channels"], *(2 * size for size in divisor))).shape[1]


def _package() -> dict[str, str]:
    """The package's own files, by path in the bundle."""
    paths = [path for suffix in ("py", "json") for path in PACKAGE.rglob(f"*.{suffix}") if path.name[0] != "."]
    return {f"scripts/common/{path.relative_to(PACKAGE).as_posix()}": _text(path) for path in sorted(paths)}


def _refuse_leaks(texts: Mapping[str, str], names: Collection[str], public: Collection[str]) -> set[str]:
    """Raise where a text says what it should not; returns the names that were not looked for, being common words."""
    exempt, folders = plain_words(names, public), (Path.home(), PACKAGE.parent)
    looked_for = set(names) - exempt
    leaks = [
        leak for name, text in sorted(texts.items()) for leak in find_leaks(name, text, looked_for, folders, public)
    ]
    if leaks:
        more = [f"... and {len(leaks) - _MOST_LEAKS} more"] if len(leaks) > _MOST_LEAKS else []
        raise BadInput(
            "nothing was packed; this must not leave the house:\n  " + "\n  ".join(leaks[:_MOST_LEAKS] + more)
        )
    return exempt


def _weights_bytes(state: Mapping[str, torch.Tensor]) -> bytes:
    """Written anew, so that nothing else that a weights file may hold goes along."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        save_weights(state, path)
        return path.read_bytes()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: can't be read as text ({error}).") from error


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=4) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m common pack``."""
    parser.description = (
        "Pack trained weights with everything that is needed to use them into one zip file: settings, code, a card and "
        "checksums. Nobody who gets it needs this project. It is searched for names of patients, for data and for "
        "paths of this machine, and nothing is written when one is found. `python -m common verify` checks the file."
    )
    parser.add_argument("bundle", help="teacher, student or dual_decoder")
    parser.add_argument("--plan", help="the plan that the weights were trained with (the bundle's own settings)")
    parser.add_argument("--output", required=True, help="zip file to write, such as dual_decoder-1.0.0.zip")
    parser.add_argument("--weights", help="the trained weights (bundles/BUNDLE/models/model.pt)")
    parser.add_argument("--version", help="of what is packed, such as 1.0.0 (that of the bundle)")
    parser.add_argument(
        "--evaluation", metavar="SUMMARY", help="summary.json of an evaluation of these weights: what they reached"
    )
    parser.add_argument(
        "--overlay",
        action="append",
        default=[],
        metavar="FILE",
        help="recipe or ablation that was laid over the training's config, where it changes the network or what "
        "inference does; may be given several times, in the same order",
    )
    parser.add_argument(
        "--metadata",
        metavar="FILE",
        help="JSON file with what only you can say: authors, copyright, data_source, intended_use, description, "
        "references",
    )
    parser.add_argument(
        "--datalist", help="the training's datalist: its case and patient names must not occur in what is packed"
    )


def main(options: argparse.Namespace) -> int:
    """Run ``python -m common pack``; returns the exit code."""
    metadata, remarks = pack_bundle(
        options.bundle,
        options.output,
        options.plan,
        options.weights,
        options.overlay,
        options.version,
        options.evaluation,
        options.metadata,
        options.datalist,
    )
    output, origin = Path(options.output), metadata["lineage"]
    print(f"bundle: {options.bundle} {metadata['version']}")
    print(f"returns: {metadata['pred_classes']}")
    print(f"weights: {origin['weights'][:16]}, made from {', '.join(origin['parents']) or 'no other weights'}")
    for remark in remarks:
        print(f"note: {remark}")
    content = output.read_bytes()
    print(f"written: {output}, {len(content) / 1e6:.1f} MB, SHA-256 {hashlib.sha256(content).hexdigest()}")
    return 0
