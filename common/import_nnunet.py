"""Make a teacher of a model that nnU-Net v2 has trained.

Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation", Nature
Methods 2021; the results folders of its second release, whose plans changed their layout with version 2.3.

nnU-Net's arrays are (channel, z, y, x) of a file as it is stored, with the axes then permuted by the plan's
``transpose_forward``. The bundles' are (channel, x, y, z). So kernels are permuted; the directions in which the
training files' axes run become the plan's ``orientation``, to which the bundles bring every image.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from torch import Tensor

from .data.grids import read_grid
from .engines.origin import trained_settings
from .errors import BadInput
from .files import write_atomically
from .networks import SegmentationNetwork, hand_over, save_weights, state_digest

__all__ = ["add_arguments", "convert_weights", "import_nnunet", "main"]

AXIS_OF_DIRECTION = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
# Readers that fix the orientation, and those of files without one, which the bundles' reader takes for LPS.
ORIENTATION_OF_READER = {
    "SimpleITKIOWithReorient": "RAS",
    "NibabelIOWithReorient": "RAS",
    "NaturalImage2DIO": "LPS",
    "Tiff3DIO": "LPS",
}
# The standard trainer, and nnU-Net's variants of its length and augmentation: surely with the standard network.
TRAINERS = r"nnUNetTrainer(_\d+epochs|NoMirroring|_onlyMirror01|DA5|NoDA)*"
ANISOTROPY_THRESHOLD = 3.0
NAMES = (
    (r"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.conv\.", r"encoder.stages.\1.\2.conv."),
    (r"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.norm\.", r"encoder.stages.\1.\2.adn.N."),
    (r"decoder\.stages\.(\d+)\.convs\.(\d+)\.conv\.", r"segmentation_decoder.stages.\1.\2.conv."),
    (r"decoder\.stages\.(\d+)\.convs\.(\d+)\.norm\.", r"segmentation_decoder.stages.\1.\2.adn.N."),
    (r"decoder\.transpconvs\.", "segmentation_decoder.upsampling."),
    (r"decoder\.seg_layers\.", "segmentation_decoder.heads."),
)
# nnU-Net registers each layer a second time in a sequence, and the encoder a second time in the decoder.
REPEATED = re.compile(r"\.all_modules\.|^decoder\.encoder\.")
_numpy_scalar: Any = np.float64(0).__reduce__()[0]
# What nnU-Net's log of a training consists of. NumPy 2 moved the function that makes its scalars.
SAFE: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    np.dtype,
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(type(np.dtype(kind)) for kind in ("float16", "float32", "float64", "int32", "int64", "bool")),
]


def convert_weights(weights: Mapping[str, Tensor], source: Sequence[int]) -> dict[str, Tensor]:
    """nnU-Net's weights under the names that :class:`common.networks.SegmentationNetwork` gives them.

    Args:
        weights: state dict of a PlainConvUNet.
        source: the spatial axis of nnU-Net's array that becomes each axis here: ``(2, 1, 0)`` for (z, y, x) to
            (x, y, z).

    Returns:
        A state dict. Names that a PlainConvUNet doesn't have are kept as they are.
    """
    converted = {}
    for name, value in weights.items():
        name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
        if REPEATED.search(name):
            continue
        for pattern, replacement in NAMES:
            name = re.sub(f"^{pattern}", replacement, name)
        if value.ndim == len(source) + 2:
            value = value.permute(0, 1, *(2 + axis for axis in source))
        converted[name] = value.contiguous()
    return converted


def import_nnunet(
    folder: str | Path,
    fold: str | int = 0,
    checkpoint: str = "checkpoint_final.pth",
    orientation: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Read a results folder of nnU-Net v2.

    Args:
        folder: holds ``plans.json``, ``dataset.json`` and ``fold_<fold>/<checkpoint>``.
        fold: 0 to 4, or ``"all"``.
        checkpoint: file name of the weights.
        orientation: how the training files are stored: the patient's directions in which their axes run, such as
            ``"LPS"``, or one of these files. None takes what nnU-Net's reader fixes, else ``"RAS"``.

    Returns:
        A config overlay for the bundles, the state dict of a :class:`common.networks.SegmentationNetwork`, and where
        they come from.

    Raises:
        BadInput: a file is missing or damaged, the model isn't a standard PlainConvUNet, its preprocessing has no
            counterpart here, or its orientation matters and isn't given.
    """
    folder = Path(folder)
    plans, dataset = _read_json(folder / "plans.json"), _read_json(folder / "dataset.json")
    path = folder / f"fold_{fold}" / checkpoint
    content = _read_checkpoint(path)
    try:
        name = content["init_args"]["configuration"]
        where = f"{folder / 'plans.json'}, {name}"
        configuration = _configuration(plans, name, where)
        mirrored = tuple(content.get("inference_allowed_mirroring_axes") or ())
        stored = _orientation(
            orientation, plans.get("image_reader_writer"), len(configuration["patch_size"]), mirrored, path
        )
        source, directions = _axes(plans["transpose_forward"], stored, len(configuration["patch_size"]))
        if configuration.get("preprocessor_name", "DefaultPreprocessor") != "DefaultPreprocessor":
            raise BadInput(
                f"{where}: images were prepared by {configuration['preprocessor_name']}, which isn't nnU-Net's own, so "
                "the bundles can't do as it did. Train with the DefaultPreprocessor."
            )
        plan = {
            **_network(configuration, source, where),
            "orientation": directions,
            "channels": len(dataset.get("channel_names", dataset.get("modality", ()))),
            "labels": _labels(dataset["labels"], folder / "dataset.json"),
            "targets": [],
            "intensity": _intensity(configuration, plans, where),
            "mirror_axes": sorted(source.index(axis) for axis in mirrored),
        }
    except KeyError as error:
        raise BadInput(
            f"{folder}: {error} is missing in plans.json, dataset.json or {path.name}, expected what nnU-Net v2 "
            "writes. Copy the whole folder again."
        ) from error
    except (TypeError, AttributeError, ValueError, IndexError) as error:
        raise BadInput(
            f"{folder}: plans.json, dataset.json or {path.name} isn't what nnU-Net v2 writes ({error}). Copy the "
            "whole folder again."
        ) from error
    weights = convert_weights(content["network_weights"], source)
    model = SegmentationNetwork(
        **{key: plan[key] for key in ("spatial_dims", "features", "kernel_sizes", "strides")},
        in_channels=plan["channels"],
        out_channels=len(plan["labels"]),
    )
    hand_over(model, weights, source=f"{path}, for the network in {where}")
    origin = {
        "dataset": plans.get("dataset_name", ""),
        "configuration": name,
        "fold": str(fold),
        "checkpoint": checkpoint,
        "trainer": content.get("trainer_name", ""),
        "epochs": int(content.get("current_epoch", 0)),
        "orientation": stored,
    }
    return plan, weights, origin


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        found = sorted(str(match.parent) for match in path.parent.glob(f"*/{path.name}"))
        inside = f" There are models in {', '.join(found)}." if found else ""
        raise BadInput(
            f"{path}: no such file. Expected a folder that nnU-Net v2 trained a model in, with plans.json, "
            "dataset.json and fold_0: nnUNet_results/Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlans__3d_fullres."
            + inside
        )
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: can't be read as JSON ({error}). Copy it again.") from error


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        found = sorted(str(match.relative_to(path.parents[1])) for match in path.parents[1].glob("fold_*/*.pth"))
        raise BadInput(
            f"{path}: no such file. Choose --fold and --checkpoint from {', '.join(found) or 'none: no *.pth'}."
        )
    try:
        with torch.serialization.safe_globals(SAFE):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises on a damaged file ranges from EOFError to UnpicklingError
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and unsafe:
            raise BadInput(
                f"{path}: holds a {unsafe[1]}, expected tensors, numbers and text only. Loading such a file can run "
                "any program that its maker put in, so this one is not; its maker can save it again without that."
            ) from error
        raise BadInput(f"{path}: can't be read ({type(error).__name__}); it is damaged: copy it again.") from error
    if not isinstance(content, Mapping) or not {"network_weights", "init_args"} <= set(content):
        raise BadInput(
            f"{path}: found {sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__}, "
            "expected `network_weights` and `init_args`, as nnU-Net v2 writes them. Models of nnU-Net v1 must be "
            "trained again with v2."
        )
    return dict(content)


