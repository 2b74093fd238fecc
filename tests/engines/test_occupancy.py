"""Two trainings in one folder: the second is refused, and a killed one leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ignite.distributed as idist
import pytest
from filelock import FileLock, Timeout

from common.engines import occupancy
from common.engines.occupancy import leave, occupy
from common.errors import BadInput

# Only the lock itself: to import the package takes seconds.
HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("in", flush=True)
if input() == "leave":
    lock.release()
    print("out", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(occupancy, "_PATIENCE", 0.0)
    yield
    leave()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that trains in the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / occupancy._NAME)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_training_is_refused_until_the_first_has_ended(tmp_path: Path, other: subprocess.Popen) -> None:
    with pytest.raises(BadInput, match="another training or evaluation is writing there") as caught:
        occupy(tmp_path)
    assert str(tmp_path) in str(caught.value)
    other.stdin.write("leave\n")
    other.stdin.flush()
    assert other.stdout.readline() == "out\n"
    occupy(tmp_path)


def test_a_killed_training_leaves_the_folder(tmp_path: Path, other: subprocess.Popen) -> None:
    other.kill()
    other.wait()
    occupy(tmp_path)


def test_one_process_trains_twice(tmp_path: Path) -> None:
    occupy(tmp_path)
    occupy(tmp_path)
    with pytest.raises(Timeout):
        FileLock(tmp_path / occupancy._NAME).acquire(timeout=0)
    leave()
    FileLock(tmp_path / occupancy._NAME).acquire(timeout=0)


def test_the_first_process_of_several_keeps_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: subprocess.Popen
) -> None:
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    occupy(tmp_path)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def refuse(self: object, **_: object) -> None:
        raise NotImplementedError("flock")

    monkeypatch.setattr(occupancy.FileLock, "acquire", refuse)
    occupy(tmp_path)
    assert "knows no locks" in caplog.text
