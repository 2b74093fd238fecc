"""Work spread over processes, of which any may die: what it was at is named, and the rest is done all the same."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

__all__ = ["usable_cores", "work_through"]

Item = TypeVar("Item")


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def work_through(
    function: Callable[[Item], Any],
    items: Sequence[Item],
    jobs: int,
    lost: Callable[[Item], Any],
    done: Callable[[], Any] = lambda: None,
) -> list[Any]:
    """What ``function`` makes of each item, in their order.

    When a process dies (of a fault in a reader, or since the system ran out of memory), the items that were being
    worked on go again, one by one; the one at which a process dies again is given up.

    Args:
        function: importable by its name, since processes are not forked from this one, which may have threads.
        items: what it takes; they and its results go from process to process.
        jobs: processes; 0 works in this one.
        lost: the result of an item that is given up.
        done: called after each item.
    """
    results: dict[int, Any] = {}

    def keep(index: int, result: Any) -> None:
        results[index] = result
        done()

    if jobs == 0:
        for index, item in enumerate(items):
            keep(index, function(item))
    while left := [index for index in range(len(items)) if index not in results]:
        suspects = _until_one_dies(function, items, left, jobs, keep)
        while suspects:
            for index in _until_one_dies(function, items, suspects, 1, keep):
                keep(index, lost(items[index]))
            suspects = [index for index in suspects if index not in results]
    return [results[index] for index in range(len(items))]


def _context(module: str) -> BaseContext:
    """Processes forked from a fresh one that has imported ``module``, which takes seconds, once for all of them."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def _until_one_dies(
    function: Callable[[Item], Any],
    items: Sequence[Item],
    indices: Sequence[int],
    jobs: int,
    keep: Callable[[int, Any], None],
) -> list[int]:
    """Work until all is done or a process dies; returns what was being worked on then, at most one item a process."""
    waiting = iter(indices)
    running: dict[Future, int] = {}
    with ProcessPoolExecutor(min(jobs, len(indices)), _context(function.__module__)) as pool:
        try:
            while True:
                while len(running) < jobs and (index := next(waiting, None)) is not None:
                    running[pool.submit(function, items[index])] = index
                if not running:
                    return []
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    keep(running[future], future.result())
                    del running[future]
        except BrokenProcessPool:
            return list(running.values())
