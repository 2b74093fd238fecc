"""What a command costs before it does anything: MONAI's command line beside the imports that it needs.

python -m benchmarks start_up
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measuring import ROOT, device_name, fastest, table

_NOTHING = {"imports": ["$import common", "$import common.engines"], "run": ["$common.engines.start(0, 'cpu')"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m benchmarks start_up``: none of its own."""


def main(options: argparse.Namespace) -> str:
    """The Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "nothing.json"
        config.write_text(json.dumps(_NOTHING))
        commands = {
            "import torch": ["-c", "import torch"],
            "import monai.bundle": ["-c", "import monai.bundle"],
            "python -m common --help": ["-m", "common", "--help"],
            "python -m monai.bundle run, doing nothing": ["-m", "monai.bundle", "run", "--config_file", str(config)],
        }
        seconds = {
            name: fastest(lambda: _call(command), "cpu")  # noqa: B023  # called at once
            for name, command in commands.items()
        }
    base = seconds["import monai.bundle"]
    rows = [[name, f"{value:.1f}", f"{value / base:.2f}"] for name, value in seconds.items()]
    return "\n".join([f"{device_name('cpu')}.", "", table(["", "seconds", "of the import of MONAI"], rows)])


def _call(command: list[str]) -> None:
    subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=ROOT)
