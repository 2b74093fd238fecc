from __future__ import annotations

import ctypes
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


def test_here():
    assert keep_pages() in (True, False)
    assert ctypes.sizeof(ctypes.c_int) == 4, "the settings are ints of this size: 2**31 - 1 must fit"
