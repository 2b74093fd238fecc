"""How fast everything is on this machine, each figure beside a reference of the same run; see docs/performance.md.

python -m benchmarks SECTION ...     # one section, printed as Markdown
python -m benchmarks all             # one after the other; `make bench` does that and keeps what is printed
"""

from __future__ import annotations

import argparse
import importlib
import sys

import torch

#: in the order of `all`
SECTIONS = (
    "plain_loop",
    "training",
    "inference",
    "large_volume",
    "loading",
    "start_up",
    "dodnet",
    "dynamic_convolution",
)


def main(arguments: list[str] | None = None) -> None:
    """Print what a section measured."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="section", required=True)
    parsers = {name: commands.add_parser(name) for name in ("all", *SECTIONS)}
    for command in parsers.values():
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in arguments[:1]:
        if name in SECTIONS:
            module = importlib.import_module(f"benchmarks.{name}")
            parsers[name].description = module.__doc__
            parsers[name].formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(parsers[name])
    options = parser.parse_args(arguments)
    if options.section != "all":
        print(importlib.import_module(f"benchmarks.{options.section}").main(options))
        return
    failed = []
    for name in SECTIONS:
        print(f"## {name.replace('_', ' ').capitalize()}\n", flush=True)
        try:
            main([name, "--device", options.device])
        except SystemExit as error:  # of one row: no reason to keep the other sections back
            failed.append(name)
            print(error)
        print(flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
