"""What tests of several parts need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """``with full_disk(size)``: no file of this process, or of one that it starts, may grow beyond ``size`` bytes.

    Writing fails half-way, as on a disk that fills up.
    """
    resource = pytest.importorskip("resource", reason="limits of a process are a thing of Unix")
    # A process would leave half of a module's compiled code for the next one to import.
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
