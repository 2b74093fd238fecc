"""What a result was made with: versions, code, machine, and the content of every data file."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from .data.datalist import SECTIONS, read_datalist

__all__ = ["DataDigests", "data_digests", "different", "digests_below", "environment", "file_digest", "git_state"]

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "monai", "pytorch-ignite", "numpy", "scipy")
_READERS = 4  # files at a time: what keeps a network drive busy, and no more than a part of the cores
_SHOWN = 40  # characters of a value in a message
_BLOCK = 1 << 20  # bytes in memory at a time
_LONG = 30.0  # seconds after which the digests of the data deserve a line


def git_state(folder: Path = ROOT) -> tuple[str, bool] | None:
    """The commit of a checkout, and whether files differ from it; None outside of a repository.

    Args:
        folder: the checkout's root. A folder within one, such as that of an installed package, is no checkout.
    """
    git = ["git", "-C", str(folder)]

    def ask(*words: str) -> str:
        return subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(ask("rev-parse", "--show-toplevel")).resolve() != folder.resolve():
            return None
        return ask("rev-parse", "HEAD"), bool(ask("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None


def code_digest() -> str:
    """SHA-256 of this package's programs, by which they are known without git, and while they are being changed."""
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0{file_digest(path)}\0".encode())
    return digest.hexdigest()


def environment(device: torch.device | str, processes: int = 1) -> dict[str, Any]:
    """All that a training's numbers depend on besides its config and its data, by what it is called.

    Args:
        device: that of the training.
        processes: how many train together.
    """
    device = torch.device(device)
    git = git_state()
    return {
        "few-labels-bundles": _version("few-labels-bundles"),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "commit": git[0] if git else None,
        "changed since that commit": git[1] if git else None,
        "code": code_digest(),
        "system": platform.system(),
        "device": device.type,
        # Sums are taken in another order on another processor, or with another number of threads.
        "processor": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def different(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two dictionaries, in words, such as two :func:`environment`."""
    return [
        f"{name}: {_shown(then.get(name))} in the record, {_shown(now.get(name))} here"
        for name in dict.fromkeys([*then, *now])
        if then.get(name) != now.get(name)
    ]


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)[:_SHOWN]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, or of the files of a folder (a DICOM series) and their names."""
    path = Path(path)
    if path.is_dir():
        digest = hashlib.sha256()
        for item in sorted(item for item in path.iterdir() if item.is_file()):
            digest.update(f"{item.name}\0{file_digest(item)}\0".encode())
        return digest.hexdigest()
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def data_digests(datalist: str | os.PathLike[str], cases: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """SHA-256 of a datalist and of the files of the cases that are used.

    Args:
        datalist: the JSON file. It counts only where it knows all of the cases' images: MONAI Label gives others.
        cases: the entries that are used; none takes all that the datalist has.

    Returns:
        ``datalist`` (its path, or None), ``sha256`` (of that file, or None), ``folder`` and ``files``: digests by the
        path relative to that folder; None for one that can't be read.
    """
    path = Path(datalist).expanduser().resolve()
    entries, known = list(cases), False
    folder: Path | None = None
    if path.is_file():
        content = read_datalist(path)
        folder = path.parent
        named = [entry for section in SECTIONS for entry in content.get(section, ())]
        images = {file for entry in named for file in _files([entry["image"]], folder)}
        known = all(file in images for case in cases for file in _files([case["image"]], folder))
        entries = entries or named
    values = [entry[key] for entry in entries for key in entry if key not in ("annotated", "patient", "case_name")]
    files = sorted(set(_files(values, folder)))
    folder = folder if known else Path(os.path.commonpath([file.parent for file in files])) if files else None
    return {
        "datalist": str(path) if known else None,
        "sha256": file_digest(path) if known else None,
        "folder": str(folder) if folder else None,
        "files": digests_below(folder or Path(), [Path(os.path.relpath(file, folder)).as_posix() for file in files]),
    }


def digests_below(folder: Path, names: Iterable[str]) -> dict[str, str | None]:
    """SHA-256 by the names of files, relative to a folder; None for one that is not there or can't be read."""
    names = list(names)
    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(names, pool.map(lambda name: _digest_or_none(folder / name), names), strict=True))


def _files(values: Iterable[Any], folder: Path | None) -> Iterable[Path]:
    """The values of entries that are names of files or folders there are, or lists of such."""
    for value in values:
        if isinstance(value, list):
            yield from _files(value, folder)
        elif isinstance(value, str) and value:
            path = Path(os.path.normpath((folder or Path()) / Path(value).expanduser())).absolute()
            if path.exists():
                yield path


def _digest_or_none(path: Path) -> str | None:
    try:
        return file_digest(path)
    except OSError:
        return None


class DataDigests:
    """:func:`data_digests`, taken beside a training, which does not wait for them.

    Args:
        datalist: see :func:`data_digests`.
        cases: see :func:`data_digests`.
    """

    def __init__(self, datalist: str | os.PathLike[str], cases: Sequence[Mapping[str, Any]] = ()) -> None:
        self._result: dict[str, Any] | None = None
        # A thread that nobody waits for, so that a training that fails ends at once.
        self._thread = Thread(target=self._take, args=(datalist, list(cases)), daemon=True)
        self._thread.start()

    def _take(self, datalist: str | os.PathLike[str], cases: Sequence[Mapping[str, Any]]) -> None:
        start = time.monotonic()
        try:
            self._result = data_digests(datalist, cases)
        except (OSError, ValueError) as error:
            logger.warning("The data's digests are missing from the run's record: %s", error)
            return
        seconds = time.monotonic() - start
        if seconds > _LONG:
            logger.info("SHA-256 of %d data files taken in %.0f s", len(self._result["files"]), seconds)

    def result(self, wait: bool = True) -> dict[str, Any] | None:
        """What :func:`data_digests` gives; None while it is not known, and when the data could not be read.

        Args:
            wait: until it is known.
        """
        if wait:
            self._thread.join()
        return self._result
