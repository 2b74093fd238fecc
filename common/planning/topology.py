"""The rules of nnU-Net v2 for spacing, patch, topology and batch size.

Spacing, patch, topology and batch follow Isensee et al., "nnU-Net: a self-configuring method for deep learning-based
biomedical image segmentation", Nature Methods 2021, in the version of its second release: the median spacing (the 10th
percentile along an axis of thick slices), the largest patch of the median image's proportions whose feature maps fit
the memory, poolings of the axes whose spacing is within a factor of two of the finest, at least four voxels at the
bottom.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BadInput

__all__ = [
    "ANISOTROPY_THRESHOLD",
    "BUDGETS",
    "BUDGET_GIGABYTES",
    "Topology",
    "estimate_feature_maps",
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
