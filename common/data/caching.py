"""Preprocessed cases kept in memory, or on disk from run to run."""

from __future__ import annotations

import hashlib
import inspect
import io
import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Compose, Transform
from monai.transforms.traits import RandomizableTrait

from ..errors import BadInput
from ..files import write_atomically

__all__ = ["CachedDataset"]

logger = logging.getLogger(__name__)

_BLOCK = 2**24
#: files beside which another one holds the voxels
_HEADERS = (".mhd", ".nhdr", ".hdr", ".img")


class CachedDataset(CacheDataset):
    """MONAI's data set that does the deterministic transforms once, in memory, or on disk for later runs, too.

    On disk there is one file a case. It bears the digest of everything that decides its content: what is in the files
    that the first transform loads, the rest of the entry, the deterministic transforms with their settings, the code
    that reads and transforms, and the versions of the libraries that help. So it is found again wherever the data lie,
    and never for another content. It is mapped into memory, not read: of a volume no more than its patches is loaded,
    and loading processes share what is. The folder can be emptied at any time between runs; nothing else empties it.

    Args:
        data: entries.
        transform: a flat ``Compose``; what comes before its first random transform is done once, the loading first.
        cache_dir: folder for the files; None keeps everything in memory.
        kwargs: everything else that MONAI's data set takes.

    Raises:
        BadInput: a file can't be written, or the transforms made something that can't be kept on disk.
    """

    def __init__(
        self, data: Sequence[Any], transform: Compose, cache_dir: str | Path | None = None, **kwargs: Any
    ) -> None:
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        if self.cache_dir is not None:
            steps = _deterministic(transform)
            self._loaded = tuple(getattr(steps[0], "keys", ())) if steps else ()
            self._settings = _describe([steps, _code()])
        super().__init__(data, transform, **kwargs)

    def _load_cache_item(self, idx: int) -> Any:
        if self.cache_dir is None:
            return super()._load_cache_item(idx)
        entry = self.data[idx]
        described = _describe_entry(entry, self._loaded)
        if described is None:
            return super()._load_cache_item(idx)
        path = self.cache_dir / f"{hashlib.sha256(f'{described} {self._settings}'.encode()).hexdigest()}.pt"
        stored = _read(path)
        if stored is None:
            content = _to_store(super()._load_cache_item(idx), entry)
            buffer = io.BytesIO()
            torch.save(content, buffer)
            # Another process may have written it meanwhile, and mapped it.
            if not path.exists() or _read(path) is None:
                write_atomically(path, buffer.getbuffer())
            stored = _read(path) or content
        return {key: stored["made"].get(key, entry.get(key)) for key in stored["keys"]}


def _read(path: Path) -> dict[str, Any] | None:
    """What a file holds, mapped into memory; None where there is none that can be read."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        logger.warning("%s can't be read (%s), so its case is prepared anew", path, str(error).splitlines()[0])
        return None


def _to_store(prepared: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a prepared case, and what isn't as it was in its entry."""
    made = {}
    for key, value in prepared.items():
        plain = _plain(value)
        if plain is not None:
            made[key] = plain
        elif value is not entry.get(key):
            raise BadInput(
                f"cache_dir: the preprocessing makes {key!r}, of the kind {type(value).__name__}, which can't be kept "
                "on disk. Set cache_dir to null, or let it make tensors and numbers."
            )
    return {"keys": list(prepared), "made": made}


def _plain(value: Any) -> Any:
    """Tensors of their own memory, numbers, and lists of them; None for everything else."""
    if isinstance(value, np.ndarray | torch.Tensor):
        tensor = value.as_tensor() if isinstance(value, MetaTensor) else torch.as_tensor(value)
        return tensor.clone(memory_format=torch.contiguous_format)
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, np.number):
        return value.item()
    if isinstance(value, list | tuple):
        plain = [_plain(item) for item in value]
        return None if any(item is None for item in plain) else plain
    return None


def _deterministic(transform: Compose) -> list[Callable]:
    """The transforms that MONAI's data set does once."""
    first_random = transform.get_index_of_first(
        lambda step: isinstance(step, RandomizableTrait) or not isinstance(step, Transform)
    )
    return list(transform.transforms[:first_random])


def _describe_entry(entry: Mapping[str, Any], loaded: Sequence[str]) -> str | None:
    """An entry in which files that are loaded are what they hold; None where that can't be told from them."""
    parts = []
    for key in sorted(entry):
        value = entry[key]
        if key not in loaded or value is None or isinstance(value, int | float):
            parts.append(f"{key} {_describe(value)}")
            continue
        for path in map(Path, value if isinstance(value, list | tuple) else [value]):
            # What isn't there is for the loader to explain.
            if not path.exists() or path.name.lower().endswith(_HEADERS):
                return None
            files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
            parts.append(f"{key} {[_digest(file) for file in files]}")
    return "\n".join(parts)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _describe(value: Any) -> str:
    """An object's type and its attributes, but for random states."""
    if isinstance(value, Mapping):
        return str([(str(key), _describe(item)) for key, item in value.items()])
    if isinstance(value, set | frozenset):
        return str(sorted(_describe(item) for item in value))
    if isinstance(value, list | tuple):
        return str([_describe(item) for item in value])
    if isinstance(value, partial):
        return _describe([value.func, value.args, value.keywords])
    if isinstance(value, np.random.RandomState | np.random.Generator):
        return ""
    if isinstance(value, np.ndarray | torch.Tensor):
        return f"{value.dtype} {np.asarray(value).tolist()}"
    if inspect.isroutine(value):
        cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        return f"{value.__module__}.{value.__qualname__} {_describe(cells)}"
    if inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "__dict__") and not isinstance(value, torch.dtype | torch.device):
        return f"{_describe(type(value))} {_describe(vars(value))}"
    return repr(value)


@cache
def _code() -> list[str]:
    package = Path(__file__).resolve().parents[1]
    sources = [package / "targets.py", *package.glob("data/*.py"), *package.glob("transforms/*.py")]
    libraries = ("itk", "monai", "nibabel", "numpy", "torch")
    return [*map(_digest, sorted(sources)), *map(_version, libraries)]


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"
