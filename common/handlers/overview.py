"""A picture of each prediction, to see at a glance whether to trust it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from scipy import ndimage

from ..data.datalist import case_name
from ..targets import dense_names, is_dense, structure_ids
from .cases import array, case_meta, cases_of, is_main
from .drawing import DOTS_PER_INCH, draw_contours, save_figure, show_plane

__all__ = ["CaseOverview", "save_case_overview"]

WIDTH_INCHES = {2: 5.0, 3: 9.0}  # by the image's dimensions
MOST_ROW_INCHES = 6.0
PANEL_PIXELS = 300  # along the longest side that a row shows
CLOSE_UP_MARGIN = 0.2  # of what was found, on every side
CLOSE_UP_BELOW = 0.8  # of the image's extent; a larger one shows nothing new
CONTOUR_GAP = 2  # pixels
MOST_NAMES = 8  # in a line of the legend
# The patient's planes by the world axes they show, and what lies at the left, right, bottom and top of each, as
# radiologists look at them.
PLANES = {"axial": ((0, 1), "RLPA"), "coronal": ((0, 2), "RLIS"), "sagittal": ((1, 2), "APIS")}


def _sample(values: np.ndarray, affine: np.ndarray, points: np.ndarray, nearest: bool) -> np.ndarray:
    """Values at points (rank, ...) given in mm; NaN outside the grid's voxels."""
    rank = values.ndim
    index = np.tensordot(np.linalg.inv(affine), np.stack([*points, np.ones_like(points[0])]), axes=1)[:rank]
    sizes = np.asarray(values.shape).reshape(-1, *[1] * (points.ndim - 1))
    outside = ((index < -0.5 - 1e-6) | (index > sizes - 0.5 + 1e-6)).any(axis=0)
    if nearest:
        sampled = values[tuple(np.clip(np.rint(index).astype(int), 0, sizes - 1))].astype(float)
    else:
        sampled = ndimage.map_coordinates(values, index, order=1, mode="nearest", output=float)
    return np.where(outside, np.nan, sampled)


def _box(corners: Sequence[tuple[int, int]], affine: np.ndarray) -> np.ndarray:
    """The box in mm, (rank, 2), round the voxels from first to last index along each axis."""
    ends = np.meshgrid(*[(first - 0.5, last + 0.5) for first, last in corners], indexing="ij")
    points = affine @ np.stack([*(axis.ravel() for axis in ends), np.ones(2 ** len(corners))])
    return np.stack([points[:-1].min(axis=1), points[:-1].max(axis=1)], axis=1)


def _centre_and_box(found: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The middle of what was found, in mm, and the box round it all; the grid's middle and None where nothing was."""
    if not found.any():
        return (affine @ [*((size - 1) / 2 for size in found.shape), 1])[:-1], None
    index, corners = [], []
    for axis in range(found.ndim):
        counts = found.sum(axis=tuple(other for other in range(found.ndim) if other != axis))
        occupied = np.flatnonzero(counts)
        middle = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
        # Between two structures, such as the kidneys, the middle holds little or nothing.
        full = np.flatnonzero(counts >= counts[occupied].mean() / 2)
        index.append(int(full[np.abs(full - middle).argmin()]))
        corners.append((int(occupied[0]), int(occupied[-1])))
    centre = (affine @ [*index, 1])[:-1]
    box = _box(corners, affine)
    margin = CLOSE_UP_MARGIN * float((box[:, 1] - box[:, 0]).max())
    return centre, box + np.array([-margin, margin])


def _pixels(box: np.ndarray, centre: np.ndarray, axes: tuple[int, int]) -> np.ndarray:
    """Points (rank, columns, rows) of the plane through the centre: columns from right to left or front to back."""
    spans = box[:, 1] - box[:, 0]
    step = spans.max() / PANEL_PIXELS
    ticks = []
    for axis in axes:
        count = max(round(spans[axis] / step), 1)
        ticks.append(box[axis].mean() + step * (np.arange(count) - (count - 1) / 2))
    grid = np.meshgrid(ticks[0][::-1], ticks[1], indexing="ij")
    points = np.empty((len(centre), *grid[0].shape))
    points[:] = centre.reshape(-1, 1, 1)
    points[list(axes)] = grid
    return points


def _name_sides(axes: Axes, letters: str) -> None:
    places = ((0.03, 0.5), (0.97, 0.5), (0.5, 0.03), (0.5, 0.97))
    aligned = (("left", "center"), ("right", "center"), ("center", "bottom"), ("center", "top"))
    for letter, (x, y), (horizontal, vertical) in zip(letters, places, aligned, strict=False):
        outline = [withStroke(linewidth=2, foreground="black")]
        options: dict[str, Any] = {"color": "white", "fontsize": 9, "transform": axes.transAxes}
        axes.text(x, y, letter, ha=horizontal, va=vertical, path_effects=outline, **options)


def _colour_range(values: np.ndarray) -> tuple[float, float]:
    """Ends of a colour scale: all but the extreme values, and 0 where nothing is negative."""
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, (1, 99)).tolist() if finite.size else (0.0, 1.0)
    low = min(low, 0.0) if finite.size and finite.min() < 0 else 0.0
    return low, high if high > low else low + 1


