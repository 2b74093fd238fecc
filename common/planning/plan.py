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
from ..errors import BadInput
from ..files import write_atomically
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


def _intensity(findings: Findings) -> dict[str, Any]:
    if not findings.ct:
        nonzero = {"nonzero": True} if findings.nonzero_share < SHARE_THAT_IS_CROPPED else {}
        return {"kind": "zscore", **nonzero}
    foreground = findings.foreground
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
        wide (augment in the plane across it), or None. A network too shallow for the stages that the configs align and
        attend at (fewer than four stages) gets alignment_stages and attention_stages, too.

    Raises:
        BadInput: there are no training cases, a file can't be read, files disagree, or nothing fits the memory.
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
    if spacing is not None and (len(spacing) != findings.spatial_dims or min(spacing) <= 0):
        raise BadInput(f"spacing {list(spacing)}: expected {findings.spatial_dims} positive numbers (mm).")
    target_spacing = plan_spacing(findings.spacings, findings.shapes) if spacing is None else np.asarray(spacing, float)
    resampled = np.rint(findings.shapes * findings.spacings / target_spacing)
    median_shape = np.maximum(np.median(resampled, axis=0), 1)
    topology, batch_size = plan_patch(
        target_spacing,
        median_shape,
        voxels_in_dataset=float(median_shape.prod()) * len(findings.shapes),
        outputs=len(findings.labels) + len(findings.targets),
        width=width,
        max_width=max_width,
        memory=memory,
    )
    thick = int(np.argmax(target_spacing))
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
    }
    stages = len(topology.strides)
    if stages < STAGES_OF_THE_CONFIGS:
        plan["alignment_stages"] = list(range(max(stages - 2, 0), stages))
        plan["attention_stages"] = list(range(stages - 1))[-1:]
    return plan, findings


def _explain(findings: Findings, plan: Mapping[str, Any], memory: float | None) -> str:
    """What was found and what follows from it."""

    def numbers(values: Sequence[float]) -> str:
        return " x ".join(f"{value:g}" for value in np.round(values, 3))

    low, high = findings.spacings.min(axis=0), findings.spacings.max(axis=0)
    lines = [
        f"{len(findings.shapes)} training images, {findings.spatial_dims}D, {findings.channels} channel(s), "
        f"median {numbers(np.median(findings.shapes, axis=0))} voxels",
        f"spacing: {numbers(low)} to {numbers(high)} mm found, {numbers(plan['spacing'])} mm chosen",
        f"patch: {numbers(plan['patch_size'])} voxels, batch {plan['batch_size']}: what fits "
        f"{BUDGET_GIGABYTES if memory is None else memory:g} GB, no more than 5 % of the data a batch",
        f"network: {len(plan['features'])} stages of {plan['features']} channels, "
        f"{numbers([math.prod(axis) for axis in zip(*plan['strides'], strict=True)])} voxels become one at the bottom",
    ]
    if plan["thick_axis"] is not None:
        lines.append(f"anisotropic: patches are flat along axis {plan['thick_axis']}; augmentation stays in plane")
    intensity = plan["intensity"]
    if intensity["kind"] == "ct":
        lines.append(
            f"intensity: CT, clipped to {intensity['lower']:g} .. {intensity['upper']:g} (0.5 and 99.5 % of labelled "
            f"voxels), mean {intensity['mean']:g}, standard deviation {intensity['std']:g}"
        )
    else:
        which = "its non-zero part" if intensity.get("nonzero") else "each image"
        lines.append(f"intensity: z-score of {which} (modality {', '.join(findings.modalities) or 'not given'})")
    for target in plan["targets"]:
        unit = target.get("unit") or "no unit given"
        lines.append(
            f"target {target['name']}: {target['kind']}, {unit}, structure {target.get('structure', 'whole image')}, "
            f"scale {target['scale']:g}"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m common plan``."""
    parser.add_argument("--datalist", required=True, help="JSON datalist; its training section is planned from")
    parser.add_argument("--output", required=True, help="JSON file for the plan, an overlay for the bundles' configs")
    parser.add_argument("--memory", default=None, help="memory of the device, like 8GB (the default)")
    parser.add_argument("--width", type=int, default=32, help="channels of the first stage")
    parser.add_argument("--max-width", type=int, default=None, help="most channels of a stage (320 in 3D, 512 in 2D)")
    parser.add_argument("--spacing", type=float, nargs="+", default=None, metavar="MM", help="not the planned one")


def main(args: argparse.Namespace) -> int:
    """Run ``python -m common plan``; returns the exit code."""
    content = read_datalist(args.datalist)
    output = Path(args.output)
    if output.resolve() == Path(args.datalist).resolve() or output.is_dir():
        raise BadInput(f"{output}: expected a new JSON file for the plan, not the datalist or a folder.")
    memory = parse_memory(args.memory)
    plan, findings = _plan(content, args.width, args.max_width, memory, args.spacing, progress=True)
    print(_explain(findings, plan, memory))
    for sentence in doubts(findings):
        print(f"warning: {sentence}")
    write_atomically(output, json.dumps(plan, indent=1) + "\n")
    print(f"plan: {output}")
    return 0
