"""The same slices of one case as several methods segment them, beside the image and the reference."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .errors import BadInput
from .handlers.cases import array
from .handlers.drawing import DOTS_PER_INCH, draw_contours, save_figure, show_plane
from .transforms.loading import image_loader
from .transforms.output import voxel_spacing

__all__ = ["save_comparison"]

PANEL_INCHES = 1.9
MOST_COLUMNS = 6


def _window(maps: Sequence[np.ndarray], axis: int | None) -> tuple[slice, ...]:
    """The box round all that any map holds, with a margin of a quarter of its size; whole along ``axis``."""
    union = np.any([labels != 0 for labels in maps], axis=0)
    box = []
    for own, size in enumerate(union.shape):
        occupied = np.flatnonzero(union.any(axis=tuple(other for other in range(union.ndim) if other != own)))
        if own == axis or not occupied.size:
            box.append(slice(0, size))
            continue
        first, last = int(occupied[0]), int(occupied[-1]) + 1
        margin = max(2, (last - first) // 4)
        box.append(slice(max(0, first - margin), min(size, last + margin)))
    return tuple(box)


def _slices(reference: np.ndarray, axis: int, count: int) -> list[int]:
    """Where to cut: evenly through the slices along ``axis`` that hold foreground."""
    occupied = np.flatnonzero((reference != 0).any(axis=tuple(other for other in range(3) if other != axis)))
    candidates = occupied if occupied.size else np.arange(reference.shape[axis])
    positions = [(part + 1) / (count + 1) for part in range(count)]
    return sorted({int(candidates[int(position * len(candidates))]) for position in positions})


def save_comparison(
    path: str | os.PathLike[str],
    image: str | Sequence[str],
    reference: str | Sequence[str],
    predictions: Mapping[str, str | os.PathLike[str]],
    slices: int = 3,
) -> None:
    """Save a picture with a panel each for the image, the reference and every method, a row a slice.

    Slices lie across the axis of the thickest voxels and are cut to what reference and predictions hold. More than
    six panels go on below.

    Args:
        path: the PNG file.
        image: the case's image file, 2D or 3D; of several channels the first is shown.
        reference: its label file, on the same grid.
        predictions: label files on the same grid, by the title of their panel.
        slices: how many in 3D.

    Raises:
        BadInput: a file is on another grid.
    """
    load = image_loader(ensure_channel_first=True)
    loaded = load(image)
    files = {"Reference": reference, **predictions}
    maps = {title: array(load(file)) for title, file in files.items()}
    picture, spacing = array(loaded), voxel_spacing(loaded)
    for title, labels in maps.items():
        if labels.shape != picture.shape:
            raise BadInput(f"{files[title]}: shape {labels.shape}, but {picture.shape} of the image {image}.")

    axis = max(range(3), key=lambda index: (spacing[index], index)) if picture.ndim == 3 else None
    cuts = [None] if axis is None else _slices(maps["Reference"], axis, slices)
    window = _window(list(maps.values()), axis)
    low, high = np.percentile(picture[np.isfinite(picture)], (1, 99))
    gray = {"cmap": "gray", "vmin": low, "vmax": high if high > low else low + 1}
    in_plane = [size for own, size in enumerate(spacing) if own != axis]

    titles = ["Image", *maps]
    columns = math.ceil(len(titles) / math.ceil(len(titles) / MOST_COLUMNS))
    rows = math.ceil(len(titles) / columns) * len(cuts)
    size = (PANEL_INCHES * columns, (PANEL_INCHES + 0.15) * rows)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    for index, title in enumerate(titles):
        for place, cut in enumerate(cuts):
            row = index // columns * len(cuts) + place
            axes = figure.add_subplot(rows, columns, row * columns + index % columns + 1)
            axes.set_axis_off()
            if place == 0:
                axes.set_title(title, fontsize=8)
            planes = [array[window] for array in (picture, maps.get(title)) if array is not None]
            if cut is not None:
                planes = [np.take(plane, cut, axis=axis) for plane in planes]
            show_plane(axes, planes[0], in_plane, **gray)
            for labels in planes[1:]:
                draw_contours(axes, labels)
            # Contours along the edge would widen the panel.
            axes.set(xlim=(-0.5, planes[0].shape[0] - 0.5), ylim=(-0.5, planes[0].shape[1] - 0.5))
    save_figure(figure, Path(path))