def save_case_overview(
    path: str | os.PathLike[str],
    image: np.ndarray,
    image_affine: np.ndarray,
    segmentation: np.ndarray,
    affine: np.ndarray,
    labels: Mapping[str, str],
    targets: Sequence[Mapping[str, Any]] = (),
    maps: Mapping[str, np.ndarray] | None = None,
    title: str = "",
) -> None:
    """Save the axial, coronal and sagittal plane through what was found; in 2D the one plane there is.

    The planes are the patient's, whatever the orientation of the grids, and cross in the middle of what was found.
    The first row shows the whole image with every label's contour, the second, unless it would show the same, what was
    found from near; and a further row a dense target its values inside its structure, with a colour bar in its unit. A
    millimetre is as long in every direction. Grey goes from the 1st to the 99th percentile of what the first row shows.

    Args:
        path: the PNG file.
        image: one channel, (*spatial), 2D or 3D, on a grid of its own.
        image_affine: voxel index of ``image`` to mm, RAS, (rank + 1, rank + 1).
        segmentation: label ids, (*spatial).
        affine: the same for ``segmentation``.
        labels: label id (as a string) to name.
        targets: the targets' descriptions.
        maps: map of each dense target, on the grid of ``segmentation``.
        title: a line above the planes.

    Raises:
        BadInput: the file can't be written.
    """
    maps = maps or {}
    planes = PLANES if segmentation.ndim == 3 else {"": ((0, 1), "")}
    centre, near = _centre_and_box(segmentation != 0, affine)
    whole = _box([(0, size - 1) for size in image.shape], image_affine)
    rows: list[tuple[str, np.ndarray, Mapping[str, Any] | None]] = [("", whole, None)]
    if near is not None:
        near = np.stack([np.maximum(near[:, 0], whole[:, 0]), np.minimum(near[:, 1], whole[:, 1])], axis=1)
        if np.ptp(near, axis=1).max() < CLOSE_UP_BELOW * np.ptp(whole, axis=1).max():
            rows.append(("", near, None))
        rows += [(target["name"], near, target) for target in targets if is_dense(target) and target["name"] in maps]

    # Wide as they are in the patient, the panels of the first row have one scale.
    spans = np.ptp(whole, axis=1)
    widths, heights = zip(*((spans[columns], spans[lines]) for (columns, lines), _ in planes.values()), strict=True)
    width = WIDTH_INCHES[image.ndim]
    height = min(width / sum(widths) * max(heights), MOST_ROW_INCHES)
    figure = Figure((width + 0.8, (height + 0.1) * len(rows) + 0.8), DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(len(rows), len(planes), squeeze=False, width_ratios=widths)
    gray: dict[str, Any] = {}
    for row, (name, box, target) in enumerate(rows):
        options: dict[str, Any] = {}
        if target is not None:
            structures = structure_ids(target) or [int(label) for label in labels]
            low, high = _colour_range(maps[name][np.isin(segmentation, structures)])
            options = {"cmap": "viridis", "vmin": low, "vmax": high}
        grids = [_pixels(box, centre, axes) for axes, _ in planes.values()]
        images = [_sample(image, image_affine, points, nearest=False) for points in grids]
        if not gray:
            shown = np.concatenate([plane[np.isfinite(plane)] for plane in images])
            low, high = np.percentile(shown, (1, 99)) if shown.size else (0.0, 1.0)
            gray = {"cmap": "gray", "vmin": low, "vmax": high if high > low else low + 1}
        for axes, plane, points, (view, (_, letters)) in zip(panels[row], images, grids, planes.items(), strict=True):
            axes.set_axis_off()
            show_plane(axes, np.nan_to_num(plane, nan=gray["vmin"]), (1, 1), **gray)
            ids = np.nan_to_num(_sample(segmentation, affine, points, nearest=True))
            if target is None:
                # Where two labels meet, one steps back, or its contour would lie under the other one's.
                meeting = ndimage.maximum_filter(ids, 2 * CONTOUR_GAP + 1) > ids
                draw_contours(axes, np.where(meeting, 0, ids))
            else:
                values = _sample(maps[name], affine, points, nearest=True)
                hidden = ~np.isin(ids, structures) | ~np.isfinite(values)
                drawn = show_plane(axes, np.ma.masked_where(hidden, values), (1, 1), **options)
            # Contours along the edge would widen the panel.
            axes.set(xlim=(-0.5, plane.shape[0] - 0.5), ylim=(-0.5, plane.shape[1] - 0.5))
            _name_sides(axes, letters)
            if row == 0:
                axes.set_title(view, fontsize=9)
        if target is not None:
            unit = f" [{target['unit']}]" if target.get("unit") else ""
            bar = figure.colorbar(drawn, ax=list(panels[row]), shrink=0.8, extend="max")
            bar.set_label(f"{name}{unit}", parse_math=False)

    colours = color_sequences["tab10"]
    present = [int(label) for label in labels if int(label) and (segmentation == int(label)).any()]
    if present:
        handles = [Line2D([], [], color=colours[(label - 1) % len(colours)]) for label in present]
        legend = figure.legend(
            handles,
            [labels[str(label)] for label in present],
            loc="outside lower center",
            ncols=min(len(present), MOST_NAMES),
            fontsize=8,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    figure.suptitle(title if near is not None else f"{title}: nothing found", fontsize=10, parse_math=False)
    save_figure(figure, path)


class CaseOverview:
    """Save ``<case>_overview.png``, see :func:`save_case_overview`, of every case that an evaluator predicts.

    The image is drawn as the network gets it, with its voxel size and intensities; what was found, from the input's own
    grid. Nothing but the case's name identifies the patient.

    Args:
        output_dir: folder of the pictures.
        labels: label id (as a string) to name.
        targets: the targets' descriptions; the dense ones have a row each.
        image_key: the image, (channels, *spatial), of which the first channel is shown.
        prediction_key: the predicted label map (1, *spatial).
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        labels: Mapping[str, str],
        targets: Sequence[Mapping[str, Any]] = (),
        image_key: str = "image",
        prediction_key: str = "segmentation",
    ) -> None:
        self.output_dir = Path(output_dir)
        self.labels = dict(labels)
        self.targets = list(targets)
        self.image_key = image_key
        self.prediction_key = prediction_key

    def attach(self, engine: Engine) -> None:
        """Register at the evaluator ``engine``: a picture after every case."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if not is_main():
            return
        for case in cases_of(engine):
            name, image, found = case_name(case_meta(case)), case[self.image_key], case[self.prediction_key]
            names = dense_names(self.targets)
            save_case_overview(
                self.output_dir / f"{name}_overview.png",
                array(image),
                _affine(image),
                array(found),
                _affine(found),
                self.labels,
                self.targets,
                {target: array(case[f"{target}_pred"]) for target in names},
                title=name,
            )


def _affine(tensor: MetaTensor) -> np.ndarray:
    """The affine of a channel-first tensor's own rank."""
    return to_affine_nd(tensor.ndim - 1, np.asarray(tensor.affine, dtype=float))
