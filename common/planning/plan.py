"""Plan a network and its preprocessing from a data set, by the rules of nnU-Net v2.

The sizes are those of the images' non-zero parts, as nnU-Net has them after it has cropped to these; the bundles don't
crop. Where that part is less than three quarters of a typical image (skull-stripped brains), z-scores are of non-zero
voxels only. The low-resolution cascade is not planned.

The result is an overlay for the bundles' configs. Axes are those of the file after reorientation to RAS.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.datalist import read_datalist
from ..data.units import LENGTHS
from ..errors import BadInput
from ..files import write_atomically
from ..targets import is_dense
from ..transforms.familiarity import familiar_ranges
from .doubts import doubts
from .findings import Findings, find
from .topology import (
    ANISOTROPY_THRESHOLD,
    BUDGET_GIGABYTES,
    BUDGETS,
    parse_memory,
    plan_features,
    plan_patch,
    plan_spacing,
)

__all__ = ["add_arguments", "main", "make_plan"]

STAGES_OF_THE_CONFIGS = 4
SHARE_THAT_IS_CROPPED = 0.75
#: of what is measured, in voxels of half the resolution; docs/results.md has what that costs walls of 4.1 and of 0.6
HALF_RESOLUTION_VOXELS = 4


def _intensity(findings: Findings) -> dict[str, Any] | list[dict[str, Any]]:
    """One description for all channels where it is the same, else one a channel."""
    nonzero = {"nonzero": True} if findings.nonzero_share < SHARE_THAT_IS_CROPPED else {}
    channels = [
        _of_ct(findings.foreground[channel]) if ct else {"kind": "zscore", **nonzero}
        for channel, ct in enumerate(findings.ct)
    ]
    return channels[0] if all(channel == channels[0] for channel in channels) else channels


def _of_ct(foreground: np.ndarray) -> dict[str, Any]:
    lower, upper = np.percentile(foreground, (0.5, 99.5))
    values = {"lower": lower, "upper": upper, "mean": foreground.mean(), "std": max(foreground.std(), 1e-8)}
    return {"kind": "ct", **{key: round(float(value), 4) for key, value in values.items()}}


def make_plan(
    datalist: str | Path,
    width: int = 32,
    max_width: int | None = None,
    memory: float | None = None,
    spacing: Sequence[float] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Plan from the training cases of a datalist.

    Reads every training case once, headers first.

    Args:
        datalist: JSON file.
        width: channels of the first stage.
        max_width: most channels of a stage; None is nnU-Net's 320 in 3D, 512 in 2D.
        memory: GB of the device's memory; None is nnU-Net's 8.
        spacing: mm along the RAS axes; None plans it.
        progress: show a bar while voxels are read.

    Returns:
        A config overlay: spatial_dims, channels, labels, targets, spacing, patch_size, batch_size, intensity, features,
        kernel_sizes, strides, and thick_axis: the axis of a patch that is more than three times flatter than it is
        wide (augment in the plane across it), or None; familiar: what the images are like, by which inference knows one
        that is not, see :func:`.familiarity.familiar_ranges`. Where the first stage's kernel is 1 along an axis,
        edge_kernel is that kernel, so that attention looks for no edge from one thick slice to the next. A network too
        shallow for the stages that the configs name (fewer than four) gets alignment_stages and attention_stages, too.
        Where all that is measured are lengths of several voxels, regression_stage is 1 and regression_width a half.

    Raises:
        BadInput: there are no training cases, a file can't be read, files disagree, most are single slices in three
            dimensions, or nothing fits the memory.
    """
    return _plan(read_datalist(datalist), width, max_width, memory, spacing, progress)[0]


