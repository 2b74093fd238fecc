"""``python -m benchmarks``: how fast everything is on this machine, as Markdown. See docs/performance.md."""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks import plain_loop, training

SECTIONS = {"plain_loop": plain_loop, "training": training}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="section", required=True)
    for name, module in SECTIONS.items():
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        module.add_arguments(command)
    options = parser.parse_args()
    print(SECTIONS[options.section].main(options))


if __name__ == "__main__":
    sys.exit(main())
