"""Plan a network and its preprocessing from a data set, by the rules of nnU-Net v2.

Spacing, patch, topology and batch follow Isensee et al., "nnU-Net: a self-configuring method for deep learning-based
biomedical image segmentation", Nature Methods 2021, in the version of its second release: the median spacing (the 10th
percentile along an axis of thick slices), the largest patch of the median image's proportions whose feature maps fit
the memory, poolings of the axes whose spacing is within a factor of two of the finest, at least four voxels at the
bottom.

Differences: images are not cropped to their non-zero part first, and the low-resolution cascade is not planned.

The result is an overlay for the bundles' configs. Axes are those of the file after reorientation to RAS.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.transforms import LoadImage
from tqdm import tqdm

from .data.datalist import case_name, read_datalist, read_grid
from .errors import BadInput
from .files import write_atomically

__all__ = [
    "Topology",
    "add_arguments",
    "estimate_feature_maps",
    "main",
    "make_plan",
    "parse_memory",
    "plan_features",
    "plan_patch",
    "plan_spacing",
    "plan_topology",
]

ANISOTROPY_THRESHOLD = 3.0
SMALLEST_FEATURE_MAP = 4
SMALLEST_BATCH = 2
LARGEST_SHARE_OF_DATASET = 0.05
CONVOLUTIONS_PER_STAGE = 2
STAGES_OF_THE_CONFIGS = 4
FOREGROUND_SAMPLES_PER_CASE = 10000
NOT_TARGETS = ("image", "label", "annotated", "patient")
IMAGE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".png", ".tif", ".tiff")


@dataclass(frozen=True)
class _Budget:
    """nnU-Net's published reference for 8 GB: elements of a patch's feature maps, batch size, edge to start from."""

    feature_maps: float
    batch_size: int
    first_patch: float
    max_width: int


BUDGETS = {
    2: _Budget(feature_maps=85e6, batch_size=12, first_patch=2048.0, max_width=512),
    3: _Budget(feature_maps=560e6, batch_size=2, first_patch=256.0, max_width=320),
}
BUDGET_GIGABYTES = 8.0


@dataclass(frozen=True)
class Topology:
    """A U-Net's shape, one entry a stage from full resolution down.

    Args:
        strides: of each stage's first convolution, one a spatial axis; the first stage's are 1.
        kernel_sizes: 3, or 1 along an axis that is still much coarser than the finest.
        patch_size: the asked-for patch, padded to a multiple of the total stride.
    """

    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    patch_size: tuple[int, ...]

    @property
    def divisor(self) -> tuple[int, ...]:
        """The total stride along each axis."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))


def plan_spacing(spacings: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """The spacing to resample to.

    The median; along an axis with much thicker (3 x) and much fewer (3 x) slices the 10th percentile, but no finer than
    the other axes.

    Args:
        spacings: mm, (cases, spatial dims).
        shapes: voxels, (cases, spatial dims).
    """
    spacings = np.asarray(spacings, dtype=float)
    target, size = np.median(spacings, axis=0), np.median(np.asarray(shapes), axis=0)
    thick = int(np.argmax(target))
    others = [axis for axis in range(len(target)) if axis != thick]
    coarse = target[thick] > ANISOTROPY_THRESHOLD * target[others].max()
    few = size[thick] * ANISOTROPY_THRESHOLD < size[others].min()
    if coarse and few:
        target[thick] = max(np.percentile(spacings[:, thick], 10), target[others].max())
    return target


def plan_topology(spacing: Sequence[float], patch_size: Sequence[float]) -> Topology:
    """Poolings and kernels for a patch.

    At each stage every axis is halved that has at least eight voxels left and whose spacing is less than twice the
    finest among those; a single axis left is halved only with twelve. An axis gets kernels of 3 once its spacing is
    within a factor of two of the finest axis, and keeps them.

    Args:
        spacing: mm.
        patch_size: voxels; halves, as medians have them, are rounded up.
    """
    sizes, current = list(patch_size), [float(value) for value in spacing]
    dims = range(len(sizes))
    kernel = [1] * len(sizes)
    strides: list[tuple[int, ...]] = [(1,) * len(sizes)]
    kernels: list[tuple[int, ...]] = []
    while True:
        large = [axis for axis in dims if sizes[axis] >= 2 * SMALLEST_FEATURE_MAP]
        finest = min((current[axis] for axis in large), default=0.0)
        halved = [axis for axis in large if current[axis] / finest < 2]
        if not halved or (len(halved) == 1 and sizes[halved[0]] < 3 * SMALLEST_FEATURE_MAP):
            break
        kernel = [3 if kernel[axis] == 3 or current[axis] / min(current) < 2 else 1 for axis in dims]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in halved else 1 for axis in dims))
        for axis in halved:
            current[axis] *= 2
            sizes[axis] = math.ceil(sizes[axis] / 2)
    kernels.append((3,) * len(sizes))
    divisor = [math.prod(axis) for axis in zip(*strides, strict=True)]
    padded = tuple(math.ceil(size / step) * step for size, step in zip(patch_size, divisor, strict=True))
    return Topology(tuple(strides), tuple(kernels), padded)


