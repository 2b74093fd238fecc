"""Wall thickness from a segmentation, by distance transforms; for data that has masks and no measured maps.

At a wall voxel the thickness is its distance to the inner structure plus its distance to the outside, less one voxel:
distances run from centre to centre, so that in a wall of n voxels the two sum to n + 1 voxels at each of them.

Limits worth knowing: a mask can't show a wall thinner than a voxel, so about one voxel is the least that comes out; the
sum of the two distances is the length of a broken line through the voxel, which is the wall's thickness where its two
sides run parallel; and where two cavities share a wall, the outside that counts is beyond both.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.transforms import LoadImage
from scipy import ndimage
from tqdm import tqdm

from ..errors import BadInput
from ..files import write_atomically, write_nifti
from .datalist import SECTIONS, case_name, read_datalist

__all__ = ["add_arguments", "main", "wall_thickness", "write_thickness_maps"]


def wall_thickness(
    label: np.ndarray,
    spacing: Sequence[float] | np.ndarray,
    wall: int,
    inner: Sequence[int],
    slicewise: bool = False,
    axis: int = -1,
    smallest_cavity: int = 1,
) -> np.ndarray:
    """Measure the thickness of a wall around a cavity.

    A wall counts only where it closes: voxels whose nearest cavity touches the outside by a face, and walls without a
    cavity, get 0. The volume's border is not the outside, so a cavity that leaves the field of view keeps its wall.

    The voxel that is taken off is, on anisotropic grids, the extent of a voxel along the line from the nearest inner to
    the nearest outer voxel: that of the ellipsoid whose axes are the voxel's edges, 1 / sqrt(sum (u_i / spacing_i)^2)
    for the unit vector u. With equal spacing that is the spacing.

    Args:
        label: label ids, 2D or 3D, without a channel dimension.
        spacing: mm, one number an axis.
        wall: label id of the wall.
        inner: label ids that together are the cavity.
        slicewise: measure in each slice by itself (2D), as is usual where slices are thick.
        axis: of ``label``, through the slices.
        smallest_cavity: cavities (connected by faces) of fewer voxels are ignored with their wall: in the slice where a
            cavity ends, a handful of voxels says little about the wall's inner side.

    Returns:
        float32, shape of ``label``: mm at wall voxels, 0 elsewhere and where there is no measurement.

    Raises:
        BadInput: ``label`` and ``spacing`` have different lengths, or ``wall`` is also in ``inner``.
    """
    label = np.asarray(label)
    spacing = np.asarray(spacing, dtype=float)
    if label.ndim not in (2, 3) or spacing.shape != (label.ndim,):
        raise BadInput(
            f"wall thickness: label of shape {label.shape} with {spacing.size} spacing(s); expected 2 or 3 dimensions "
            "without channels, and one spacing (mm) for each."
        )
    if wall in inner:
        raise BadInput(f"wall thickness: label id {wall} is both wall and inner; give each structure its own id.")
    is_wall, is_inner = label == wall, np.isin(label, list(inner))
    if not slicewise or label.ndim == 2:
        return _measure(is_wall, is_inner, spacing, smallest_cavity)
    result = np.zeros(label.shape, dtype=np.float32)
    in_plane = np.delete(spacing, axis)
    slices = (np.moveaxis(array, axis, 0) for array in (is_wall, is_inner, result))
    for wall_slice, inner_slice, result_slice in zip(*slices, strict=True):
        result_slice[...] = _measure(wall_slice, inner_slice, in_plane, smallest_cavity)
    return result


def _measure(wall: np.ndarray, inner: np.ndarray, spacing: np.ndarray, smallest_cavity: int) -> np.ndarray:
    result = np.zeros(wall.shape, dtype=np.float32)
    structure = wall | inner
    if not wall.any() or not inner.any() or structure.all():
        return result
    # One voxel around the structure holds the nearest outside of every voxel in it.
    found = ndimage.find_objects(structure.astype(np.uint8))[0]
    box = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in found)
    part = result[box]
    wall, inner, structure = wall[box], inner[box], structure[box]
    to_inner, nearest_inner = ndimage.distance_transform_edt(~inner, sampling=spacing, return_indices=True)
    to_outside, nearest_outside = ndimage.distance_transform_edt(structure, sampling=spacing, return_indices=True)

    cavities, count = ndimage.label(inner)
    closed = np.bincount(cavities.ravel(), minlength=count + 1) >= smallest_cavity
    closed[np.unique(cavities[ndimage.binary_dilation(~structure)])] = False
    touching = ndimage.generate_binary_structure(wall.ndim, wall.ndim)
    bodies, _ = ndimage.label(structure, structure=touching)
    measured = wall & closed[cavities[tuple(nearest_inner)]] & np.isin(bodies, np.unique(bodies[inner]))

    across = (nearest_outside - nearest_inner)[:, measured].T * spacing
    direction = across / np.linalg.norm(across, axis=1, keepdims=True)
    one_voxel = 1.0 / np.linalg.norm(direction / spacing, axis=1)
    part[measured] = (to_inner + to_outside)[measured] - one_voxel
    return result


def write_thickness_maps(
    datalist: str | Path,
    output: str | Path,
    wall: int,
    inner: Sequence[int],
    slicewise: bool = False,
    axis: int = -1,
    smallest_cavity: int = 1,
    name: str = "thickness",
    progress: bool = True,
) -> Path:
    """Measure every labelled case of a datalist; write the maps and a datalist that names them.

    Args:
        datalist: JSON file with labels.
        output: folder for ``<name>/<case>.nii.gz`` and ``datalist.json``. Nothing that the input names is overwritten.
        wall: label id of the wall.
        inner: label ids of the cavity.
        slicewise: see :func:`wall_thickness`.
        axis: see :func:`wall_thickness`.
        smallest_cavity: see :func:`wall_thickness`.
        name: of the target, and of its key in the new datalist.
        progress: show a bar over the cases.

    Returns:
        The new datalist's path.

    Raises:
        BadInput: an id that the datalist doesn't know, no labelled case, two cases of one name, an output that would
            overwrite the input, or a label that can't be read.
    """
    content = read_datalist(datalist)
    folder, output = Path(content.pop("folder")), Path(output)
    content.pop("path")
    known = content.get("labels", {})
    for index in (wall, *inner):
        if known and str(index) not in known:
            raise BadInput(f"{datalist}: label id {index} is not in its labels {known}; set --wall, --inner.")
    target_path = output / "datalist.json"
    jobs = _jobs(content, folder, output, name)
    if not jobs:
        raise BadInput(f"{datalist}: no entry has a label, so there is no wall to measure.")
    _keep_inputs(content, folder, [Path(datalist)], [target_path, *(path for _, _, path in jobs)])

    total, measured, millimetres = 0, 0, 0.0
    for entry, label_path, path in tqdm(jobs, desc=name, unit="case", disable=None if progress else True):
        label, affine = _read_label(label_path)
        sizes = np.linalg.norm(affine[:3, :3], axis=0)[: label.ndim]
        thickness = wall_thickness(label, sizes, wall, inner, slicewise, axis, smallest_cavity)
        image = nib.Nifti1Image(thickness, affine)
        image.header.set_xyzt_units("mm")
        write_nifti(path, image)
        entry[name] = os.path.relpath(path, output)
        total += int((label == wall).sum())
        measured += int((thickness > 0).sum())
        millimetres += float(thickness.sum(dtype=float))
    if not measured:
        raise BadInput(
            f"{datalist}: none of {total} wall voxels (label {wall}) encloses a cavity (labels {list(inner)}). "
            "Check --wall and --inner; where rings close only slice by slice, add --slicewise."
        )
    mean = millimetres / measured
    target = {
        "name": name,
        "unit": "mm",
        "kind": "dense",
        "structure": wall,
        "missing": 0,
        "scale": round(mean, 2),
        # How it was measured, so that a comparison can measure alike.
        "inner": list(inner),
        "slicewise": slicewise,
        "axis": axis,
        "smallest_cavity": smallest_cavity,
    }
    content["targets"] = [*(other for other in content.get("targets", []) if other.get("name") != name), target]
    write_atomically(target_path, json.dumps(content, indent=1) + "\n")
    print(f"{len(jobs)} maps, mean {mean:.2f} mm, {measured / total:.1%} of wall voxels measured: {target_path}")
    return target_path


def _jobs(content: Mapping[str, Any], folder: Path, output: Path, name: str) -> list[tuple[dict[str, Any], Path, Path]]:
    """What to measure: (entry, label file, map file); entries get paths that hold from the output folder."""
    jobs: list[tuple[dict[str, Any], Path, Path]] = []
    taken: dict[Path, str] = {}
    for section in SECTIONS:
        for entry in content.get(section, []):
            label = entry.get("label")
            for key, value in entry.items():
                if key not in ("annotated", "patient"):
                    entry[key] = seen_from(output, folder, value)
            if label is None:
                continue
            if not isinstance(label, str):
                raise BadInput(f"{section}: {case_name(entry)} has the label {label!r}; expected the path of one file.")
            path = output / name / f"{case_name(entry)}.nii.gz"
            if path in taken:
                raise BadInput(
                    f"{section}: two cases are called {case_name(entry)} ({taken[path]} and {label}); their maps would "
                    "overwrite each other. Rename one image file."
                )
            taken[path] = label
            jobs.append((entry, folder / label, path))
    return jobs


def seen_from(output: Path, folder: Path, value: Any) -> Any:
    """A path relative to the output folder, where ``value`` is the path of something that exists; else ``value``."""
    if isinstance(value, list):
        return [seen_from(output, folder, item) for item in value]
    if isinstance(value, str) and value and (folder / value).exists():
        return os.path.relpath((folder / value).resolve(), output.resolve())
    return value


def _keep_inputs(content: Mapping[str, Any], folder: Path, inputs: list[Path], written: list[Path]) -> None:
    entries = [entry for section in SECTIONS for entry in content.get(section, [])]
    output = written[0].parent.resolve()
    inputs = inputs + [output / value for entry in entries for value in entry.values() if isinstance(value, str)]
    clash = {path.resolve() for path in inputs} & {path.resolve() for path in written}
    if clash:
        raise BadInput(f"{sorted(clash)[0]} belongs to the input and would be overwritten. Choose another --output.")


def _read_label(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A label's ids without a channel dimension, and its affine in RAS."""
    try:
        image = LoadImage(image_only=True, ensure_channel_first=True)(path)
    except Exception as error:  # readers raise whatever their format raises
        raise BadInput(f"{path}: can't be read as a label ({error}). Expected NIfTI, MHA, NRRD or DICOM.") from error
    if image.shape[0] != 1:
        raise BadInput(f"{path}: has {image.shape[0]} channels, expected a label with one.")
    return np.rint(image[0].numpy()).astype(np.int64), np.asarray(image.affine, dtype=float)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m common thickness``."""
    parser.add_argument("--datalist", required=True, help="JSON datalist with labels")
    parser.add_argument("--output", required=True, help="folder for the maps and the new datalist.json")
    parser.add_argument("--wall", type=int, required=True, help="label id of the wall")
    parser.add_argument("--inner", type=int, nargs="+", required=True, help="label ids of the cavity")
    parser.add_argument("--slicewise", action="store_true", help="measure in each slice by itself")
    parser.add_argument("--axis", type=int, default=-1, help="axis of the file through the slices")
    parser.add_argument("--smallest-cavity", type=int, default=1, help="ignore cavities of fewer voxels")
    parser.add_argument("--name", default="thickness", help="key of the map in the new datalist")


def main(args: argparse.Namespace) -> int:
    """Run ``python -m common thickness``; returns the exit code."""
    write_thickness_maps(
        args.datalist,
        args.output,
        wall=args.wall,
        inner=args.inner,
        slicewise=args.slicewise,
        axis=args.axis,
        smallest_cavity=args.smallest_cavity,
        name=args.name,
    )
    return 0