def _plan(
    content: Mapping[str, Any],
    width: int,
    max_width: int | None,
    memory: float | None,
    spacing: Sequence[float] | None,
    progress: bool,
) -> tuple[dict[str, Any], Findings]:
    if width < 1 or (max_width is not None and max_width < width):
        raise BadInput(f"width {width} and max width {max_width}: expected 1 <= width <= max width.")
    findings = find(content, progress)
    if findings.spatial_dims == 3 and np.median(findings.shapes, axis=0).min() < 2:
        raise BadInput(
            "the images are single slices in files of three dimensions, which a network in 3D can't be planned for. "
            "Save images and labels as NIfTI files of two dimensions, and a network in 2D is planned."
        )
    if spacing is not None and (len(spacing) != findings.spatial_dims or min(spacing) <= 0):
        raise BadInput(f"spacing {list(spacing)}: expected {findings.spatial_dims} positive numbers (mm).")
    target_spacing = plan_spacing(findings.spacings, findings.shapes) if spacing is None else np.asarray(spacing, float)
    resampled = np.rint(findings.shapes * findings.spacings / target_spacing)
    median_shape = np.maximum(np.median(resampled, axis=0), 1)
    topology, batch_size = plan_patch(
        target_spacing.tolist(),
        median_shape.tolist(),
        voxels_in_dataset=float(median_shape.prod()) * len(findings.shapes),
        outputs=len(findings.labels) + len(findings.targets),
        width=width,
        max_width=max_width,
        memory=memory,
    )
    # Of equal ones the last, which nnU-Net, whose arrays are the other way round, takes, too.
    thick = findings.spatial_dims - 1 - int(np.argmax(target_spacing[::-1]))
    flat = findings.spatial_dims == 3 and max(topology.patch_size) / topology.patch_size[thick] > ANISOTROPY_THRESHOLD
    widest = max_width or BUDGETS[findings.spatial_dims].max_width
    plan = {
        "spatial_dims": findings.spatial_dims,
        "channels": findings.channels,
        "labels": findings.labels,
        "targets": findings.targets,
        "spacing": [round(float(value), 5) for value in target_spacing],
        "patch_size": list(topology.patch_size),
        "batch_size": batch_size,
        "intensity": _intensity(findings),
        "features": plan_features(len(topology.strides), width, widest),
        "kernel_sizes": [list(stage) for stage in topology.kernel_sizes],
        "strides": [list(stage) for stage in topology.strides],
        "thick_axis": thick if flat else None,
        "familiar": familiar_ranges([case.measured for case in findings.cases], findings.ct),
    }
    if 1 in topology.kernel_sizes[0]:
        plan["edge_kernel"] = list(topology.kernel_sizes[0])
    stages = len(topology.strides)
    if stages < STAGES_OF_THE_CONFIGS:
        plan["alignment_stages"] = list(range(max(stages - 2, 0), stages))
        plan["attention_stages"] = list(range(stages - 1))[-1:]
    if _measures_thick_structures(findings.targets, target_spacing.tolist(), topology.strides):
        plan |= {"regression_stage": 1, "regression_width": 0.5}
    return plan, findings


def _measures_thick_structures(
    targets: Sequence[Mapping[str, Any]], spacing: Sequence[float], strides: Sequence[Sequence[int]]
) -> bool:
    """Whether half the resolution is enough for what is measured: lengths of typically four voxels there, or more."""
    lengths = [target["scale"] * LENGTHS.get(target.get("unit", ""), 0.0) for target in targets if is_dense(target)]
    if not targets or len(lengths) < len(targets) or len(strides) < 3:
        return False
    voxel = max(size * stride for size, stride in zip(spacing, strides[1], strict=True) if stride > 1)
    return min(lengths) >= HALF_RESOLUTION_VOXELS * voxel


def _explain(findings: Findings, plan: Mapping[str, Any], memory: float | None) -> str:
    """What was found and what follows from it."""

    def numbers(values: Sequence[float]) -> str:
        return " x ".join(f"{value:g}" for value in np.round(values, 3))

    low, high = findings.spacings.min(axis=0), findings.spacings.max(axis=0)
    lines = [
        f"{len(findings.shapes)} training images, {findings.spatial_dims}D, {findings.channels} channel(s), "
        f"median {numbers(np.median(findings.shapes, axis=0))} voxels",
        f"spacing: {numbers(low)} to {numbers(high)} mm found, {numbers(plan['spacing'])} mm chosen: "
        + _why(findings, plan),
        f"patch: {numbers(plan['patch_size'])} voxels, batch {plan['batch_size']}: what fits "
        f"{BUDGET_GIGABYTES if memory is None else memory:g} GB, no more than 5 % of the data a batch",
        f"network: {len(plan['features'])} stages of {plan['features']} channels, "
        f"{numbers([math.prod(axis) for axis in zip(*plan['strides'], strict=True)])} voxels become one at the bottom",
        f"strides: {', '.join(numbers(stage) for stage in plan['strides'])}: an axis is halved while it is less "
        "than twice as coarse as the finest and has eight voxels",
        f"kernels: {', '.join(numbers(stage) for stage in plan['kernel_sizes'])}: 1 along an axis that is twice as "
        "coarse as the finest",
    ]
    if "edge_kernel" in plan:
        lines.append(
            f"edge kernel: {numbers(plan['edge_kernel'])}: attention looks for no edge where the first kernel is 1"
        )
    if plan["thick_axis"] is not None:
        lines.append(f"anisotropic: patches are flat along axis {plan['thick_axis']}; augmentation stays in plane")
    intensities = plan["intensity"] if isinstance(plan["intensity"], list) else [plan["intensity"]]
    for index, intensity in enumerate(intensities):
        which = f"intensity of channel {index}" if len(intensities) > 1 else "intensity"
        if intensity["kind"] == "ct":
            lines.append(
                f"{which}: CT, clipped to {intensity['lower']:g} .. {intensity['upper']:g} (0.5 and 99.5 % of "
                f"labelled voxels), mean {intensity['mean']:g}, standard deviation {intensity['std']:g}"
            )
        else:
            part = "the non-zero part of each image" if intensity.get("nonzero") else "each image"
            named = ", ".join(findings.modalities) or "not given"
            lines.append(f"{which}: z-score of {part}, since `modality` isn't CT ({named})")
    for target in plan["targets"]:
        unit = target.get("unit") or "no unit given"
        lines.append(
            f"target {target['name']}: {target['kind']}, {unit}, structure {target.get('structure', 'whole image')}, "
            f"scale {target['scale']:g}; {_values(target, findings)}"
        )
        if is_dense(target) and not target.get("unit"):
            lines.append(
                f"target {target['name']}: if it is a length, name its unit in the datalist's `targets`; where it is "
                f"{HALF_RESOLUTION_VOXELS} voxels of half the resolution or more, a faster decoder is enough"
            )
    if "regression_stage" in plan:
        lines.append(
            f"regression at half resolution with half the channels, which is faster: what is measured is typically "
            f"{HALF_RESOLUTION_VOXELS} of its voxels or more"
        )
    return "\n".join(lines)