def plan_features(stages: int, width: int, max_width: int) -> list[int]:
    """Channels a stage: doubled from ``width``, capped at ``max_width``."""
    return [min(width * 2**stage, max_width) for stage in range(stages)]


def estimate_feature_maps(topology: Topology, features: Sequence[int], outputs: int) -> int:
    """Elements in the outputs of all convolutions for one patch: what training memory is proportional to.

    Args:
        topology: of a U-Net with two convolutions a stage and transposed convolutions on the way up.
        features: channels a stage.
        outputs: output channels of the network.
    """
    voxels, size = [], list(topology.patch_size)
    for stride in topology.strides:
        size = [value // step for value, step in zip(size, stride, strict=True)]
        voxels.append(math.prod(size))
    encoder = sum(CONVOLUTIONS_PER_STAGE * width * count for width, count in zip(features, voxels, strict=True))
    decoder = sum(
        (CONVOLUTIONS_PER_STAGE + 1) * width * count for width, count in zip(features[:-1], voxels[:-1], strict=True)
    )
    return encoder + decoder + outputs * voxels[0]


def plan_patch(
    spacing: Sequence[float],
    median_shape: Sequence[float],
    voxels_in_dataset: float,
    outputs: int,
    width: int = 32,
    max_width: int | None = None,
    memory: float | None = None,
) -> tuple[Topology, int]:
    """The largest patch that fits the memory, its topology and the batch size.

    Args:
        spacing: mm, after resampling.
        median_shape: voxels of the median image, after resampling.
        voxels_in_dataset: of all training images together; a batch holds 5 % of them at most (but two patches).
        outputs: output channels of the network.
        width: channels of the first stage.
        max_width: most channels of a stage; None is nnU-Net's 320 in 3D, 512 in 2D.
        memory: GB of the device; None is nnU-Net's 8.

    Raises:
        BadInput: not even the smallest patch fits.
    """
    budget = BUDGETS[len(spacing)]
    memory = BUDGET_GIGABYTES if memory is None else memory
    allowed = budget.feature_maps * memory / BUDGET_GIGABYTES
    # nnU-Net thinks in z, y, x with the thickest axis first; ties are broken by that order.
    order = list(range(len(spacing)))[::-1]
    thick = max(order, key=lambda axis: spacing[axis])
    order.remove(thick)
    order.insert(0, thick)
    spacing = [float(spacing[axis]) for axis in order]
    median_shape = [float(median_shape[axis]) for axis in order]

    density = 1 / np.asarray(spacing)
    first = density * budget.first_patch / np.prod(density) ** (1 / len(spacing))
    topology = plan_topology(
        spacing, [min(round(ideal), size) for ideal, size in zip(first, median_shape, strict=True)]
    )
    while True:
        features = plan_features(len(topology.strides), width, max_width or budget.max_width)
        estimate = estimate_feature_maps(topology, features, outputs)
        if estimate / budget.batch_size * SMALLEST_BATCH <= allowed:
            break
        topology = _shrink(topology, spacing, median_shape, memory)

    batch_size = round(allowed / estimate * budget.batch_size)
    share = round(voxels_in_dataset * LARGEST_SHARE_OF_DATASET / math.prod(topology.patch_size))
    back = [order.index(axis) for axis in range(len(order))]
    in_file_order = Topology(
        strides=tuple(tuple(stage[axis] for axis in back) for stage in topology.strides),
        kernel_sizes=tuple(tuple(stage[axis] for axis in back) for stage in topology.kernel_sizes),
        patch_size=tuple(topology.patch_size[axis] for axis in back),
    )
    return in_file_order, max(min(batch_size, share), SMALLEST_BATCH)


def _shrink(topology: Topology, spacing: Sequence[float], median_shape: Sequence[float], memory: float) -> Topology:
    """One step smaller along the axis that is largest relative to the median image."""
    patch = list(topology.patch_size)
    axis = max(range(len(patch)), key=lambda a: (patch[a] / median_shape[a], a))
    # A smaller patch may pool less and so come in finer steps: 224 lies between 256 and 192, a step of 64 skips it.
    smaller = list(patch)
    smaller[axis] -= topology.divisor[axis]
    if smaller[axis] < 1:
        raise BadInput(
            f"plan: no patch fits {memory:g} GB; the last one tried was {list(topology.patch_size)}. "
            "Give more --memory or a smaller --width."
        )
    patch[axis] -= plan_topology(spacing, smaller).divisor[axis]
    return plan_topology(spacing, patch)


def parse_memory(text: str | float | None) -> float | None:
    """GB from ``"8GB"``, ``"8"``, ``"512 MB"`` or a number; None stays None.

    Raises:
        BadInput: it is none of these, or not positive.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(G|GB|GiB|M|MB|MiB)?\s*", str(text), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise BadInput(f"memory {text!r}: expected a size like 8GB.")
    return float(match[1]) / (1024 if (match[2] or "G").upper().startswith("M") else 1)


@dataclass
class _Findings:
    """What the data set shows."""

    spatial_dims: int
    channels: int
    shapes: np.ndarray
    spacings: np.ndarray
    foreground: np.ndarray = field(default_factory=lambda: np.zeros(0))
    targets: list[dict[str, Any]] = field(default_factory=list)


def _read_headers(content: Mapping[str, Any]) -> _Findings:
    """Shape and spacing of every training image, in the order of axes that reorientation to RAS gives."""
    entries = content.get("training") or []
    if not entries:
        raise BadInput(f"{content['path']}: `training` is empty. A plan needs the labelled training cases.")
    shapes, spacings, channels = [], [], {}
    for entry in entries:
        grid = read_grid(_absolute(content, entry["image"]))
        rank = len(grid.shape)
        axes = np.asarray(nib.orientations.io_orientation(grid.affine)[:rank, 0])
        order = np.argsort(axes, kind="stable")
        shapes.append(np.asarray(grid.shape)[order])
        spacings.append(np.linalg.norm(grid.affine[:3, :3], axis=0)[:rank][order])
        channels.setdefault(grid.channels, case_name(entry))
    ranks = {len(shape): case_name(entry) for shape, entry in zip(shapes, entries, strict=True)}
    if len(ranks) > 1:
        raise BadInput(f"{content['path']}: images of different dimensions: {_examples(ranks, 'D')}. Keep one kind.")
    if len(channels) > 1:
        raise BadInput(f"{content['path']}: different numbers of channels: {_examples(channels)}. Keep one number.")
    named = len(_modalities(content))
    if named and named != next(iter(channels)):
        raise BadInput(
            f"{content['path']}: `modality` names {named} channel(s), images have {next(iter(channels))}. Correct it."
        )
    return _Findings(next(iter(ranks)), next(iter(channels)), np.stack(shapes), np.stack(spacings))


def _examples(found: Mapping[int, str], unit: str = "") -> str:
    return ", ".join(f"{count}{unit} ({name})" for count, name in sorted(found.items()))


def _absolute(content: Mapping[str, Any], value: str | Sequence[str]) -> str | list[str]:
    if isinstance(value, str):
        return str(Path(content["folder"]) / value)
    return [str(Path(content["folder"]) / item) for item in value]


def _modalities(content: Mapping[str, Any]) -> list[str]:
    named = content.get("modality", content.get("channel_names", {}))
    return [str(name) for name in named.values()] if isinstance(named, dict) else [str(named)] if named else []


def _is_ct(content: Mapping[str, Any]) -> bool:
    """Whether every channel is CT: only then do intensities mean the same in every image."""
    names = _modalities(content)
    return bool(names) and all(name.strip().lower() == "ct" for name in names)


def _labels(content: Mapping[str, Any]) -> dict[str, str]:
    labels = {str(key): str(name) for key, name in content.get("labels", {}).items()}
    if len(labels) < 2 or sorted(labels) != sorted(str(index) for index in range(len(labels))):
        raise BadInput(
            f"{content['path']}: `labels` is {content.get('labels')}; expected ids 0 (background) to K - 1 with names, "
            'like {"0": "background", "1": "lumen"}.'
        )
    return dict(sorted(labels.items(), key=lambda item: int(item[0])))


def _load(path: str | Sequence[str]) -> np.ndarray:
    """Voxels, channel first, in the file's own order."""
    try:
        return LoadImage(image_only=True, ensure_channel_first=True)(path).numpy()
    except Exception as error:  # readers raise whatever their format raises
        raise BadInput(f"{path}: can't be read ({error}). Check the file; a plan needs its voxels.") from error


def _target_names(content: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Entry keys that hold a map (dense) and keys that hold a number (case), in the order of appearance."""
    dense: dict[str, None] = {}
    numbers: dict[str, None] = {}
    for entry in content["training"]:
        for key, value in entry.items():
            if key in NOT_TARGETS:
                continue
            if isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES):
                dense[key] = None
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers[key] = None
    return list(dense), list(numbers)


def _described(content: Mapping[str, Any], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """The datalist's own description of the targets; without one, a guess from the entries."""
    if "targets" in content:
        targets = [dict(target) for target in content["targets"]]
        for target in targets:
            if not {"name", "kind"} <= set(target) or target["kind"] not in ("dense", "sum", "mean"):
                raise BadInput(
                    f"{content['path']}: the target {target} needs a `name` and a `kind`: dense, sum or mean."
                )
        return targets
    dense, numbers = _target_names(content)
    foreground = [int(index) for index in labels if index != "0"]
    structure = foreground[0] if len(foreground) == 1 else foreground
    return [
        *({"name": name, "unit": "", "kind": "dense", "missing": 0} for name in dense),
        *({"name": name, "unit": "", "kind": "mean", "structure": structure} for name in numbers),
    ]


def _read_voxels(content: Mapping[str, Any], findings: _Findings, labels: Mapping[str, str], progress: bool) -> None:
    """Fill in the CT foreground's intensities and what is open in the targets' descriptions."""
    targets = _described(content, labels)
    unfinished = [t for t in targets if t["kind"] == "dense" and not {"structure", "scale"} <= set(t)]
    counts = {target["name"]: np.zeros(len(labels)) for target in unfinished}
    sums = {target["name"]: np.zeros(len(labels)) for target in unfinished}
    rng = np.random.default_rng(1234)
    foreground = []
    entries = [entry for entry in content["training"] if entry.get("label")]
    if _is_ct(content) or unfinished:
        for entry in tqdm(entries, desc="reading", unit="case", disable=None if progress else True):
            label = np.rint(_load(_absolute(content, entry["label"]))[0]).astype(int)
            if label.min() < 0 or label.max() >= len(labels):
                raise BadInput(
                    f"{entry['label']}: has the ids {np.unique(label).tolist()[:20]}, expected 0 to {len(labels) - 1}."
                )
            if _is_ct(content):
                image = _same_grid(_load(_absolute(content, entry["image"])), label, entry, "image")
                values = image[:, label > 0].ravel()
                if len(values):
                    foreground.append(rng.choice(values, FOREGROUND_SAMPLES_PER_CASE))
            for target in unfinished:
                name = target["name"]
                if not isinstance(entry.get(name), str):
                    continue
                values = _same_grid(_load(_absolute(content, entry[name])), label, entry, name)[0]
                valid = np.isfinite(values) & (values != target.get("missing", 0))
                counts[name] += np.bincount(label[valid], minlength=len(labels))
                sums[name] += np.bincount(label[valid], weights=values[valid], minlength=len(labels))
    if _is_ct(content) and not foreground:
        raise BadInput(f"{content['path']}: no training case has a labelled voxel, so CT intensities can't be planned.")
    findings.foreground = np.concatenate(foreground) if foreground else np.zeros(0)
    for target in unfinished:
        _complete(target, counts[target["name"]], sums[target["name"]])
    for target in targets:
        if target["kind"] != "dense" and "scale" not in target:
            numbers = [entry.get(target["name"]) for entry in content["training"]]
            target["scale"] = _typical(np.mean([abs(n) for n in numbers if n is not None and np.isfinite(n)] or [1.0]))
    findings.targets = targets


def _same_grid(voxels: np.ndarray, label: np.ndarray, entry: Mapping[str, Any], key: str) -> np.ndarray:
    if voxels.shape[1:] != label.shape:
        raise BadInput(
            f"{case_name(entry)}: {key} ({entry[key]}) has shape {voxels.shape[1:]}, its label {label.shape}; "
            "they must be on one grid. Resample one to the other."
        )
    return voxels


def _complete(target: dict[str, Any], counts: np.ndarray, sums: np.ndarray) -> None:
    """The structures that hold the target (a share of 1 % of its voxels at least) and its mean there."""
    if not counts.sum():
        raise BadInput(f"target {target['name']}: every value of the training maps is missing. Remove it or fix them.")
    if "structure" not in target:
        ids = np.flatnonzero(counts >= 0.01 * counts.sum()).tolist()
        target["structure"] = ids[0] if len(ids) == 1 else ids
    where = np.atleast_1d(target["structure"])
    inside = counts[where].sum()
    target.setdefault("scale", _typical(abs(sums[where].sum()) / inside if inside else 1.0))


def _typical(value: float) -> float:
    """Three digits of a size; 1 where it is 0, since losses are divided by it."""
    return float(f"{value:.3g}") or 1.0


def _intensity(content: Mapping[str, Any], foreground: np.ndarray) -> dict[str, Any]:
    if not _is_ct(content):
        return {"kind": "zscore"}
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

    Reads the headers of the training images; voxels only of labelled CT cases (intensities of the foreground) and of
    maps whose structure or scale the datalist doesn't describe.

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
) -> tuple[dict[str, Any], _Findings]:
    if width < 1 or (max_width is not None and max_width < width):
        raise BadInput(f"width {width} and max width {max_width}: expected 1 <= width <= max width.")
    labels = _labels(content)
    findings = _read_headers(content)
    if spacing is not None and (len(spacing) != findings.spatial_dims or min(spacing) <= 0):
        raise BadInput(f"spacing {list(spacing)}: expected {findings.spatial_dims} positive numbers (mm).")
    _read_voxels(content, findings, labels, progress)
    target_spacing = plan_spacing(findings.spacings, findings.shapes) if spacing is None else np.asarray(spacing, float)
    resampled = np.rint(findings.shapes * findings.spacings / target_spacing)
    median_shape = np.maximum(np.median(resampled, axis=0), 1)
    topology, batch_size = plan_patch(
        target_spacing,
        median_shape,
        voxels_in_dataset=float(median_shape.prod()) * len(findings.shapes),
        outputs=len(labels) + len(findings.targets),
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
        "labels": labels,
        "targets": findings.targets,
        "spacing": [round(float(value), 5) for value in target_spacing],
        "patch_size": list(topology.patch_size),
        "batch_size": batch_size,
        "intensity": _intensity(content, findings.foreground),
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


def _explain(content: Mapping[str, Any], findings: _Findings, plan: Mapping[str, Any], memory: float | None) -> str:
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
        lines.append(f"intensity: z-score of each image (modality {_modalities(content) or 'not given'})")
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
    print(_explain(content, findings, plan, memory))
    write_atomically(output, json.dumps(plan, indent=1) + "\n")
    print(f"plan: {output}")
    return 0