def _configuration(plans: Mapping[str, Any], name: str, where: str, above: Sequence[str] = ()) -> dict[str, Any]:
    """A configuration with what it inherits."""
    if name in above:
        raise BadInput(f"{where}: {name} inherits from itself. Give the plans as nnU-Net wrote them.")
    if name not in plans["configurations"]:
        raise BadInput(
            f"{where}: the plans only have {', '.join(plans['configurations'])}. Give the folder's own plans."
        )
    configuration = plans["configurations"][name]
    if "inherits_from" in configuration:
        configuration = {
            **_configuration(plans, configuration["inherits_from"], where, [*above, name]),
            **configuration,
        }
    if configuration.get("previous_stage"):
        raise BadInput(
            f"{where}: is the second stage of a cascade, which also sees the first stage's result; the bundles have no "
            f"cascade. Import {configuration['previous_stage']}, or train 3d_fullres."
        )
    return configuration


def _network(configuration: Mapping[str, Any], source: Sequence[int], where: str) -> dict[str, Any]:
    """The part of a plan that has to do with the network, checked to be that of nnU-Net's standard plans."""

    def permuted(values: Sequence[Any]) -> list[Any]:
        return [values[axis] for axis in source]

    patch, dims = configuration["patch_size"], len(configuration["patch_size"])
    if "architecture" in configuration:
        network = configuration["architecture"]["network_class_name"]
        given = configuration["architecture"]["arch_kwargs"]
    else:  # plans before version 2.3 describe nothing but standard networks
        network, width = configuration["UNet_class_name"], configuration["UNet_base_num_features"]
        stages = range(len(configuration["conv_kernel_sizes"]))
        given = {
            "features_per_stage": [min(width * 2**stage, configuration["unet_max_num_features"]) for stage in stages],
            "kernel_sizes": configuration["conv_kernel_sizes"],
            "strides": configuration["pool_op_kernel_sizes"],
            "n_conv_per_stage": configuration.get("n_conv_per_stage_encoder"),
            "n_conv_per_stage_decoder": configuration.get("n_conv_per_stage_decoder"),
            **_standard(dims),
        }
    if network.rsplit(".", 1)[-1] != "PlainConvUNet":
        raise BadInput(
            f"{where}: the network is {network}, expected nnU-Net's PlainConvUNet; the bundles have no other. Train "
            "with the plans nnUNetPlans."
        )
    count = len(given["strides"])
    expected = {"n_conv_per_stage": [2] * count, "n_conv_per_stage_decoder": [2] * (count - 1), **_standard(dims)}
    for key, value in expected.items():
        if given.get(key, False) != value:
            raise BadInput(
                f"{where}: {key} is {given.get(key)}, expected {value} as in nnU-Net's own plans; the bundles' network "
                "has no other. Train with the plans nnUNetPlans."
            )
    flat = dims == 3 and max(patch) / patch[0] > ANISOTROPY_THRESHOLD
    kernel_sizes = [permuted(kernel) for kernel in given["kernel_sizes"]]
    return {
        "spatial_dims": dims,
        "spacing": permuted(configuration["spacing"]),
        "patch_size": permuted(patch),
        "batch_size": configuration["batch_size"],
        "features": given["features_per_stage"],
        "kernel_sizes": kernel_sizes,
        "strides": [permuted(stride) for stride in given["strides"]],
        "thick_axis": source.index(0) if flat else None,
        **({"edge_kernel": kernel_sizes[0]} if 1 in kernel_sizes[0] else {}),
    }


