"""Reproducible streams of batches: one loader a kind of data, side by side, each cycling at its own length.

What a batch holds depends on the seed, the epoch, the stream's name and the batch's position alone: not on the number
of workers, and not on whether the run was interrupted. The sampler draws a seed along with each index, and the
dataset's random transforms are seeded with it just before they run.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, MetaTensor
from monai.data import Dataset as MonaiDataset
from monai.transforms import Compose, Randomizable
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..errors import BadInput
from ..processes import process_share
from ..targets import is_dense

__all__ = [
    "EpochSampler",
    "ProcessShare",
    "SeededDataset",
    "StreamLoader",
    "collate_plain",
    "loading_processes",
    "make_loader",
    "whole_cases",
]

#: most loading processes of a stream, and how many cores of a training process there are for each of them
_MOST_PROCESSES, _CORES_A_PROCESS = 4, 4
#: bytes of shared memory in which batches lie until they are read; containers often have 64 MB of it
_SHARED_MEMORY = 8 * 2**30
#: what a container may use of its machine's cores: a quota and a period, in microseconds
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class EpochSampler(Sampler):
    """Draws ``samples`` cases an epoch as consecutive random permutations, each with a seed for its random transforms.

    No case is drawn twice before every other was drawn once. In a distributed run all processes draw one sequence, of
    which each takes its share.

    Args:
        size: number of cases.
        samples: number of draws an epoch, for this process.
        seed: seed of the run.

    Raises:
        BadInput: there are no cases.
    """

    def __init__(self, size: int, samples: int, seed: int = 0) -> None:
        if size < 1:
            raise BadInput("a stream of training data has no cases; list some in the datalist")
        self.size = size
        self.samples = samples
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, stream: str = "", samples: int | None = None) -> None:
        """Choose the epoch that the next pass draws; passes after it, without a call, are further rounds of it.

        Args:
            epoch: which.
            stream: a name, so that streams of equally many cases draw differently.
            samples: number of draws, from now on; None leaves it.
        """
        self.samples = self.samples if samples is None else samples
        self.epoch = epoch
        self.stream = stream
        self.round = 0

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        key = [self.seed % 2**32, self.epoch, self.round, zlib.crc32(self.stream.encode())]
        self.round += 1
        generator = np.random.default_rng(key)
        rank, processes = process_share()
        total = self.samples * processes
        permutations = [generator.permutation(self.size) for _ in range(-(-total // self.size))]
        indices = np.concatenate(permutations)[:total] if permutations else np.empty(0, dtype=int)
        seeds = generator.integers(0, 2**31, size=total)
        return iter([(int(i), int(s)) for i, s in zip(indices[rank::processes], seeds[rank::processes], strict=True)])


class ProcessShare(Sampler):
    """The cases that this process of a distributed run validates: every so many-th, so that all together do each once.

    With fewer cases than processes each does all of them: one without any would leave the others waiting for its part
    of the figures, and of means it makes no difference.

    Args:
        data_source: what holds the cases.
    """

    def __init__(self, data_source: Sized) -> None:
        rank, processes = process_share()
        size = len(data_source)
        self.share = range(rank, size, processes) if size >= processes else range(size)

    def __len__(self) -> int:
        return len(self.share)

    def __iter__(self) -> Iterator[int]:
        return iter(self.share)


class SeededDataset(Dataset):
    """A dataset whose random transforms are seeded anew for each item.

    Args:
        dataset: a MONAI dataset; its ``transform`` (a ``Compose``, or a single one) is what gets seeded.
    """

    def __init__(self, dataset: MonaiDataset) -> None:
        self.dataset = dataset
        self.state = np.random.RandomState()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: tuple[int, int]) -> Any:
        index, seed = draw
        # One generator for all: `Compose` would make one a transform, a fifth of the time that a crop takes.
        self.state.seed(seed)
        _share(self.state, getattr(self.dataset, "transform", None))
        return self.dataset[index]


def _share(state: np.random.RandomState, transform: Any) -> None:
    """Let a transform, and all inside it, draw from ``state``."""
    if isinstance(transform, Compose):
        Randomizable.set_random_state(transform, state=state)  # its own alone, which such as `OneOf` choose by
        for step in transform.transforms:
            _share(state, step)
    elif isinstance(transform, Randomizable):
        transform.set_random_state(state=state)


def collate_plain(items: Sequence[Any], partial_labels: bool = False) -> dict[str, Any]:
    """Collate to plain tensors: without metadata, which costs more to collate than the voxels and training never reads.

    Args:
        items: dicts, or lists of dicts (transforms that take several samples of a case return those).
        partial_labels: ``annotated`` is there even where all structures of all items are.

    Returns:
        Tensors and numbers batched along a new first axis; a number that only some cases have is NaN for the others, as
        for targets that an entry lacks; ``annotated`` as a list with each item's ids, or None for an item where all
        structures are; other entries (paths, metadata, a patient's name) are left out.

    Raises:
        BadInput: only some cases have a map, so that nobody knows which value says "missing" in it.
    """
    flat = [case for item in items for case in (item if isinstance(item, (list, tuple)) else [item])]
    batch: dict[str, Any] = {}
    for key in dict.fromkeys(key for case in flat for key in case):
        values = [_plain(case.get(key)) for case in flat]
        known = [value for value in values if value is not None]
        if not known or not all(map(_is_numeric, known)):
            continue
        if len(known) == len(flat):
            batch[key] = default_collate(values)
        elif any(np.ndim(value) for value in known):
            raise BadInput(
                f"only {len(known)} of {len(flat)} cases of a batch have the map {key!r}; give the others one, too, or "
                "describe it in `targets`, so that it is filled with its `missing` value"
            )
        else:
            batch[key] = torch.tensor([float("nan") if value is None else float(value) for value in values])
    if partial_labels or any(case.get("annotated") is not None for case in flat):
        batch["annotated"] = [case.get("annotated") for case in flat]
    return batch


def _plain(value: Any) -> Any:
    return value.as_tensor() if isinstance(value, MetaTensor) else value


def _is_numeric(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray, np.number, int, float)) and not isinstance(value, bool)


def loading_processes(num_workers: int | str) -> int:
    """How many processes load a stream's batches.

    With one or more, batches are the same whatever their number; in the training's own process sums over a crop may be
    taken by several threads, and so differ in their last bits.

    Args:
        num_workers: a number, or ``"auto"``: one for every 4 cores that this process may use, at most 4; with fewer
            cores a process takes from the step what it saves. None where processes could fail: less than 8 GB of shared
            memory, as in containers, a daemon, which may have no children, or a system that does not fork, so that
            each would copy the cache.

    Raises:
        BadInput: it is neither.
    """
    if num_workers != "auto":
        if isinstance(num_workers, bool) or not isinstance(num_workers, int) or num_workers < 0:
            raise BadInput(f"`num_workers` is {num_workers!r}; expected 'auto', or a number of processes from 0 up")
        return num_workers
    # The first of all methods is the system's own; to ask for the one in use would settle it for the whole process.
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    try:
        room = shutil.disk_usage("/dev/shm").free >= _SHARED_MEMORY  # not a temporary file of ours
    except OSError:
        room = False
    if method != "fork" or not room or multiprocessing.current_process().daemon:
        return 0
    siblings = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # torchrun's processes on this machine
    return min(_MOST_PROCESSES, int(_cores() / max(1, siblings)) // _CORES_A_PROCESS)


def _cores() -> float:
    """The cores that this process may use, as a container's quota has them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        return cores if quota == "max" else min(cores, int(quota) / int(period))
    except (OSError, ValueError):
        return cores


def make_loader(
    dataset: MonaiDataset,
    batch_size: int,
    seed: int = 0,
    num_workers: int | str = 0,
    iterations: int | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """A loader of random training batches, all of the same size.

    Args:
        dataset: a MONAI dataset (``CacheDataset`` for speed) whose items are dicts.
        batch_size: cases a batch, for this process.
        seed: seed of the run.
        num_workers: loading processes, kept from epoch to epoch, see :func:`loading_processes`; 0 loads in this one.
        iterations: batches a pass; by default as many as see each case once, in all processes together. A
            :class:`StreamLoader` asks for as many as it needs.
        pin_memory: pin the batches for a faster copy to an accelerator.
    """
    if batch_size < 1:
        raise BadInput(f"`batch_size` is {batch_size}; expected 1 or more")
    processes = loading_processes(num_workers)
    # What a method does with such a batch must not differ among processes that wait for each other.
    partial_labels = process_share()[1] > 1 and any(map(_is_partly_labeled, dataset.data))
    if iterations is None:
        iterations = -(-len(dataset) // (batch_size * process_share()[1]))
    return DataLoader(
        SeededDataset(dataset),
        batch_size=batch_size,
        sampler=EpochSampler(len(dataset), iterations * batch_size, seed),
        num_workers=processes,
        persistent_workers=processes > 0,
        collate_fn=partial(collate_plain, partial_labels=partial_labels),
        pin_memory=pin_memory,
        # Without one of its own a loader draws from torch's global generator, and so changes what a network drops out.
        generator=torch.Generator().manual_seed(seed % 2**63),
    )


def _is_partly_labeled(entry: Any) -> bool:
    return isinstance(entry, Mapping) and entry.get("annotated") is not None


def whole_cases(
    entries: Sequence[Mapping[str, Any]],
    preprocessing: Callable,
    targets: Sequence[Mapping[str, Any]],
    seed: int = 0,
) -> DataLoader | None:
    """A stream of whole volumes, one a batch, for targets that are a number a case; None when there is no such target.

    A crop does not know the number of its case, so these targets are learnt from whole volumes.

    Args:
        entries: labelled entries; those that have none of the numbers are left out.
        preprocessing: the deterministic preprocessing.
        targets: descriptions of the regression targets.
        seed: seed of the run.

    Raises:
        BadInput: no entry has a number for a case-level target.
    """
    names = [target["name"] for target in targets if not is_dense(target)]
    if not names:
        return None
    cases = [entry for entry in entries if any(entry.get(name) is not None for name in names)]
    if not cases:
        raise BadInput(f"`targets` names {names}, a number a case, but no training entry of the datalist has one")
    return make_loader(CacheDataset(cases, preprocessing), 1, seed)


class StreamLoader:
    """Several loaders side by side: each step yields one batch of each.

    A loader of :func:`make_loader` is asked for all batches of an epoch at once, so that its processes never stop in
    between; another one that runs out starts over. Every pass is a new epoch; :meth:`set_epoch` chooses which, as a
    resumed run must.

    Args:
        streams: a loader a name; None is left out, so that a config can switch one off.
        length: steps an epoch.

    Raises:
        BadInput: no stream is left, or ``length`` is not positive.

    Example::

        loader = StreamLoader({"labeled": make_loader(labeled, 2), "unlabeled": make_loader(unlabeled, 2)}, length=250)
        for batch in loader:
            batch["labeled"]["label"], batch["unlabeled"]["image"]
    """

    def __init__(self, streams: Mapping[str, DataLoader | None], length: int) -> None:
        self.streams = {name: loader for name, loader in streams.items() if loader is not None}
        if not self.streams:
            raise BadInput("no stream of training data: every one of " + ", ".join(streams) + " is null")
        if length < 1:
            raise BadInput(f"`iterations_per_epoch` is {length}; expected 1 or more")
        for name, loader in self.streams.items():
            if len(loader) < 1:
                raise BadInput(f"the stream `{name}` yields no batches")
        self.length = length
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next pass yields."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, dict[str, Any]]]:
        # A generator, so that the epoch is read at the first step, whenever an engine made the iterator.
        epoch = self.epoch
        self.epoch += 1
        sources = {name: self._batches(name, epoch) for name in self.streams}
        for _ in range(self.length):
            yield {name: next(source) for name, source in sources.items()}

    def _batches(self, name: str, epoch: int) -> Iterator[dict[str, Any]]:
        loader = self.streams[name]
        if hasattr(loader.sampler, "set_epoch"):
            if isinstance(loader.sampler, EpochSampler):
                loader.sampler.set_epoch(epoch, name, self.length * (loader.batch_size or 1))
            else:
                loader.sampler.set_epoch(epoch)
        while True:
            yield from loader
