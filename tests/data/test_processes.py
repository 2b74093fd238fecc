from __future__ import annotations

import os
import signal

import pytest

from common.data.processes import usable_cores, work_through

DIES = f"__import__('os').kill(__import__('os').getpid(), {int(signal.SIGKILL)})"


def lost(item: str) -> str:
    return "lost"


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_item_that_kills_its_process_is_the_only_one_lost(jobs: int) -> None:
    done = []
    items = ["1 + 1", DIES, "3 * 3", "__import__('os').getpid()", DIES, "5"]
    results = work_through(eval, items, jobs, lost, lambda: done.append(1))
    own = results.pop(3)
    assert results == [2, "lost", 9, "lost", 5]
    assert own != os.getpid()
    assert len(done) == len(items)


def test_in_this_process() -> None:
    assert work_through(eval, ["__import__('os').getpid()", "2"], 0, lost) == [os.getpid(), 2]
    assert work_through(eval, [], 2, lost) == []


def test_a_mistake_of_ours_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        work_through(eval, ["1 / 0", "2"], 1, lost)


def test_cores_are_those_that_may_be_used() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
