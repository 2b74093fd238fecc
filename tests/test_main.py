from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.__main__ import COMMANDS, main
from common.data import phantom
from common.errors import BadInput


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
    assert f"python -m common {name}" in capsys.readouterr().out
    module = importlib.import_module(COMMANDS[name][0])
    assert callable(module.main)


def test_bad_input_is_one_message_and_exit_code_1(capsys, monkeypatch, tmp_path):
    def fail(options):
        raise BadInput("volume.nii.gz: no such file.")

    monkeypatch.setattr(phantom, "add_arguments", lambda parser: None)
    monkeypatch.setattr(phantom, "main", fail)
    assert main(["phantoms"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: volume.nii.gz: no such file.\n"
    assert captured.out == ""


@pytest.mark.parametrize(("answer", "code"), [(None, 0), (0, 0), (3, 3)])
def test_exit_code_is_the_command_s(monkeypatch, answer, code):
    monkeypatch.setattr(phantom, "add_arguments", lambda parser: parser.add_argument("--number", type=int))
    monkeypatch.setattr(phantom, "main", lambda options: answer if options.number == 7 else 99)
    assert main(["phantoms", "--number", "7"]) == code


def test_our_own_mistakes_are_not_hidden(monkeypatch):
    def fail(options):
        raise IndexError("a mistake of ours")

    monkeypatch.setattr(phantom, "add_arguments", lambda parser: None)
    monkeypatch.setattr(phantom, "main", fail)
    with pytest.raises(IndexError):
        main(["phantoms"])


def test_from_the_command_line(tmp_path):
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "common", "study", "none.json", "--data", str(tmp_path), "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 1
    assert "error: study none.json: can't be read" in done.stderr
    assert "Traceback" not in done.stderr
