"""Errors that a person can act on, and the one place where they are shown without a traceback."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from types import TracebackType

__all__ = ["BadInput", "explain", "find_bad_input", "report_plainly", "root_cause"]

TRACEBACK_VARIABLE = "BUNDLES_TRACEBACK"
# A data-loading worker sends its exception as text; this recovers the message from it.
_WHILE_HANDLING = "During handling of the above exception, another exception occurred:"
_IN_WORKER_TEXT = re.compile(r"^(?:\S+\.)?BadInput: (.*?)(?=\n\n|\n\S*Traceback|\Z)", re.MULTILINE | re.DOTALL)


class BadInput(ValueError):
    """Something the user gave (a file, a key, a value) can't be used.

    The message says which file or key, what was found, what was expected and what to do.

    Args:
        message: for people.
        kind: what is wrong with a file in one word (``truncated``, ``nan``), for reports that programs read;
            None where nobody said.
    """

    def __init__(self, message: str = "", kind: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind


def _reason(error: BaseException) -> BaseException | None:
    """What ``error`` was raised from; None where it is an error of its own.

    One that merely came up while another was handled is a second fault, as when a way round the first one fails, and to
    show the first in its place would hide it. It is the first in other words when it quotes it.
    """
    if error.__cause__ is not None or error.__suppress_context__:
        return error.__cause__
    before = error.__context__
    return before if before is not None and str(before) and str(before) in str(error) else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = _reason(current)


def find_bad_input(error: BaseException) -> str | None:
    """The message of the :class:`BadInput` behind ``error``, however often it was wrapped; None where there is none."""
    for link in _chain(error):
        text = str(link)
        # What a data-loading worker raised comes back as the same class, with the traceback's text as its message.
        if isinstance(link, BadInput) and not text.startswith("Caught BadInput in "):
            return text
        found = _IN_WORKER_TEXT.findall(text.rpartition(_WHILE_HANDLING)[2])
        if found:
            return found[-1].strip()
    return None


def root_cause(error: BaseException) -> BaseException:
    """What ``error`` was wrapped around, however often."""
    return list(_chain(error))[-1]


def explain(error: BaseException) -> str | None:
    """What a person needs to know of ``error``: the message of a :class:`BadInput` or operating-system error behind it;
    None where there is neither."""
    message = find_bad_input(error)
    if message is not None:
        return message
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno is not None:
            return f"{link.strerror}: {link.filename}" if link.filename else str(link)
    return None


def report_plainly() -> None:
    """Show :class:`BadInput` and operating-system errors of this process as one plain message, exit code 1.

    MONAI wraps an error once for every config item it passes through, so the reason gets buried under tracebacks.
    Set ``BUNDLES_TRACEBACK=1`` to see them all. Other exceptions keep their traceback: those are our mistakes.
    """
    if os.environ.get(TRACEBACK_VARIABLE) or threading.current_thread() is not threading.main_thread():
        return

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        message = explain(error)
        if message is None:
            sys.__excepthook__(kind, error, traceback)
        else:
            print(f"\nerror: {message}\n({TRACEBACK_VARIABLE}=1 shows where it was found)", file=sys.stderr)

    sys.excepthook = hook
