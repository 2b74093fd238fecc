"""Check a packed bundle before it is used. Nothing of the archive is run unless that is asked for."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
from torch import Tensor

from ..errors import BadInput
from ..networks import check_finite, read_weights, state_digest
from .archive import CHECKSUMS, Limits, entry_faults, size_faults
from .configs import carried
from .inspection import FOREIGN, Use, config_uses, import_names, logging_uses, value_faults

__all__ = ["Report", "add_arguments", "main", "verify_archive", "verify_config"]

# MONAI's own (Apache-2.0), carried because a check should need no network.
SCHEMA = Path(__file__).with_name("meta_schema_20240725.json")
PACKAGE = Path(__file__).resolve().parents[1]
BUNDLES = PACKAGE.parent / "bundles"  # of a checkout
MODEL, RECORD, METADATA = "models/model.pt", "models/model.json", "configs/metadata.json"
NEEDED = (CHECKSUMS, METADATA, "configs/inference.json", "configs/train.json", MODEL, "docs/README.md", "LICENSE")
_LARGEST_TEXT = 10_000_000
_CHUNK = 1 << 20

# What --run-code does, in a process of its own: as MONAI would, but for the weights that must fit exactly.
_RUN_CODE = """
import sys
sys.path.insert(0, ".")
import torch
from monai.bundle import ConfigParser, verify_net_in_out
parser = ConfigParser()
parser.read_config("configs/inference.json")
content = torch.load("models/model.pt", map_location="cpu", weights_only=True)
parser.get_parsed_content("network_def").load_state_dict(content.get("model", content), strict=True)
verify_net_in_out("network_def", meta_file="configs/metadata.json", config_file="configs/inference.json", device="cpu")
"""


@dataclass
class Report:
    """What was found in an archive.

    Args:
        file: the archive.
        bundle: name of the folder in it.
        version: of its metadata.
        done: the checks that passed, by name, with what they saw.
        problems: (check, place, what is wrong).
        notes: what is no fault, but worth reading.
        uses: what the configs would run.
    """

    file: str
    bundle: str = ""
    version: str = ""
    done: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def blame(self, check: str, place: str, problem: str) -> None:
        """Add a problem."""
        self.problems.append((check, place, problem))

    def objects(self) -> dict[str, list[str]]:
        """Full names of what the configs would run, and the files that name them."""
        found: dict[str, set[str]] = {}
        for use in self.uses:
            found.setdefault(use.name, set()).add(use.file)
        return {name: sorted(found[name]) for name in sorted(found)}


def verify_archive(
    path: str | Path, allow: Sequence[str] = (), limits: Limits | None = None, run_code: bool = False
) -> Report:
    """Check a packed bundle.

    In this order: that it can be unpacked safely (paths, links, sizes, names that are there twice), that every file is
    as its checksum says, that weights are tensors and finite, that metadata follow MONAI's schema and agree with the
    configs, whether the code is that of the package installed here, and which Python objects the configs would run.

    Args:
        path: the zip file.
        allow: packages or objects, besides those that bundles need, that configs may run; ``"scripts"`` allows programs
            of the archive's own that are others than those of the package installed here.
        limits: what it may unpack to.
        run_code: its programs are trusted, so when all of this is fine, also make the network with them, and load the
            weights.

    Raises:
        BadInput: there is no such file.
    """
    path, limits = _existing(path), limits or Limits()
    report = Report(str(path))
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        report.blame("archive", path.name, f"can't be read as a zip file ({error}). Copy or download it again.")
        return report
    with archive, tempfile.TemporaryDirectory() as folder:
        for place, fault in entry_faults(archive, limits):
            report.blame("archive", place or path.name, f"{fault}. Don't unpack it.")
        if report.problems:
            return report
        files = _digest(archive, report, Path(folder))
        if report.bundle:
            report.done["archive"] = f"{len(files)} files in one folder, {_megabytes(archive)}"
            trusted = run_code or "scripts" in allow
            _inspect(Path(folder) / report.bundle, files, report, allow, limits, trusted)
        if run_code and report.fine:
            _run_code(Path(folder) / report.bundle, report)
    return report


def verify_config(path: str | Path, allow: Sequence[str] = ()) -> Report:
    """Check which Python objects a config by itself would run: a plan, a recipe or another overlay.

    Args:
        path: the JSON file, to be laid over a config of this project.
        allow: packages or objects, besides those that bundles need, that it may run.

    Raises:
        BadInput: there is no such file.
    """
    path = _existing(path)
    report = Report(str(path))
    config = _json(path.parent, path.name, report, "configs")
    below = {str(file): json.loads(file.read_text()) for file in BUNDLES.glob("*/configs/train.json")}
    # Called as in a packed bundle, which is how the list knows what is the project's own.
    named = carried({"train.json": {"initialize": [], "run": []}, **below, "it": config})
    # What the configs below it have imported, it may use by those names.
    report.uses += config_uses(path.name, named["it"], _names(named.values(), report), allow)
    _blame_uses(report)
    if report.fine:
        report.done["configs"] = _objects(report, allow)
    return report


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file. Give a zip file that `python -m common pack` wrote, or a JSON config.")
    return path


def _megabytes(archive: zipfile.ZipFile) -> str:
    return f"{sum(entry.file_size for entry in archive.infolist()) / 1e6:.1f} MB"


def _digest(archive: zipfile.ZipFile, report: Report, folder: Path) -> dict[str, str]:
    """Unpack everything into ``folder``; returns the SHA-256 of each file by its path in the bundle."""
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    tops = sorted({entry.filename.split("/")[0] for entry in entries})
    if len(tops) != 1 or any("/" not in entry.filename for entry in entries):
        report.blame("archive", ", ".join(tops[:5]), "expected one folder at the top, with the bundle's name.")
        return {}
    digests = {}
    for entry in entries:
        name = entry.filename.removeprefix(f"{tops[0]}/")
        target, digest = folder / entry.filename, hashlib.sha256()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with archive.open(entry) as source, open(target, "xb") as copy:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    copy.write(chunk)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
            # The last two: flags that zipfile knows no way to read, names that are no text.
            report.blame("archive", name, f"can't be unpacked ({error}). Copy or download the archive again.")
            return {}
        digests[name] = digest.hexdigest()
    report.bundle = tops[0]
    return digests


def _inspect(
    root: Path, files: Mapping[str, str], report: Report, allow: Sequence[str], limits: Limits, trusted: bool
) -> None:
    checks: list[tuple[str, Callable[[], str]]] = [
        ("files", lambda: _check_kinds(files, report)),
        ("digests", lambda: _check_digests(root, files, report)),
        ("weights", lambda: _check_weights(root, files, report, limits)),
        ("metadata", lambda: _check_metadata(root, files, report)),
        ("code", lambda: _check_code(files, report, trusted)),
        ("configs", lambda: _check_configs(root, files, report, allow)),
    ]
    for name, check in checks:
        before = len(report.problems)
        seen = check()
        if len(report.problems) == before:
            report.done[name] = seen


def _check_kinds(files: Mapping[str, str], report: Report) -> str:
    """Nothing but what a packed bundle has: a module beside ``scripts``, say, would take an installed one's place."""
    for name in NEEDED:
        if name not in files:
            report.blame("files", name, "is missing. Pack the bundle again.")
    for name in files:
        top, _, rest = name.partition("/")
        fine = (
            name in (*NEEDED, RECORD)
            or (top == "configs" and name.endswith((".json", ".conf")))
            or (top == "scripts" and name.endswith((".py", ".json")))
            or (top == "docs" and rest.endswith(".md"))
        )
        if not fine:
            report.blame("files", name, "is nothing that a packed bundle has. Ask its maker what it is for.")
    return "what a bundle has, and nothing else"


