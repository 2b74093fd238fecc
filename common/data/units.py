"""What a unit allows: values that can't be Hounsfield units, nor lengths or volumes of what an image shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import ndimage

from ..targets import structure_ids

__all__ = ["AIR", "CLEAR_AIR", "LENGTHS", "hounsfield_doubt", "map_doubts", "number_doubt"]

LENGTHS = {"m": 1000.0, "cm": 10.0, "mm": 1.0, "um": 0.001, "µm": 0.001}  # mm
_AREAS = {"cm2": 100.0, "mm2": 1.0}  # mm2
_VOLUMES = {"L": 1e6, "l": 1e6, "dL": 1e5, "mL": 1e3, "ml": 1e3, "cm3": 1e3, "cc": 1e3, "uL": 1.0, "mm3": 1.0}  # mm3
CLEAR_AIR = -900.0  # HU; other scales seldom begin so low
AIR = -200.0  # HU; a CT shows air, of -1000 Hounsfield units, nearly always
_FLAT = 50.0  # HU; fat and muscle alone are further apart
_ROUNDING = 1.001

Doubt = tuple[str, str]


def hounsfield_doubt(lowest: float, highest: float) -> Doubt | None:
    """What speaks against values being Hounsfield units, as severity and words; None where nothing does.

    An ``error`` where they can't be (none below 0, so not even fat or air; or all within 50), a ``warning`` where no
    voxel is below -200, as in a window or a crop of soft tissue.

    Args:
        lowest: of an image's values.
        highest: likewise.
    """
    if lowest <= AIR:
        return None
    found = f"the values are {lowest:g} to {highest:g}"
    advice = "Export it in Hounsfield units, or name another `modality`"
    if lowest >= 0 or highest - lowest < _FLAT:
        return "error", f"called CT, but {found}: normalised, windowed or stored with an offset. {advice}"
    return "warning", f"called CT, but no voxel is below {AIR:g}, {found}: perhaps a window. {advice}"


def number_doubt(target: Mapping[str, Any], value: float, shape: ArrayLike, spacing: ArrayLike) -> str | None:
    """Why a number can't be the case's length, area or volume; None where it can, or its unit is none of these.

    Args:
        target: its description.
        value: in the target's unit.
        shape: voxels of the image.
        spacing: mm.
    """
    unit, sides = target.get("unit", ""), np.multiply(shape, spacing)
    of_rank = {2: _AREAS, 3: _VOLUMES}.get(len(sides), {})
    if unit in of_rank:
        most = float(np.prod(sides)) / of_rank[unit]
    elif unit in LENGTHS:
        most = float(np.linalg.norm(sides)) / LENGTHS[unit]
    else:
        return None
    name = target["name"]
    if value < 0:
        return f"`{name}` is {value:g} {unit}, and can't be negative"
    if value > most * _ROUNDING:
        return f"`{name}` is {value:g} {unit}, more than the whole image, which has {most:.4g} {unit}. Another unit?"
    return None


def map_doubts(
    target: Mapping[str, Any], values: np.ndarray, spacing: Sequence[float], label: np.ndarray | None = None
) -> list[Doubt]:
    """What can't be in a dense target's map, each as severity (``error``, ``warning``) and words.

    Values below the target's ``minimum`` (0 unless it says otherwise), which no prediction reaches; and lengths beyond
    what they are measured in: of a thickness (a target whose name says so, or that has an ``inner``) the diagonal of
    the box around its structure, with a voxel on each side, of another length that of the image. A warning where only
    one part of the structure is smaller than its thickness, and where the description leaves it open: no ``minimum``
    and not a length, or a thickness without a unit, which is taken for mm.

    Args:
        target: the description.
        values: (*spatial), in the target's unit.
        spacing: mm.
        label: (*spatial) label ids; with it only the values inside the target's structure count, as in a training.
    """
    name, unit = target["name"], target.get("unit", "")
    sides = np.asarray(spacing, dtype=float)  # MONAI's are tensors
    inside = None if label is None or not structure_ids(target) else np.isin(label, structure_ids(target))
    counts = np.isfinite(values) & (values != target.get("missing", 0))
    counts = counts if inside is None else counts & inside
    if not counts.any():
        return []
    lowest, highest = float(values[counts].min()), float(values[counts].max())
    thickness = "inner" in target or "thick" in name.lower()
    length = unit in LENGTHS or (thickness and not unit)
    doubts = []
    least = target.get("minimum", 0)
    if least is not None and lowest < float(least):
        severity = "error" if length or "minimum" in target else "warning"
        doubts.append(
            (severity, f"{name} goes down to {lowest:g} {unit}".rstrip() + f", below its `minimum`, {float(least):g}")
        )
    if not length:
        return doubts
    scale, given = LENGTHS.get(unit, 1.0), unit or "(no unit given; mm?)"
    structure = inside if thickness else None  # what a length lies in, where that is not the image
    if structure is None:
        most, what = float(np.linalg.norm(np.asarray(values.shape) * sides)), "image"
    else:
        most, what = _across(ndimage.find_objects(structure.astype(np.uint8))[0], sides), "structure"
    if highest * scale > most * _ROUNDING:
        words = f"{name} goes up to {highest:g} {given}, longer than the {what} itself, {most:.4g} mm across"
        doubts.append(("error" if unit else "warning", f"{words}. Another unit?"))
    elif structure is not None:
        # A piece that came off a wall may be thicker than itself, when its cavity lies elsewhere.
        parts, number = ndimage.label(structure, np.ones((3,) * values.ndim))
        highs = ndimage.maximum(np.where(counts, values, -np.inf), parts, range(1, number + 1))
        wide = [_across(box, sides) for box in ndimage.find_objects(parts)]
        beyond = [pair for pair in zip(highs, wide, strict=True) if pair[0] * scale > pair[1] * _ROUNDING]
        if beyond:
            high, across = max(beyond)
            words = f"{name} goes up to {high:g} {given} in a part of its structure that is {across:.4g} mm across"
            doubts.append(("warning", words))
    return doubts


def _across(box: Sequence[slice], spacing: np.ndarray) -> float:
    """The diagonal of a box with a voxel on each side, mm."""
    return float(np.linalg.norm(np.array([part.stop - part.start + 2 for part in box]) * spacing))
