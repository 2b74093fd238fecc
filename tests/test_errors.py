from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from common.errors import BadInput, explain, find_bad_input, root_cause

MESSAGE = "case_7.nii.gz: found a NaN, expected finite voxels.\n  Repair or remove the file."


def chained(*errors: BaseException) -> BaseException:
    """The last of the errors, each raised from the one before."""
    previous: BaseException | None = None
    for error in errors:
        try:
            raise error from previous
        except BaseException as raised:
            previous = raised
    return previous


class Broken(Dataset):
    """Its one item can't be read; ``fail`` says how that is reported."""

    def __init__(self, fail: Callable[[], None]) -> None:
        self.fail = fail

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        self.fail()


def plain() -> None:
    raise BadInput(MESSAGE)


def wrapped() -> None:
    """As MONAI's transforms do."""
    try:
        plain()
    except BadInput as error:
        raise RuntimeError("applying transform <Load>") from error


def quoted() -> None:
    try:
        plain()
    except BadInput as error:
        raise RuntimeError(f"case 7: {error}")  # noqa: B904


def replaced() -> None:
    try:
        plain()
    except BadInput:
        raise RuntimeError("another way was found, and led nowhere") from None


def followed_by_another() -> None:
    """A mistake of the program, in what it does about the first error."""
    try:
        plain()
    except BadInput:
        [][1]


def caused_by_another() -> None:
    try:
        followed_by_another()
    except IndexError as error:
        raise RuntimeError("applying transform <Load>") from error


def test_found_however_often_it_was_wrapped():
    error = chained(BadInput(MESSAGE), KeyError("image"), RuntimeError("applying transform"), RuntimeError("config"))
    assert find_bad_input(error) == MESSAGE
    assert find_bad_input(BadInput(MESSAGE)) == MESSAGE


@pytest.mark.parametrize("fail", [plain, wrapped, quoted])
def test_found_behind_an_error_that_passes_it_on(fail):
    with pytest.raises((BadInput, RuntimeError)) as caught:
        fail()
    assert find_bad_input(caught.value) == MESSAGE


@pytest.mark.parametrize("fail", [replaced, followed_by_another, caused_by_another])
def test_not_found_behind_an_error_of_its_own(fail):
    with pytest.raises((RuntimeError, IndexError)) as caught:
        fail()
    assert find_bad_input(caught.value) is None
    assert explain(caught.value) is None
    assert isinstance(root_cause(caught.value), RuntimeError if fail is replaced else IndexError)


@pytest.mark.parametrize("fail", [plain, wrapped])
def test_found_in_the_text_that_a_loading_process_sends(fail):
    with pytest.raises((BadInput, RuntimeError)) as caught:
        next(iter(DataLoader(Broken(fail), num_workers=1)))
    assert find_bad_input(caught.value) == MESSAGE
    assert find_bad_input(chained(caught.value, RuntimeError("config"))) == MESSAGE


def test_not_found_in_the_text_of_an_error_of_its_own():
    with pytest.raises(IndexError, match="BadInput") as caught:
        next(iter(DataLoader(Broken(followed_by_another), num_workers=1)))
    assert find_bad_input(caught.value) is None


def test_other_errors_have_none():
    assert find_bad_input(chained(KeyError("image"), RuntimeError("BadInput was not the reason"))) is None


def test_a_circle_of_errors_ends():
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__cause__, other.__cause__ = other, one
    assert find_bad_input(one) is None


def report(body: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs lines in a process of their own, after the plain reports were asked for."""
    root = Path(__file__).resolve().parents[1]
    lines = ["from common.errors import BadInput, report_plainly", "report_plainly()", *body.splitlines()]
    kept = {key: value for key, value in os.environ.items() if key != "BUNDLES_TRACEBACK"}
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        env={**kept, "PYTHONPATH": str(root), **environment},
        check=False,
    )


WRAPPED = """
try:
    raise BadInput("datalist.json: no such file.")
except BadInput as error:
    raise RuntimeError("Failed to instantiate component") from error
"""


def test_bad_input_is_one_plain_message_and_exit_code_1():
    done = report(WRAPPED)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "error: datalist.json: no such file.",
        "(BUNDLES_TRACEBACK=1 shows where it was found)",
    ]
    assert done.stdout == ""


def test_traceback_on_request():
    done = report(WRAPPED, BUNDLES_TRACEBACK="1")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 2
    assert "Failed to instantiate component" in done.stderr


def test_operating_system_errors_are_plain_too():
    done = report("open('/no/such/folder/file')")
    assert done.returncode == 1
    assert "error: No such file or directory: /no/such/folder/file" in done.stderr
    assert "Traceback" not in done.stderr


def test_our_own_mistakes_keep_their_traceback():
    done = report("def forward():\n    return [][1]\nforward()")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "IndexError" in done.stderr
    assert "in forward" in done.stderr