def _check_digests(root: Path, files: Mapping[str, str], report: Report) -> str:
    if CHECKSUMS not in files:
        report.blame("digests", CHECKSUMS, "is missing: nothing says what the files should be.")
        return ""
    listed: dict[str, str] = {}
    for line in _text(root, CHECKSUMS, report, "digests").splitlines():
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64 or name in listed:
            report.blame("digests", CHECKSUMS, f"the line {line[:80]!r} is no checksum, or one of a file listed twice.")
            return ""
        listed[name] = digest
    for name in sorted(set(listed) - set(files)):
        report.blame("digests", name, f"is listed in {CHECKSUMS}, but missing.")
    for name in sorted(set(files) - set(listed) - {CHECKSUMS}):
        report.blame("digests", name, f"is not listed in {CHECKSUMS}: it was added.")
    for name in sorted(set(files) & set(listed)):
        if files[name] != listed[name]:
            report.blame(
                "digests", name, f"was changed: SHA-256 {files[name][:16]}..., expected {listed[name][:16]}..."
            )
    return f"all {len(listed)} files are as {CHECKSUMS} says"


def _text(root: Path, name: str, report: Report, check: str) -> str:
    try:
        path = root / name
        if path.stat().st_size > _LARGEST_TEXT:
            raise ValueError(f"{path.stat().st_size / 1e6:.0f} MB are more than a text should have")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        report.blame(check, name, f"can't be read as text ({error}).")
        return ""


