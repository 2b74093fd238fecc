"""Five hundred damaged and hostile files: each is refused in a sentence that names it, or gives a right result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.data.datalist import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
MOST_SECONDS = 560  # some thirty on an idle core

pytest.importorskip("resource", reason="limits of a process are a thing of Unix")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of a process that has looked at all files, and how it ended."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("files", "elsewhere", "temporary"):
        (folder / name).mkdir()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": "0",
        "TMPDIR": str(folder / "temporary"),
    }
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(Path(__file__).with_name("mutants.py")), str(folder / "files")],
        capture_output=True,
        text=True,
        errors="replace",
        cwd=folder / "elsewhere",
        env=environment,
        timeout=MOST_SECONDS,
        check=False,
    )
    return folder, done


@pytest.fixture(scope="module")
def outcomes(run: tuple[Path, subprocess.CompletedProcess[str]]) -> list[dict[str, Any]]:
    lines = (run[0] / "files" / "outcomes.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_interpreter_lives_to_the_end(
    run: tuple[Path, subprocess.CompletedProcess[str]], outcomes: list[dict[str, Any]]
) -> None:
    assert run[1].returncode == 0, f"after {outcomes[-1:]}: {run[1].stderr[-4000:]}"
    counts = Counter(outcome["kind"] for outcome in outcomes)
    assert counts == {"nifti": 200, "prediction": 200, "datalist": 100, "checkpoint": 80, "archive": 120}


@pytest.mark.parametrize("kind", ["nifti", "prediction", "datalist", "checkpoint", "archive"])
def test_each_file_is_refused_by_name_or_read_right(kind: str, outcomes: list[dict[str, Any]]) -> None:
    found = [outcome for outcome in outcomes if outcome["kind"] == kind]
    wrong = [outcome for outcome in found if outcome["outcome"] not in ("right", "refused")]
    assert not wrong, json.dumps(wrong[:5], indent=2)
    # Damage that nothing notices, or that nothing survives, would test nothing.
    assert {outcome["outcome"] for outcome in found} == {"right", "refused"}


def test_nothing_is_written_elsewhere(run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = run
    assert sorted(path.name for path in folder.iterdir()) == ["elsewhere", "files", "temporary"]
    assert not list((folder / "elsewhere").iterdir())
    assert not list((folder / "temporary").iterdir())
    made = {"nifti", "datalist", "checkpoint", "archive", "predicted", "outcomes.jsonl"}
    given = {"plan.json", "good.pt", "good.zip", "label.nii.gz"}
    given |= {f"{name}{more}.nii.gz" for name in SECTIONS for more in ("", "_b")}
    assert {path.name for path in (folder / "files").iterdir()} == made | given