def _why(findings: Findings, plan: Mapping[str, Any]) -> str:
    """The rule that chose the spacing."""
    median = np.median(findings.spacings, axis=0)
    chosen = np.asarray(plan["spacing"])
    if np.allclose(chosen, plan_spacing(findings.spacings, findings.shapes), atol=1e-4):
        lowered = np.flatnonzero(~np.isclose(chosen, median, atol=1e-4))
        return (
            f"the median, along axis {lowered[0]} of thick slices the 10th percentile" if lowered.size else "the median"
        )
    return "as asked for"


def _values(target: Mapping[str, Any], findings: Findings) -> str:
    """What values the training cases have."""
    if not target.get("range"):
        return "no values found"
    name, (low, high) = target["name"], target["range"]
    if is_dense(target):
        maps = [case.maps[name] for case in findings.cases if name in case.maps]
        means = [found[0].sum() / found[1].sum() for found in maps]
        return f"values {low:.3g} to {high:.3g} in {len(maps)} cases, means {min(means):.3g} to {max(means):.3g}"
    count = sum(np.isfinite(case.numbers[name]) for case in findings.cases)
    return f"{low:.3g} to {high:.3g} in {count} cases"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m common plan``."""
    parser.description = (
        "Read the training cases of a datalist once, and choose voxel size, crop, network and normalisation for them "
        "by nnU-Net's rules. Prints what it found and why it chose so, and warns of what looks wrong. The plan goes "
        "with every later command: --config_file \"['bundles/teacher/configs/train.json','plan.json']\"."
    )
    parser.add_argument("--datalist", required=True, help="JSON datalist; its training section is planned from")
    parser.add_argument("--output", required=True, help="new JSON file for the plan")
    parser.add_argument(
        "--memory",
        default=None,
        help="what a teacher's training may take, of the GPU mostly: more gives larger crops (default 8GB)",
    )
    parser.add_argument(
        "--width",
        type=int,
        default=32,
        help="channels of the network's first stage, doubled a stage; 16 is faster and sees less (default 32)",
    )
    parser.add_argument("--max-width", type=int, default=None, help="most channels of a stage (320 in 3D, 512 in 2D)")
    parser.add_argument(
        "--spacing",
        type=float,
        nargs="+",
        default=None,
        metavar="MM",
        help="resample to this voxel size, left-right, front-back, head-foot, instead of the planned one: 2 2 3",
    )


def main(args: argparse.Namespace) -> int:
    """Run ``python -m common plan``; returns the exit code."""
    content = read_datalist(args.datalist)
    output = Path(args.output)
    if output.exists():
        raise BadInput(f"--output {output}: exists already. Give another name, or remove it.")
    memory = parse_memory(args.memory)
    plan, findings = _plan(content, args.width, args.max_width, memory, args.spacing, progress=True)
    print(_explain(findings, plan, memory))
    for sentence in doubts(findings):
        print(f"warning: {sentence}")
    write_atomically(output, json.dumps(plan, indent=1) + "\n")
    print(f"plan: {output}")
    return 0
