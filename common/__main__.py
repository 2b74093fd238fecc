"""The project's commands: ``python -m common <command>``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from .errors import TRACEBACK_VARIABLE, BadInput, explain

COMMANDS = {
    "phantoms": ("common.data.phantom_set", "make bulla phantoms: images, labels, exact thickness maps and a datalist"),
    "thickness": ("common.data.thickness", "make wall-thickness maps from masks"),
    "datalist": ("common.data.folders", "make a datalist from folders of images, labels and maps"),
    "check": ("common.data.audit", "read every file of a data set once, and say what is wrong with which"),
    "plan": ("common.planning.plan", "plan spacing, patch, network and intensities for a data set"),
    "import-nnunet": ("common.import_nnunet", "make a teacher of a model that nnU-Net v2 has trained"),
    "complete": ("common.completion", "complete partly labelled cases with the predictions of single-organ teachers"),
    "pack": ("common.packing.pack", "pack a trained bundle and all that it needs into one file to share"),
    "verify": ("common.packing.verify", "check a packed bundle before it is used, without running anything of it"),
    "reproduce": ("common.reproduce", "repeat a training from its record, and say what differs here"),
    "study": ("common.study", "run experiments of several stages and comparisons, and write their tables"),
    "compare": ("common.compare", "train and evaluate the published systems alike, and compare them as papers do"),
    "demo": ("common.demo", "train, evaluate and compare all three stages, and write a report with pictures"),
}
EXAMPLES = {
    "phantoms": "--output data/thick_slices --shape 64 64 16 --spacing 1 1 3 --seed 1",
    "thickness": "--datalist my_data/datalist.json --output my_data/measured --wall 2 --inner 1",
    "datalist": "--images scans --labels masks --names 1=liver --modality CT",
    "check": "--datalist my_data/datalist.json --output findings.json",
    "plan": "--datalist my_data/datalist.json --output plan.json --memory 4GB",
    "import-nnunet": "nnUNet_results/Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__3d_fullres --output "
    "bundles/teacher/models/model.pt --plan plan.json",
    "complete": "--datalist my_data/datalist.json --teachers liver=liver/models/model.pt spleen=spleen/models/model.pt "
    "--output my_data/completed",
    "pack": "dual_decoder --plan plan.json --evaluation output/eval/summary.json --version 1.0.0 --output "
    "dual_decoder-1.0.0.zip",
    "verify": "dual_decoder-1.0.0.zip --run-code",
    "reproduce": "output/teacher --output output/again --run",
    "study": "studies/hippocampus.json --data my_data/hippocampus --output output/hippocampus --seeds 0,1,2 --jobs 2",
    "compare": "--recipes all --data my_data --datalist datalist.json --steps 900 --seeds 0,1,2 --output "
    "output/compare",
    "demo": "--data my_data --output output/my_demo",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # MLflow reports its use unless told not to, and is imported, with MONAI, before any of our handlers could tell it.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    parser = argparse.ArgumentParser(prog="python -m common", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        example = f"example: python -m common {name} {EXAMPLES[name]}"
        subparser = subparsers.add_parser(name, help=text, description=text, epilog=example)
        # Only the command that was asked for is imported, since torch and MONAI take seconds.
        if arguments[:1] == [name]:
            importlib.import_module(module.replace("common", __package__, 1)).add_arguments(subparser)
    options = parser.parse_args(arguments)
    command = importlib.import_module(COMMANDS[options.command][0].replace("common", __package__, 1))
    try:
        return int(command.main(options) or 0)
    except (BadInput, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"error: {explain(error) or error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
