from __future__ import annotations

import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from common.engines import allocator
from common.engines.allocator import keep_pages


@pytest.mark.parametrize(("answers", "taken"), [((1, 1, 1), True), ((1, 0, 1), False), ((0, 0, 0), False)])
def test_says_whether_every_setting_was_taken(monkeypatch, answers, taken):
    asked = []

    def mallopt(parameter: int, value: int) -> int:
        asked.append(parameter)
        return answers[len(asked) - 1]

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert keep_pages() is taken
    assert sorted(asked) == [-4, -2, -1]


@pytest.mark.parametrize("library", [OSError("no libc.so.6"), SimpleNamespace()], ids=["not there", "not glibc"])
def test_does_nothing_without_glibc(monkeypatch, library):
    def load(name: str) -> SimpleNamespace:
        if isinstance(library, OSError):
            raise library
        return library

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", load)
    assert keep_pages() is False


def test_does_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("asked for a C library"))
    assert keep_pages() is False


def test_does_nothing_where_the_user_has_settings_of_the_allocator(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("asked for a C library"))
    assert keep_pages() is False


MORE_THAN_2_GIB = """
import resource, torch
from common.engines.allocator import keep_pages
taken = keep_pages()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**24) for _ in range(34)]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del tensors
print(taken, faults)
"""


def test_pages_are_kept_however_much_is_freed():
    """2.1 GiB, taken a second time, are the pages that the process has already, but for those of a tensor or two."""
    answer = subprocess.run([sys.executable, "-c", MORE_THAN_2_GIB], capture_output=True, text=True, check=True)
    taken, faults = answer.stdout.split()
    if taken == "False":
        pytest.skip("the C library is not glibc, or has settings already")
    pages = 34 * 2**26 // resource.getpagesize()
    assert int(faults) < pages / 10
