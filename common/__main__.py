"""The project's commands: ``python -m common <command>``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from .errors import TRACEBACK_VARIABLE, BadInput, explain

COMMANDS = {
    "phantoms": ("common.data.phantom", "make bulla phantoms: images, labels, exact thickness maps and a datalist"),
    "thickness": ("common.data.thickness", "make wall-thickness maps from masks"),
    "datalist": ("common.data.folders", "make a datalist from folders of images, labels and maps"),
    "plan": ("common.planning.plan", "plan spacing, patch, network and intensities for a data set"),
    "import-nnunet": ("common.import_nnunet", "make a teacher of a model that nnU-Net v2 has trained"),
    "complete": ("common.completion", "complete partly labelled cases with the predictions of single-organ teachers"),
    "pack": ("common.packing.pack", "pack a trained bundle and all that it needs into one file to share"),
    "verify": ("common.packing.verify", "check a packed bundle before it is used, without running anything of it"),
    "study": ("common.study", "run experiments of several stages and comparisons, and write their tables"),
    "compare": ("common.compare", "train and evaluate the published systems alike, and compare them as papers do"),
    "demo": ("common.demo", "train, evaluate and compare all three stages, and write a report with pictures"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # MLflow reports its use unless told not to, and is imported, with MONAI, before any of our handlers could tell it.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    parser = argparse.ArgumentParser(prog="python -m common", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=text)
        # Only the command that was asked for is imported, since torch and MONAI take seconds.
        if arguments[:1] == [name]:
            importlib.import_module(module.replace("common", __package__, 1)).add_arguments(subparser)
    options = parser.parse_args(arguments)
    module = importlib.import_module(COMMANDS[options.command][0].replace("common", __package__, 1))
    try:
        return int(module.main(options) or 0)
    except (BadInput, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"error: {explain(error) or error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
