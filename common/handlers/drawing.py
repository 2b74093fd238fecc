"""Figures: what is segmented and measured on a case, and how losses and figures went.

They are made without pyplot, so that they need no display and leave no state, and hold no date or version: the same
input gives the same file.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..errors import BadInput
from ..files import write_atomically

__all__ = [
    "DOTS_PER_INCH",
    "ERROR_COLOURS",
    "draw_contours",
    "in_plane",
    "save_curves",
    "save_figure",
    "save_overview",
    "show_plane",
]

PANEL_INCHES = (3.2, 3.4)
DOTS_PER_INCH = 100
MAX_CURVE_COLUMNS = 3
MAX_PANEL_COLUMNS = 4
# Kinds of wrong voxels, in colours that the colour-blind tell apart (Wong, "Points of view: color blindness", Nature
# Methods 2011).
ERROR_COLOURS = {"missed": "#56B4E9", "wrongly found": "#D55E00", "wrong label": "#F0E442"}


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def _choose_slice(arrays: Mapping[str, np.ndarray | None], spacing: Sequence[float]) -> tuple[int, int] | None:
    """Axis and index of the slice to show: across the thickest voxels, where there is most to see; None in 2D."""
    given = {key: array for key, array in arrays.items() if array is not None}
    candidates = (given[key] for key in ("reference", "prediction", "target_prediction") if key in given)
    foreground = next((array for array in candidates if array.any()), given["image"])
    if foreground.ndim == 2:
        return None
    axis = max(range(3), key=lambda index: (spacing[index], index))
    counts = np.count_nonzero(foreground, axis=tuple(other for other in range(3) if other != axis))
    if foreground is arrays["image"]:
        return axis, len(counts) // 2
    # Of several equally full slices the middle one.
    fullest = np.flatnonzero(counts == counts.max())
    return axis, int(fullest[len(fullest) // 2])


def in_plane(
    arrays: Mapping[str, np.ndarray | None], spacing: Sequence[float]
) -> tuple[dict[str, np.ndarray | None], list[float]]:
    """Take the slice to show of every array; arrays of two dimensions stay as they are."""
    shapes = {key: array.shape for key, array in arrays.items() if array is not None}
    if len(set(shapes.values())) > 1:
        raise BadInput(f"a picture needs all arrays on one grid, found shapes {shapes}.")
    dimensions = len(shapes["image"])
    if dimensions not in (2, 3) or len(spacing) != dimensions:
        raise BadInput(f"a picture needs 2D or 3D arrays and a spacing an axis, found {shapes} and {list(spacing)}.")
    choice = _choose_slice(arrays, spacing)
    if choice is None:
        return dict(arrays), list(spacing)
    axis, index = choice
    planes = {key: None if array is None else np.take(array, index, axis=axis) for key, array in arrays.items()}
    return planes, [size for other, size in enumerate(spacing) if other != axis]


def show_plane(axes: Axes, plane: np.ndarray, spacing: Sequence[float], **options: Any) -> Any:
    return axes.imshow(plane.T, origin="lower", aspect=spacing[1] / spacing[0], interpolation="nearest", **options)


def draw_contours(axes: Axes, labels: np.ndarray) -> None:
    colors = color_sequences["tab10"]
    for label in np.unique(labels):
        mask = labels == label
        # A border voxel of zeros closes contours that the picture's edge would cut.
        if label != 0:
            closed = np.pad(mask, 1).T.astype(float)
            x, y = np.arange(-1, mask.shape[0] + 1), np.arange(-1, mask.shape[1] + 1)
            axes.contour(x, y, closed, levels=[0.5], colors=[colors[(int(label) - 1) % len(colors)]], linewidths=1.2)


def _wrong_voxels(reference: np.ndarray, prediction: np.ndarray, annotated: Sequence[int] | None) -> np.ma.MaskedArray:
    """Where prediction and reference differ, and how: index into ``ERROR_COLOURS``, masked where they agree."""
    wrong = prediction != reference
    if annotated is not None:
        # The background of such a reference says nothing about the structures that it doesn't label.
        wrong &= (reference != 0) | np.isin(prediction, annotated)
    return np.ma.masked_where(~wrong, np.select([prediction == 0, reference == 0], [0, 1], 2))


def _maps(
    planes: Mapping[str, np.ndarray | None], missing: float | None, structures: Sequence[int]
) -> dict[str, np.ma.MaskedArray]:
    """Reference, prediction and prediction less reference of a dense target, by title, masked where not meant."""

    def outside(key: str) -> np.ndarray | bool:
        plane = planes[key]
        return ~np.isin(plane, structures) if len(structures) and plane is not None else False

    if planes["target_prediction"] is None:
        return {}
    values = np.asarray(planes["target_prediction"], dtype=float)
    predicted = np.ma.masked_where(~np.isfinite(values) | (values == 0) | outside("prediction"), values)
    if planes["target_reference"] is None:
        return {"predicted map": predicted}
    truth = np.asarray(planes["target_reference"], dtype=float)
    unknown = ~np.isfinite(truth) | (truth == missing) | outside("reference")
    return {
        "reference map": np.ma.masked_where(unknown, truth),
        "predicted map": predicted,
        "map error": np.ma.masked_where(unknown, values - np.where(unknown, 0, truth)),
    }


def save_overview(
    path: str | os.PathLike[str],
    image: np.ndarray,
    prediction: np.ndarray | None = None,
    reference: np.ndarray | None = None,
    target_prediction: np.ndarray | None = None,
    target_reference: np.ndarray | None = None,
    unit: str = "mm",
    missing: float | None = 0,
    structures: Sequence[int] = (),
    annotated: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    title: str = "",
) -> None:
    """Save one slice of a case: image, contours of reference and prediction, wrong voxels, and a target's maps.

    In 3D it is the slice across the axis of the thickest voxels that holds most foreground. Voxels are drawn with their
    physical proportions. Wrong voxels are coloured by kind: missed, wrongly found (where the reference has background)
    and wrong label. Reference and predicted map share one colour scale; the error, prediction less reference, has one
    that is symmetric. Panels without data are left out; a panel is 320 x 340 pixels, four are in a row.

    Args:
        path: the PNG file.
        image: one channel, shape (*spatial), 2D or 3D.
        prediction: label ids, same shape.
        reference: label ids, same shape.
        target_prediction: map of a dense target, same shape.
        target_reference: its reference, same shape; NaN means no value.
        unit: the target's unit, beside the colour bars.
        missing: another value of ``target_reference`` that means no value; None for none.
        structures: labels inside which the target is meant: the predicted map is shown where one is predicted, the
            reference and the error where one is. Empty shows them everywhere.
        annotated: the label ids that ``reference`` knows; None for all.
        spacing: size of a voxel in mm an axis; 1 where None.
        title: a line above the columns.

    Raises:
        BadInput: the shapes differ, or the file can't be written.
    """
    arrays = {
        "image": image,
        "reference": reference,
        "prediction": prediction,
        "target_prediction": target_prediction,
        "target_reference": target_reference,
    }
    arrays = {key: None if array is None else np.asarray(array) for key, array in arrays.items()}
    planes, spacing = in_plane(arrays, [1.0] * np.ndim(image) if spacing is None else spacing)

    maps = _maps(planes, missing, structures)
    given = {key: plane for key, plane in planes.items() if plane is not None}
    panels = ["image", *[key for key in ("reference", "prediction") if key in given]]
    if {"reference", "prediction"} <= set(panels):
        panels.append("segmentation error")
    panels += maps
    columns = min(len(panels), MAX_PANEL_COLUMNS)
    rows = math.ceil(len(panels) / columns)

    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    finite = given["image"][np.isfinite(given["image"])]
    low, high = np.percentile(finite, (1, 99)) if finite.size else (0.0, 1.0)
    gray = {"cmap": "gray", "vmin": low, "vmax": high if high > low else low + 1}
    values = np.concatenate([maps[name].compressed() for name in maps if name != "map error"] or [np.empty(0)])
    least, most = values.min(initial=0.0), values.max(initial=0.0)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_axis_off()
        axes.set_title(panel, fontsize=9)
        show_plane(axes, given["image"], spacing, **gray)
        if panel in ("reference", "prediction"):
            draw_contours(axes, given[panel])
        elif panel == "segmentation error":
            wrong = _wrong_voxels(given["reference"], given["prediction"], annotated)
            colours = ListedColormap(list(ERROR_COLOURS.values()))
            show_plane(axes, wrong, spacing, cmap=colours, vmin=0, vmax=len(ERROR_COLOURS) - 1)
            handles = [Patch(color=colour, label=name) for name, colour in ERROR_COLOURS.items()]
            place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "ncols": len(handles)}
            axes.legend(handles=handles, **place, fontsize=8, frameon=False, handlelength=1, columnspacing=1)
        elif panel in maps:
            options = {"cmap": "viridis", "vmin": least, "vmax": most if most > least else 1.0}
            if panel == "map error":
                largest = _largest(maps[panel])
                options = {"cmap": "coolwarm", "vmin": -largest, "vmax": largest}
            drawn = show_plane(axes, maps[panel], spacing, **options)
            figure.colorbar(drawn, ax=axes, shrink=0.8, label=unit)
    if title:
        figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def _largest(values: np.ndarray) -> float:
    """End of a colour scale: the largest absolute value, 1 where there is none."""
    known = np.ma.masked_invalid(values).compressed()
    largest = float(np.abs(known).max()) if known.size else 0.0
    return largest or 1.0


def save_curves(path: str | os.PathLike[str], history: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Save how figures went, a panel each.

    Args:
        path: the PNG file.
        history: name of a figure to its (step, value) pairs in the order of the steps; a value that is not finite
            leaves a gap.

    Raises:
        BadInput: the file can't be written.
    """
    series = {name: points for name, points in history.items() if len(points)}
    columns = min(max(len(series), 1), MAX_CURVE_COLUMNS)
    rows = max(math.ceil(len(series) / columns), 1)
    figure = Figure(figsize=(4.0 * columns, 3.0 * rows), dpi=DOTS_PER_INCH, layout="constrained")
    if not series:
        figure.text(0.5, 0.5, "nothing recorded yet", ha="center", va="center")
    for index, (name, points) in enumerate(series.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        steps, values = (
            np.asarray([step for step, _ in points]),
            np.asarray([value for _, value in points], dtype=float),
        )
        axes.plot(steps, np.where(np.isfinite(values), values, np.nan), marker="." if len(points) < 50 else "")
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
    save_figure(figure, path)
