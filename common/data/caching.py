"""Preprocessed cases kept in memory, or on disk from run to run."""

from __future__ import annotations

import hashlib
import inspect
import io
import logging
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Compose, Transform
from monai.transforms.traits import RandomizableTrait

from ..files import write_atomically

__all__ = ["CachedDataset"]

logger = logging.getLogger(__name__)

_BLOCK = 2**24


class CachedDataset(CacheDataset):
    """MONAI's data set that does the deterministic transforms once, in memory, or on disk for later runs, too.

    On disk there is one file a case. It bears the digest of everything that decides its content: what is in the case's
    files, the rest of its entry, the deterministic transforms with their settings, the code that reads and transforms,
    and the versions of the libraries that help. So it is found again wherever the files lie, and never for another
    content. It is mapped into memory, not read: of a volume
    that is larger than memory no more than the patches is loaded, and loading processes share what is loaded.

    Args:
        data: entries.
        transform: a flat ``Compose``; what comes before its first random transform is done once.
        cache_dir: folder for the files; None keeps everything in memory.
        kwargs: everything else that MONAI's data set takes.
    """

    def __init__(
        self, data: Sequence[Any], transform: Compose, cache_dir: str | Path | None = None, **kwargs: Any
    ) -> None:
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._settings = "" if self.cache_dir is None else _describe([_deterministic(transform), _code()])
        super().__init__(data, transform, **kwargs)

    def _load_cache_item(self, idx: int) -> Any:
        if self.cache_dir is None:
            return super()._load_cache_item(idx)
        entry = self.data[idx]
        key = hashlib.sha256(f"{_describe_entry(entry)}\n{self._settings}".encode()).hexdigest()
        path = self.cache_dir / f"{key}.pt"
        stored = _read(path)
        if stored is None:
            done = super()._load_cache_item(idx)
            buffer = io.BytesIO()
            torch.save({name: plain for name, value in done.items() if (plain := _storable(value)) is not None}, buffer)
            write_atomically(path, buffer.getbuffer())
            stored = _read(path)
            if stored is None:  # a disk that loses what was written: without a cache, then
                return done
        # Texts are the entry's own: another one of the same content may have other names.
        return {**entry, **stored}


def _read(path: Path) -> dict[str, Any] | None:
    """What a file holds, mapped into memory; None where there is none that can be read."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        logger.warning("%s can't be read (%s), so its case is prepared anew", path, str(error).splitlines()[0])
        return None


def _storable(value: Any) -> Any:
    """Plain tensors and numbers, and lists of them; None for everything else."""
    if isinstance(value, MetaTensor):
        return value.as_tensor()
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value)
    if isinstance(value, torch.Tensor | int | float):
        return value
    if isinstance(value, np.number):
        return value.item()
    if isinstance(value, list | tuple):
        plain = [_storable(item) for item in value]
        return None if any(item is None for item in plain) else plain
    return None


def _deterministic(transform: Compose) -> list[Callable]:
    """The transforms that MONAI's data set does once."""
    first_random = transform.get_index_of_first(
        lambda step: isinstance(step, RandomizableTrait) or not isinstance(step, Transform)
    )
    return list(transform.transforms[:first_random])


def _describe_entry(value: Any) -> str:
    """An entry in which files are what they hold."""
    if isinstance(value, Mapping):
        return str([(key, _describe_entry(value[key])) for key in sorted(value)])
    if isinstance(value, list | tuple):
        return str([_describe_entry(item) for item in value])
    if isinstance(value, str | Path) and (path := Path(value)).exists():
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        return str([_digest(file) for file in files])
    return repr(value)


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
    if inspect.isclass(value) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "__dict__") and not isinstance(value, torch.dtype | torch.device):
        return f"{_describe(type(value))} {_describe(vars(value))}"
    return repr(value)


@cache
def _code() -> list[str]:
    here = Path(__file__).resolve().parent
    sources = sorted([*here.glob("*.py"), *here.with_name("transforms").glob("*.py")])
    return [*map(_digest, sources), *(f"{name} {version(name)}" for name in ("monai", "nibabel", "numpy", "torch"))]