def _standard(dims: int) -> dict[str, Any]:
    return {
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
        "nonlin_first": False,
    }


def _orientation(given: str | None, reader: str | None, dims: int, mirrored: Sequence[int], path: Path) -> str:
    """The patient's directions in which the training files' axes run, three letters."""
    if given is None:
        known = None if reader is None else ORIENTATION_OF_READER.get(reader)
        if known is None and len(mirrored) < dims:
            raise BadInput(
                f"{path}: was trained with mirroring along the axes {list(mirrored)} only, so it can tell left from "
                "right, and nnU-Net doesn't note how its files were stored. Give --orientation with one of the "
                "training images, or with letters such as LPS."
            )
        return known or "RAS"
    if Path(given).is_file():
        given = "".join(nibabel.aff2axcodes(read_grid(given).affine))
    letters = given.upper() + "RAS"[len(given) :]
    if sorted(AXIS_OF_DIRECTION.get(letter, -1) for letter in letters) != [0, 1, 2]:
        raise BadInput(
            f"--orientation {given}: expected an image file, or a letter for each axis of the files that says where it "
            "runs to: R or L (right, left), A or P (anterior, posterior), S or I (superior, inferior), such as LPS."
        )
    return letters


def _axes(transpose_forward: Sequence[int], orientation: str, dims: int) -> tuple[list[int], str]:
    """Which of the last ``dims`` axes of nnU-Net's transposed arrays is each of x, y, z, and where that one runs to."""
    # nnU-Net's arrays have a file's axes the other way round: the file's last axis is the array's first.
    letters = [orientation[2 - axis] for axis in transpose_forward[-dims:]]
    source = sorted(range(dims), key=lambda axis: AXIS_OF_DIRECTION[letters[axis]])
    return source, "".join(letters[axis] for axis in source)


def _labels(labels: Mapping[str, Any], path: Path) -> dict[str, str]:
    ids = {name: value for name, value in labels.items() if name != "ignore"}
    if ids.get("background") != 0:
        raise BadInput(f"{path}: the label 0 is {[n for n, v in ids.items() if v == 0]}, expected `background`.")
    regions = [name for name, value in ids.items() if not isinstance(value, int)]
    if regions:
        raise BadInput(
            f"{path}: the labels {', '.join(regions)} are regions, which may overlap; the bundles' classes exclude "
            "each other. Train nnU-Net with plain labels."
        )
    if sorted(ids.values()) != list(range(len(ids))):
        raise BadInput(f"{path}: the label ids are {sorted(ids.values())}, expected 0 to {len(ids) - 1} without a gap.")
    return {str(value): name for name, value in sorted(ids.items(), key=lambda item: item[1])}


