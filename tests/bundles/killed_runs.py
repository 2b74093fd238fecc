"""Trainings that end by SIGKILL: a process that has imported everything forks a child for each of them.

Importing takes longer than these trainings do. Run as a program it reads requests from standard input, a JSON object a
line, and answers each with one when the child has ended.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOREVER = 500.0  # seconds; a training takes two


@dataclass
class Ended:
    """How a training ended: killed or with an exit code, after how many seconds, and what it said."""

    killed: bool
    code: int
    seconds: float
    log: str


class Trainings:
    """Starts trainings, each in a process of its own, and kills them.

    Args:
        folder: for their logs, and an MLflow database without runs, :attr:`database`.
    """

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log.txt"
        self.database = folder / "mlruns.db"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
        command = [sys.executable, __file__, str(self.database)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout.readline() == "ready\n"

    def run(self, files: list[str], settings: dict[str, Any], **special: Any) -> Ended:
        """``monai.bundle run`` with these config files and settings.

        Args:
            files: configs.
            settings: by name, as on the command line.
            special: killed ``after`` seconds, or ``at`` a moment of the writing of a file (see :func:`kill_at`), or
                before a ``statement`` of this number to the database; ``alone`` to spare the processes that it has
                started; ``full`` is the size in bytes beyond which no file can grow, from the epoch ``full_from`` on;
                ``patience`` the seconds to wait for another training in the folder; ``draw`` is False for empty files
                instead of pictures, which take half of the time.
        """
        request = {"files": files, "settings": settings, "log": str(self.log), **special}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        killed, code, seconds = json.loads(self._process.stdout.readline())
        return Ended(killed, code, seconds, self.log.read_text(errors="replace"))

    def close(self) -> None:
        """End the process that forks."""
        self._process.stdin.close()
        self._process.wait(60)


def kill_self() -> None:
    """SIGKILL for this process and all that it has started."""
    os.killpg(0, signal.SIGKILL)


def kill_at(name: str, moment: str, time: int = 1) -> None:
    """Let this process be killed while it writes a file.

    Args:
        name: of the file.
        moment: ``"half"`` when the first half is on the disk, ``"before"`` or ``"after"`` the new file takes its place.
        time: which writing of the file.
    """
    from common import files

    seen = 0

    def reached(path: Any) -> bool:
        nonlocal seen
        seen += files.intended_name(Path(path).name) == name
        return seen == time

    class Half(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(content[: len(content) // 2])
            os.fsync(self.fileno())
            kill_self()

    replace = os.replace

    def replaced(source: Any, target: Any) -> None:
        ends = reached(source)
        if not (ends and moment == "before"):
            replace(source, target)
        if ends:
            kill_self()

    if moment == "half":
        files.open = lambda path, mode: (Half if reached(path) else io.FileIO)(path, mode)
    else:
        files.os.replace = replaced


def kill_before_statement(number: int) -> None:
    """Let this process be killed before it gives its database the statement of this number."""
    from sqlalchemy import Engine, event

    count = 0

    def look(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            kill_self()

    event.listen(Engine, "before_cursor_execute", look)


def fill_disk(size: int, epoch: int) -> None:
    """Let no file grow beyond ``size`` bytes from the start of an epoch on, as on a disk that has filled up."""
    from common.engines import SemiSupervisedTrainer

    begin = SemiSupervisedTrainer._begin_epoch

    def filled(self: SemiSupervisedTrainer) -> None:
        if self.state.epoch == epoch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        begin(self)

    SemiSupervisedTrainer._begin_epoch = filled


def _child(request: dict[str, Any]) -> int:
    from monai.bundle import run

    from common.engines import occupancy
    from common.handlers import pictures, progress

    os.setpgid(0, 0)
    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if "at" in request:
        kill_at(*request["at"])
    if "statement" in request:
        kill_before_statement(request["statement"])
    if "patience" in request:
        occupancy._PATIENCE = request["patience"]
    if not request.get("draw", True):
        progress.save_curves = pictures.save_overview = lambda path, *_, **__: Path(path).write_bytes(b"")
    if "full" in request:
        fill_disk(request["full"], request["full_from"])
    try:
        run(config_file=request["files"], **request["settings"])
    except BaseException as error:
        traceback.print_exc()
        sys.excepthook(type(error), error, error.__traceback__)  # what a person sees
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _serve(database: str) -> None:
    import matplotlib.pyplot  # noqa: F401
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    import monai.bundle  # noqa: F401
    import torch
    import torch._dynamo  # which the first optimiser of a process imports
    from mlflow.tracking import MlflowClient

    import common.completion
    import common.data.studies
    import common.engines
    import common.handlers
    import common.transforms  # noqa: F401

    torch.set_num_threads(1)
    MlflowClient(tracking_uri=f"sqlite:///{database}")._tracking_client.store.engine.dispose()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os._exit(_child(request))
        with contextlib.suppress(OSError):  # it has done so itself
            os.setpgid(pid, pid)
        end = start + request.get("after", FOREVER)
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
            time.sleep(0.002)
        if ended == (0, 0):
            (os.kill if request.get("alone") else os.killpg)(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(ended[1])
        print(json.dumps([code == -signal.SIGKILL, code, time.monotonic() - start]), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    _serve(sys.argv[1])
