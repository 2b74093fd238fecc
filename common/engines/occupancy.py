"""One training or evaluation at a time in a folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import ignite.distributed as idist
from filelock import FileLock, Timeout

from ..errors import BadInput

__all__ = ["leave", "occupy"]

logger = logging.getLogger(__name__)

_NAME = ".in_use.lock"
_PATIENCE = 10.0  # seconds; the loading processes of a training that was killed need a few to notice
_held: dict[Path, FileLock] = {}


def occupy(folder: str | os.PathLike[str]) -> None:
    """Keep other trainings and evaluations out of a folder until this one leaves it or its process ends.

    Of the processes of one distributed run the first does it.

    Args:
        folder: an existing one.

    Raises:
        BadInput: another process trains or evaluates there.
    """
    path = Path(os.path.expanduser(folder)).resolve()
    if path in _held or idist.get_rank() != 0:
        return
    lock = FileLock(path / _NAME)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise BadInput(
            f"{path}: another training or evaluation is writing there, and two would replace each other's files. Wait "
            "until it has ended, or choose another output_dir and ckpt_dir."
        ) from None
    except (NotImplementedError, OSError) as error:
        logger.warning("%s: this file system knows no locks (%s); start no second run there", path, error)
        return
    _held[path] = lock


def leave() -> None:
    """Let others into the folders that this process occupies."""
    while _held:
        _held.popitem()[1].release()
