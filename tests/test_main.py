from __future__ import annotations

import argparse
import importlib
import os
import shlex
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.__main__ import COMMANDS, EXAMPLES, main
from common.data import phantom_set
from common.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--labeled", "1", "--unlabeled", "0", "--validation", "0", "--shape", "24", "24", "24")


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["trian"])
    assert stopped.value.code not in (0, None)
    message = capsys.readouterr().err
    assert "trian" in message
    assert all(name in message for name in COMMANDS)


def test_no_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code not in (0, None)
    assert "command" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_explains_itself(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"example: python -m common {name}" in capsys.readouterr().out
    module = importlib.import_module(COMMANDS[name][0])
    assert callable(module.main)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_s_example_can_be_typed(name):
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
    parser.parse_args(shlex.split(EXAMPLES[name]))


def test_bad_input_is_one_message_and_exit_code_1(capsys, monkeypatch, tmp_path):
    def fail(options):
        raise BadInput("volume.nii.gz: no such file.")

    monkeypatch.setattr(phantom_set, "add_arguments", lambda parser: None)
    monkeypatch.setattr(phantom_set, "main", fail)
    assert main(["phantoms"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: volume.nii.gz: no such file.\n"
    assert captured.out == ""


@pytest.mark.parametrize(("answer", "code"), [(None, 0), (0, 0), (3, 3)])
def test_exit_code_is_the_command_s(monkeypatch, answer, code):
    monkeypatch.setattr(phantom_set, "add_arguments", lambda parser: parser.add_argument("--number", type=int))
    monkeypatch.setattr(phantom_set, "main", lambda options: answer if options.number == 7 else 99)
    assert main(["phantoms", "--number", "7"]) == code


def test_our_own_mistakes_are_not_hidden(monkeypatch):
    def fail(options):
        raise IndexError("a mistake of ours")

    monkeypatch.setattr(phantom_set, "add_arguments", lambda parser: None)
    monkeypatch.setattr(phantom_set, "main", fail)
    with pytest.raises(IndexError):
        main(["phantoms"])


def test_what_the_operating_system_refuses_is_one_message(capsys, monkeypatch):
    def fail(options):
        raise PermissionError(13, "Permission denied", "/results/log.txt")

    monkeypatch.setattr(phantom_set, "add_arguments", lambda parser: None)
    monkeypatch.setattr(phantom_set, "main", fail)
    assert main(["phantoms"]) == 1
    assert capsys.readouterr().err == "error: Permission denied: /results/log.txt\n"
    monkeypatch.setenv("BUNDLES_TRACEBACK", "1")
    with pytest.raises(PermissionError):
        main(["phantoms"])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert main(["phantoms", "--output", str(folder), *SMALL]) == 0
    return folder


def writing(command: str, data: Path, output: Path) -> list[str]:
    """The command line of something that writes ``output`` or into it."""
    datalist = str(data / "datalist.json")
    wall = ("--wall", "2", "--inner", "1")
    return {
        "phantoms": ["phantoms", "--output", str(output), *SMALL],
        "thickness": ["thickness", "--datalist", datalist, "--output", str(output), *wall],
        "plan": ["plan", "--datalist", datalist, "--output", str(output / "plan.json")],
        "datalist": ["datalist", "--images", str(data / "images"), "--output", str(output / "datalist.json")],
    }[command]


@contextmanager
def full_disk():
    resource = pytest.importorskip("resource", reason="limits of a process are a thing of Unix")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", ["phantoms", "thickness", "plan", "datalist"])
def test_a_full_disk_is_one_message_and_no_half_file(capsys, tmp_path, data, command):
    output = tmp_path / "output"
    with full_disk():
        assert main(writing(command, data, output)) == 1
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith(f"error: {output}/")
    assert "File too large" in last
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("command", ["phantoms", "thickness", "plan", "datalist"])
def test_a_place_where_nothing_can_be_written_is_one_message(capsys, tmp_path, data, command):
    (tmp_path / "file").write_text("in the way")
    assert main(writing(command, data, tmp_path / "file" / "output")) == 1
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith(f"error: {tmp_path}/file/output")


def test_make_leaves_nothing_in_the_home(tmp_path):
    """Caches and settings of pip, PyTorch and Matplotlib go beside the environment; MLflow makes no identity."""
    (tmp_path / "home").mkdir()
    # Without what tells MLflow that this is a test.
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    show = ["make", "--silent", "--eval", "show:\n\t@env", "show", f"VENV={tmp_path}/environment"]
    shown = subprocess.run(show, capture_output=True, text=True, cwd=ROOT, env=environment, check=True).stdout
    environment.update(line.partition("=")[::2] for line in shown.splitlines())
    settings = {"capture_output": True, "text": True, "cwd": ROOT, "env": environment, "check": True}
    cache = subprocess.run([sys.executable, "-m", "pip", "cache", "dir"], **settings).stdout
    assert cache.startswith(f"{tmp_path}/environment/cache")
    phantoms = [sys.executable, "-m", "common", "phantoms", "--output", str(tmp_path / "data"), *SMALL]
    subprocess.run(phantoms, **settings)
    assert list((tmp_path / "home").rglob("*")) == []
    assert (tmp_path / "data" / "datalist.json").exists()


def test_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "common", "study", "none.json", "--data", str(tmp_path), "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 1
    assert "error: study none.json: can't be read" in done.stderr
    assert "Traceback" not in done.stderr