def _intensity(
    configuration: Mapping[str, Any], plans: Mapping[str, Any], where: str
) -> dict[str, Any] | list[dict[str, Any]]:
    """nnU-Net's normalisation as the bundles' ``intensity``, one a channel where they differ."""
    # Its name was another one in the first version 2.
    properties = plans.get("foreground_intensity_properties_per_channel") or plans.get(
        "foreground_intensity_properties_by_modality", {}
    )
    masked = configuration["use_mask_for_norm"]
    channels = []
    for channel, scheme in enumerate(configuration["normalization_schemes"]):
        if scheme == "ZScoreNormalization":
            channels.append({"kind": "zscore", "nonzero": True} if masked[channel] else {"kind": "zscore"})
        elif scheme == "RGBTo01Normalization":
            channels.append({"kind": "ct", "lower": 0.0, "upper": 255.0, "mean": 0.0, "std": 255.0})
        elif scheme == "CTNormalization":
            found = properties[str(channel)]
            lower, upper = found["percentile_00_5"], found["percentile_99_5"]
            std = max(found["std"], 1e-8)
            channels.append({"kind": "ct", "lower": lower, "upper": upper, "mean": found["mean"], "std": std})
        else:
            raise BadInput(
                f"{where}: intensities are normalised by {scheme}. The bundles know ZScoreNormalization, "
                "CTNormalization and RGBTo01Normalization. Train nnU-Net with one of these."
            )
    return channels[0] if all(channel == channels[0] for channel in channels) else channels


def _kinds(intensity: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(item["kind"] for item in ([intensity] if isinstance(intensity, Mapping) else intensity))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m common import-nnunet``."""
    parser.description = (
        "Take over a model that nnU-Net v2 has trained: its weights become a teacher's, its plan one of the bundles'. "
        "The teacher predicts what the model does; a student can be trained from it, and a dual decoder from that."
    )
    parser.add_argument("folder", help="what nnU-Net v2 trained: has plans.json, dataset.json and fold_0")
    parser.add_argument("--fold", default="0", help="0 (the default) to 4, or all")
    parser.add_argument("--checkpoint", default="checkpoint_final.pth", help="the weights (checkpoint_final.pth)")
    parser.add_argument("--output", type=Path, required=True, help="weights to write: bundles/teacher/models/model.pt")
    parser.add_argument(
        "--plan", type=Path, help="config file to write, for all bundles (plan.json beside the weights)"
    )
    parser.add_argument(
        "--orientation",
        metavar="FILE",
        help="how the training images are stored, which nnU-Net doesn't note: one of these images, or letters for "
        "where its axes run to in the patient, such as LPS or PIR (default RAS)",
    )


def main(options: argparse.Namespace) -> int:
    """Run ``python -m common import-nnunet``; returns the exit code."""
    plan_path = options.plan or options.output.with_name("plan.json")
    for path in (options.output, plan_path):
        if path.exists():
            raise BadInput(f"{path}: exists already. Remove it, or give another --output or --plan.")
    plan, weights, origin = import_nnunet(options.folder, options.fold, options.checkpoint, options.orientation)
    save_weights(weights, options.output)
    write_atomically(plan_path, json.dumps(plan, indent=1) + "\n")
    # With this record the weights are refused where voxels, intensities or classes are others.
    record = {"stage": "teacher", "nnunet": origin, "weights": state_digest(weights), "config": trained_settings(plan)}
    write_atomically(options.output.with_suffix(".json"), json.dumps(record, indent=2))
    print(f"nnU-Net: {origin['dataset']}, {origin['configuration']}, fold {origin['fold']}, {origin['epochs']} epochs")
    print(f"network: {plan['spatial_dims']}D, {len(plan['features'])} stages of {plan['features']} channels")
    if plan["spatial_dims"] == 2:
        print("it takes NIfTI files of two dimensions: no volumes, and no PNG")
    print(f"classes: {', '.join(plan['labels'].values())}")
    print(f"spacing: {plan['spacing']} mm, patch {plan['patch_size']}, intensities {_kinds(plan['intensity'])}")
    print(f"training files: axes taken to run to {', '.join(origin['orientation'])}")
    if not re.fullmatch(TRAINERS, origin["trainer"]):
        print(
            f"warning: trained by {origin['trainer'] or 'an unnamed trainer'}, which may build another network than "
            "the standard one; then the logits differ. Compare some predictions with nnU-Net's own."
        )
    print(f"training mirrored along: {plan['mirror_axes'] or 'no axis'}")
    print(f"weights: {options.output}\nplan: {plan_path}")
    return 0