def _json(root: Path, name: str, report: Report, check: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            raise ValueError("a key is there twice, of which programs read one or the other")
        return content

    try:
        content = json.loads(_text(root, name, report, check) or "{}", object_pairs_hook=unique)
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, expected an object")
    except (ValueError, RecursionError) as error:
        report.blame(check, name, f"is not the JSON that was expected ({error}).")
        return {}
    return content


def _check_weights(root: Path, files: Mapping[str, str], report: Report, limits: Limits) -> str:
    if MODEL not in files:
        return ""
    try:
        if zipfile.is_zipfile(root / MODEL):
            with zipfile.ZipFile(root / MODEL) as inner:
                for place, fault in size_faults(inner, limits):
                    raise BadInput(f"{place} {fault}")
        state = read_weights(root / MODEL)
        _check_sizes(state, limits)
        check_finite(state)
    except (BadInput, zipfile.BadZipFile) as error:
        report.blame("weights", MODEL, str(error).replace(str(root / MODEL), "").strip(": "))
        return ""
    digest = state_digest(state)
    for name in (RECORD, METADATA):
        if name in files:
            content = _json(root, name, report, "weights")
            origin = content if name == RECORD else content.get("lineage")
            said = origin.get("weights") if isinstance(origin, dict) else None
            if said != digest:
                report.blame("weights", name, f"is about other weights ({str(said)[:16]}) than these ({digest[:16]}).")
    numbers = sum(value.numel() for value in state.values())
    return f"{len(state)} tensors, {numbers} numbers, all finite; digest {digest[:16]}"


def _check_sizes(state: Mapping[str, Tensor], limits: Limits) -> None:
    """A tensor can be declared far larger than what is stored of it."""
    size = sum(value.numel() * value.element_size() for value in state.values())
    if size > limits.size:
        raise BadInput(f"the tensors take {size / 1e9:.2f} GB, more than {limits.size / 1e9:g} GB")


def _check_metadata(root: Path, files: Mapping[str, str], report: Report) -> str:
    if not {METADATA, "configs/inference.json"} <= set(files):
        return ""
    metadata = _json(root, METADATA, report, "metadata")
    for error in jsonschema.Draft201909Validator(json.loads(SCHEMA.read_text())).iter_errors(metadata):
        report.blame("metadata", f"{METADATA}, {error.json_path}", error.message[:200])
    for key, fault in value_faults(metadata):
        report.blame("metadata", f"{METADATA}, {key}", f"{fault}.")
    report.version = str(metadata.get("version", ""))
    if any(check == "metadata" for check, *_ in report.problems):
        return ""
    formats = metadata["network_data_format"]
    for direction, first in (("inputs", "image"), ("outputs", "pred")):
        described = formats[direction].get(first)
        if next(iter(formats[direction]), None) != first or not isinstance(described, dict):
            report.blame(
                "metadata", f"{METADATA}, {direction}", f"the first must be {first!r}, as MONAI Label expects."
            )
            return ""
        if described["num_channels"] != len(described.get("channel_def", {})):
            report.blame("metadata", f"{METADATA}, {direction}", "num_channels and channel_def disagree.")
    names = list(formats["outputs"]["pred"].get("channel_def", {}).values())
    labels = _json(root, "configs/inference.json", report, "metadata").get("labels")
    labels = list(labels.values()) if isinstance(labels, dict) else []
    # A network that only measures returns no classes.
    if names[: len(labels)] != labels and any(label in names for label in labels):
        report.blame("metadata", f"{METADATA}, outputs", f"names the channels {names}, the config the labels {labels}.")
    return f"follows MONAI's schema; returns {', '.join(map(str, names))}"


def _check_code(files: Mapping[str, str], report: Report, trusted: bool) -> str:
    """Whether the programs in ``scripts`` are those of the package installed here, or of a trusted maker."""
    here = {
        f"scripts/common/{path.relative_to(PACKAGE).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()
        for suffix in ("py", "json")
        for path in PACKAGE.rglob(f"*.{suffix}")
    }
    here["scripts/__init__.py"] = hashlib.sha256(b"").hexdigest()
    scripts = [name for name in files if name.startswith("scripts/")]
    other = [name for name in scripts if files[name] != here.get(name)]
    if not other:
        return f"the {len(scripts)} files in scripts are those of the package installed here"
    shown = ", ".join(other[:5]) + (f" and {len(other) - 5} more" if len(other) > 5 else "")
    words = (
        f"{len(other)} of {len(scripts)} files are not those of the package installed here: {shown}. They may be of "
        "another version. They are programs: use them when you trust their maker, or read them first"
    )
    if trusted:
        report.notes.append(f"scripts: {words}.")
    else:
        report.blame("code", "scripts", f"{words}. If they are fine: --allow scripts.")
    return f"{len(scripts)} files in scripts, {len(other)} of them unknown here"


def _check_configs(root: Path, files: Mapping[str, str], report: Report, allow: Sequence[str]) -> str:
    configs = {
        name: _json(root, name, report, "configs")
        for name in files
        if name.startswith("configs/") and name.endswith(".json") and name != METADATA
    }
    names = _names(configs.values(), report)
    for name, config in configs.items():
        report.uses += config_uses(name, config, names, allow)
    for name in files:
        if name.endswith(".conf"):
            report.uses += logging_uses(name, _text(root, name, report, "configs"))
    _blame_uses(report)
    return _objects(report, allow)


def _names(configs: Iterable[Mapping[str, Any]], report: Report) -> dict[str, str]:
    """Full names by those that the import statements of configs which are used together give."""
    names: dict[str, str] = {}
    for config in configs:
        for alias, full in import_names(config).items():
            if names.setdefault(alias, full) != full:
                report.blame("configs", alias, f"stands for {names[alias]} in one config, for {full} in another.")
    return names


def _blame_uses(report: Report) -> None:
    for use in report.uses:
        if use.fault:
            hint = f" If it is fine: --allow '{use.name}'." if use.fault.startswith(FOREIGN) else ""
            report.blame("configs", f"{use.file}, {use.key}", f"{use.name} {use.fault}.{hint}")


def _objects(report: Report, allow: Sequence[str]) -> str:
    allowed = f", or allowed: {', '.join(allow)}" if allow else ""
    return f"{len(report.objects())} Python objects, all of them what bundles need{allowed}"


def _run_code(root: Path, report: Report) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-c", _RUN_CODE], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        report.blame("network", "configs/inference.json", f"weights or metadata don't fit its network: {reason[:300]}")
    else:
        report.done["network"] = "of inference.json takes the weights, and is as the metadata say"


def _print(report: Report) -> None:
    print(f"{report.file}: {report.bundle} {report.version}".rstrip(": "))
    for name, seen in report.done.items():
        print(f"  {name + ':':<10} {seen}")
    if report.uses:
        print("  what the configs would run:")
        for name, where in report.objects().items():
            places = ", ".join(file.removeprefix("configs/") for file in where)
            print(f"    {name!a}  ({places!a})" if not (name + places).isprintable() else f"    {name}  ({places})")
    for note in report.notes:
        print(f"  note: {note}")
    if report.bundle and "network" not in report.done and report.fine:
        print(
            "  note: whether the weights fit the network was not tried, since that runs the archive's code: --run-code"
        )
    for check, place, problem in report.problems:
        text = f"{check}, {place}: {problem}"
        print(f"  WRONG {text if text.isprintable() else ascii(text)}")
    print("fine" if report.fine else f"{len(report.problems)} problem(s): don't use it")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m common verify``."""
    parser.description = (
        "Check a packed bundle that you were given: whether it unpacks safely, is as its maker packed it, holds "
        "nothing but weights where weights should be, and which programs its settings would run. Of a plan or another "
        "config (.json): the last of these. Checksums protect against damage; who made it is for you to know. "
        "Nothing in the file is run unless you say --run-code. The exit code is 1 when something is wrong."
    )
    parser.add_argument("file", help="zip file that `python -m common pack` wrote, or a JSON config")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PREFIX",
        help="a Python package or object that the configs may run, besides what bundles need, or `scripts` for "
        "programs that differ from those installed here; may be given several times",
    )
    parser.add_argument(
        "--max-size", type=float, default=Limits.size / 1e9, metavar="GB", help="most that it unpacks to"
    )
    parser.add_argument(
        "--max-ratio", type=float, default=Limits.ratio, help="most that a file grows by when it is unpacked"
    )
    parser.add_argument(
        "--run-code",
        action="store_true",
        help="also make the network with the code in the file and load the weights: only if you trust its maker",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")


def main(options: argparse.Namespace) -> int:
    """Run ``python -m common verify``; returns the exit code."""
    allow = [prefix.rstrip(".") for prefix in options.allow]
    if options.file.endswith(".json"):
        report = verify_config(options.file, allow)
    else:
        limits = Limits(size=options.max_size * 1e9, ratio=options.max_ratio)
        report = verify_archive(options.file, allow, limits, options.run_code)
    if options.json:
        content = asdict(report)
        content["problems"] = [
            dict(zip(("check", "place", "problem"), found, strict=True)) for found in report.problems
        ]
        print(json.dumps({"fine": report.fine, **content}, indent=2))
    else:
        _print(report)
    return 0 if report.fine else 1
