"""Datalists in the style of the Medical Segmentation Decathlon (Antonelli et al. 2022), read and checked early.

A datalist is a JSON file with the sections ``training``, ``unlabeled``, ``validation`` and ``testing``. An entry names
the ``image``, the ``label`` and any regression target; its paths are relative to the datalist's own folder. ``labels``
maps ids to names::

    {
        "labels": {"0": "background", "1": "lumen", "2": "wall"},
        "training": [{"image": "images/a.nii.gz", "label": "labels/a.nii.gz", "thickness": "maps/a.nii.gz"}],
        "unlabeled": [{"image": "images/b.nii.gz"}]
    }
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from ..errors import BadInput
from ..targets import dense_names
from .units import number_doubt

__all__ = [
    "SECTIONS",
    "Grid",
    "annotated_problems",
    "case_keys",
    "case_name",
    "check_cases",
    "check_labels",
    "check_number",
    "check_output",
    "check_right_angles",
    "describe_error",
    "dicom_files",
    "grid_difference",
    "in_both",
    "is_nifti",
    "is_picture",
    "load_section",
    "patient_key",
    "read_datalist",
    "read_grid",
]

SECTIONS = ("training", "unlabeled", "validation", "testing")
CHANNEL = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")  # nnU-Net's names of files, one a channel
VOLUME_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
PICTURE = (
    "{} is a picture, which doesn't tell the size of its pixels in mm; save it as a NIfTI file of two dimensions with "
    "its pixel size"
)
_SUFFIXES = (".seg.nrrd", *VOLUME_SUFFIXES, ".dcm")
_IMAGE_ONLY = ("unlabeled",)
_GRID_TOLERANCE = 0.1  # of a voxel: headers round, so two files of one grid seldom agree to the last digit
_SHEAR = 0.01  # cosine of the angle between two axes: 0.6 degrees change a volume by 0.005 %
_LEAN = 0.002  # mm a mm, or of a cosine: what rounding comes to; a gantry that is tilted by 0.5 degrees gives 0.009
_ONE_PLACE = 0.001  # mm
_VOXEL_SIZE_TOLERANCE = 0.01  # of a voxel's side: what headers round, or what rotating the axes costs
_DEFLATE = 1032  # the most that gzip shrinks anything (Deutsch, RFC 1951, 1996)
_MOST_PROBLEMS = 20
_MOST_FILES = 5

PathOrPaths = str | os.PathLike | Sequence[str | os.PathLike]


def _first_path(value: PathOrPaths) -> str:
    return os.fspath(value) if isinstance(value, (str, os.PathLike)) else os.fspath(value[0])


def case_name(case: PathOrPaths | Mapping[Any, Any]) -> str:
    """The name of a case: its ``case_name``, else the image's file name without its suffix or that of a DICOM folder.

    Args:
        case: an entry or the meta data of a loaded image (whose ``image`` or ``filename_or_obj`` counts where they have
            no ``case_name``), a path, or one path a channel (the first counts; of nnU-Net's ``a_0000.nii.gz``,
            ``a_0001.nii.gz`` and so on the case is ``a``).
    """
    if isinstance(case, Mapping):
        if "case_name" in case:
            return case["case_name"]
        return case_name(case["image"] if "image" in case else case["filename_or_obj"])
    if isinstance(case, (str, os.PathLike)):
        return _without_suffix(Path(case).name)
    names = [_without_suffix(Path(path).name) for path in case]
    channels = [CHANNEL.match(name) for name in names]
    stems = {match["case"] for match in channels if match}
    alike = all(channels) and len(stems) == 1 and len({match["channel"] for match in channels if match}) > 1
    return stems.pop() if alike else names[0]


def _without_suffix(name: str) -> str:
    for suffix in _SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def case_keys(targets: Sequence[Mapping[str, Any]] = (), label: bool = True) -> list[str]:
    """The keys of a training entry: ``image``, ``label`` and the names of the regression targets."""
    return ["image", *(["label"] if label else []), *(target["name"] for target in targets)]


def read_datalist(path: str | os.PathLike) -> dict[str, Any]:
    """Read a datalist and check its form (not its files).

    Args:
        path: the JSON file.

    Returns:
        The file's content with every entry a dict (a plain string becomes ``{"image": string}``) and the datalist's own
        folder and path under ``"folder"`` and ``"path"``.

    Raises:
        BadInput: the file is missing, is not JSON, has no section, or an entry is malformed.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise BadInput(
            f"datalist {path} not found; set `datalist` to a JSON file with the sections {', '.join(SECTIONS)}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BadInput(
            f"datalist {path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # no text, a number of thousands of digits, nested too deep
        raise BadInput(f"datalist {path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(
            f"datalist {path} holds a {type(content).__name__}; expected an object with {', '.join(SECTIONS)}"
        )
    if not any(section in content for section in SECTIONS):
        raise BadInput(
            f"datalist {path} has none of the sections {', '.join(SECTIONS)}; found the keys {sorted(content)}"
        )
    if not isinstance(content.get("labels", {}), dict):
        raise BadInput(f'datalist {path}: `labels` must map ids to names, like {{"0": "background", "1": "liver"}}')
    for section in SECTIONS:
        if section in content:
            content[section] = _checked_entries(path, section, content[section])
    return {**content, "folder": str(path.resolve().parent), "path": str(path)}


def _checked_entries(path: Path, section: str, entries: Any) -> list[dict[str, Any]]:
    if not isinstance(entries, list):
        raise BadInput(f"datalist {path}: `{section}` is a {type(entries).__name__}; expected a list of entries")
    checked = []
    for index, item in enumerate(entries):
        where = f"datalist {path}: entry {index} of `{section}`"
        entry = {"image": item} if isinstance(item, str) else item
        if not isinstance(entry, dict):
            raise BadInput(
                f'{where} is a {type(item).__name__}; expected an object like {{"image": "images/a.nii.gz"}}'
            )
        if "image" not in entry:
            raise BadInput(f"{where} has no `image`; found the keys {sorted(entry)}")
        for key in ("image", "label"):
            if key in entry and not _is_path(entry[key]):
                raise BadInput(
                    f"{where}: `{key}` is {entry[key]!r}; expected a file path (or a list of them, one a channel)"
                )
        if not isinstance(entry.get("annotated", []), list):
            raise BadInput(
                f"{where}: `annotated` is {entry['annotated']!r}; expected a list of label ids like [0, 1, 3]"
            )
        checked.append(entry)
    return checked


def _is_path(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value)
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) and item for item in value)


def load_section(
    datalist: str | os.PathLike | Mapping[str, Any],
    section: str,
    keys: Sequence[str] = ("image", "label"),
    required: bool = True,
    optional: Sequence[str] = (),
    exist: bool = True,
) -> list[dict[str, Any]]:
    """The entries of a section, with absolute paths and no other keys than asked for.

    Args:
        datalist: a datalist's path, or what :func:`read_datalist` returned.
        section: ``training``, ``unlabeled``, ``validation`` or ``testing``.
        keys: what every entry must have; ``unlabeled`` is only asked for ``image``, whatever ``keys`` says.
        required: whether an empty or absent section is an error.
        optional: keys that are taken along where an entry has them (besides ``annotated`` and ``patient``).
        exist: whether an absent file is an error.

    Returns:
        One dict an entry. Empty when the section is and ``required`` is False.

    Raises:
        BadInput: the section is unknown or (if ``required``) empty, an entry lacks a key, or files do not exist.
    """
    content = datalist if isinstance(datalist, Mapping) else read_datalist(datalist)
    name = content.get("path", "datalist")
    if section not in SECTIONS:
        raise BadInput(f"`{section}` is no section of a datalist; choose from {', '.join(SECTIONS)}")
    entries = content.get(section) or []
    if not entries:
        if not required:
            return []
        raise BadInput(f"datalist {name} has no entries in `{section}`. {_ADVICE[section]}")
    if section in _IMAGE_ONLY:
        keys = ("image",)
    folder = Path(content.get("folder", "."))
    wanted = [*keys, *(key for key in (*optional, "annotated", "patient") if key not in keys)]
    loaded, absent = [], []
    for index, entry in enumerate(entries):
        for key in keys:
            if entry.get(key) is None:
                raise BadInput(
                    f"datalist {name}: entry {index} of `{section}` ({case_name(entry)}) has no `{key}`; "
                    f"found the keys {sorted(entry)}"
                )
        case = {}
        for key in wanted:
            if entry.get(key) is None:
                continue
            case[key] = _absolute(folder, entry[key]) if key not in ("annotated", "patient") else entry[key]
            if key not in ("annotated", "patient") and _is_path(case[key]):
                paths = [case[key]] if isinstance(case[key], str) else case[key]
                absent += [path for path in paths if not os.path.exists(path)]
        loaded.append(case)
    if absent and exist:
        shown = ", ".join(absent[:_MOST_FILES])
        more = f" and {len(absent) - _MOST_FILES} more" if len(absent) > _MOST_FILES else ""
        raise BadInput(
            f"datalist {name}: {len(absent)} file(s) of `{section}` do not exist: {shown}{more}. "
            f"Paths are taken relative to {folder}"
        )
    return loaded


_ADVICE = {
    "training": "Training needs labelled cases: list their `image` and `label` there.",
    "unlabeled": (
        "Semi-supervised training needs images without labels there; "
        "where there are none, train the teacher bundle instead, which needs only `training`."
    ),
    "validation": "List a few labelled cases there; they choose the weights that are kept.",
    "testing": "List the cases to evaluate there.",
}


def _absolute(folder: Path, value: Any) -> Any:
    if isinstance(value, str):
        return os.path.normpath(folder / os.path.expanduser(value))
    if isinstance(value, list):
        return [_absolute(folder, item) for item in value]
    return value


@dataclass(frozen=True)
class Grid:
    """Where a file's voxels are: spatial shape, number of channels, 4 x 4 affine (voxel index to RAS millimetres)."""

    shape: tuple[int, ...]
    channels: int
    affine: np.ndarray

    @property
    def sides(self) -> np.ndarray:
        """A voxel's, in mm, one a spatial axis."""
        rank = len(self.shape)
        return np.linalg.norm(self.affine[:-1, :rank], axis=0)


def is_nifti(path: str | os.PathLike) -> bool:
    """Whether a path's suffix is that of a NIfTI file."""
    return str(path).lower().endswith((".nii", ".nii.gz"))


def is_picture(path: str | os.PathLike) -> bool:
    """Whether a path's suffix is that of a picture, such as PNG."""
    return str(path).lower().endswith(_PICTURE_SUFFIXES)


def dicom_files(folder: str | os.PathLike) -> list[str]:
    """The slice files of the one DICOM series in a folder, in the order of their position.

    Raises:
        BadInput: the folder holds no DICOM series, or more than one.
    """
    import itk

    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(True)
    names.AddSeriesRestriction("0008|0021")
    names.SetDirectory(os.fspath(folder))
    series = list(names.GetSeriesUIDs())
    if not series:
        raise BadInput(
            f"{folder} is a folder without a DICOM series; expected an image file, or a folder with one series"
        )
    if len(series) > 1:
        # By their files: a series' own number leads to its patient.
        files = [names.GetFileNames(uid) for uid in series[:3]]
        counts = ", ".join(f"that of {os.path.basename(found[0])} ({len(found)} files)" for found in files)
        raise BadInput(f"{folder} holds {len(series)} DICOM series: {counts}; keep one series a folder")
    return list(names.GetFileNames(series[0]))


def dicom_patient(folder: str | os.PathLike) -> str | None:
    """A name for the patient of a DICOM series that doesn't tell who it is; None where the header doesn't say."""
    import itk

    header = _itk_header(itk, dicom_files(folder)[0])  # which the tags live in
    tags = header.GetMetaDataDictionary()
    number = tags["0010|0020"].strip(" \0") if tags.HasKey("0010|0020") else ""
    return f"patient-{hashlib.sha256(number.encode()).hexdigest()[:8]}" if number else None


def read_grid(path: PathOrPaths) -> Grid:
    """Read the grid from a file's header, without its voxels.

    Args:
        path: a NIfTI file, any file ITK reads, a folder with one DICOM series, or a list of files, one a channel.

    Raises:
        BadInput: the header can't be read, the file is shorter than it says, it is a picture without a voxel size, a
            list's files are on different grids, or the slices of a series are no even, straight stack.
    """
    if not isinstance(path, (str, os.PathLike)):
        grids = [read_grid(item) for item in path]
        for item, grid in zip(path, grids, strict=True):
            difference = grid_difference(grids[0], grid)
            if difference:
                raise BadInput(f"{item} and {path[0]} are channels of one case but {difference}", kind="grid")
        return Grid(grids[0].shape, sum(grid.channels for grid in grids), grids[0].affine)
    if is_picture(path):
        raise BadInput(PICTURE.format(path))
    try:
        grid = _nifti_grid(path) if is_nifti(path) else _itk_grid(path)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"{path} can't be opened as an image: {describe_error(error)}") from error
    check_right_angles(grid.affine[:, [*range(len(grid.shape)), -1]], str(path))
    return grid


def check_right_angles(affine: np.ndarray, what: str) -> None:
    """Refuse a grid whose axes are not at right angles: its voxels' sides tell neither volumes nor distances.

    Args:
        affine: (4, 4) or (3, 3), voxel index to millimetres; (4, 3) for a plane in space.
        what: whose grid it is, for the message.

    Raises:
        BadInput: two axes are further from a right angle than rounding takes them, or an axis has no length.
    """
    if not np.isfinite(affine).all():
        raise BadInput(
            f"{what}: its header places it at {np.asarray(affine).tolist()}; correct its affine", kind="affine"
        )
    axes = np.asarray(affine, dtype=float)[:-1, :-1]
    sides = np.linalg.norm(axes, axis=0)
    if (sides == 0).any():
        raise BadInput(f"{what}: its header gives voxels of {sides.tolist()} mm; correct its affine", kind="affine")
    cosines = (axes / sides).T @ (axes / sides) - np.eye(len(sides))
    if np.abs(cosines).max() > _SHEAR:
        degrees = math.degrees(math.asin(min(1.0, np.abs(cosines).max())))
        raise BadInput(
            f"{what}: its axes are {degrees:.1f} degrees from right angles, as those of a scan with a tilted gantry. "
            "Volumes, distances and thicknesses would be wrong; resample it to a straight grid first",
            kind="affine",
        )


def describe_error(error: BaseException) -> str:
    """A library's error in one line."""
    # The reason that ITK gives is the operating system's last one, which seldom is the cause.
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Reason:")]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def _nifti_grid(path: str | os.PathLike) -> Grid:
    image: Any = nibabel.load(path)  # of whatever class; all that read NIfTI have what is asked for here
    shape = tuple(int(size) for size in image.shape)
    if not 2 <= len(shape) <= 4 or min(shape) < 1:
        raise BadInput(
            f"{path} has the shape {shape}; expected two or three axes in space, and channels as the fourth",
            kind="dimensions" if all(shape) else "empty",
        )
    kind = image.header.get_data_dtype()
    if kind.kind not in "iuf":
        raise BadInput(f"{path} holds colours or complex numbers ({kind}); expected one number a voxel and channel")
    size, expected = os.path.getsize(path), int(image.dataobj.offset) + math.prod(shape) * kind.itemsize
    if size * (1 if str(path).lower().endswith(".nii") else _DEFLATE) < expected:
        raise BadInput(f"{path} is truncated: {size} bytes, its header promises {expected}", kind="truncated")
    affine = np.asarray(image.affine, dtype=float)
    _check_voxel_sizes(path, affine, image.header.get_zooms()[: len(shape[:3])])
    return Grid(shape[:3], math.prod(shape[3:]), affine)


def _check_voxel_sizes(path: str | os.PathLike, affine: np.ndarray, zooms: Sequence[float]) -> None:
    """Refuse a header whose affine and voxel size disagree: programs take the one or the other for volumes in mL."""
    sides = np.linalg.norm(affine[:3, : len(zooms)], axis=0)
    if np.isfinite(sides).all() and not np.allclose(sides, zooms, rtol=_VOXEL_SIZE_TOLERANCE, atol=0):
        first, second = (" x ".join(f"{float(side):.4g}" for side in sizes) for sizes in (sides, zooms))
        raise BadInput(
            f"{path}: its header gives two voxel sizes, {first} mm (its affine) and {second} mm (pixdim); correct the "
            "one that is wrong",
            kind="affine",
        )


def _itk_grid(path: str | os.PathLike) -> Grid:
    import itk

    files = dicom_files(path) if os.path.isdir(path) else [os.fspath(path)]
    header = _itk_header(itk, files[0])
    grid = _header_grid(header)
    shape, affine = list(grid.shape), grid.affine
    if len(files) > 1:
        grids = [grid, *(_header_grid(_itk_header(itk, name)) for name in files[1:])]
        _check_stack(path, files, grids)
        # The files' mean step, which is what ITK's reader takes.
        affine[:3, 2] = (grids[-1].affine[:3, 3] - affine[:3, 3]) / (len(files) - 1)
        shape[2] = len(files)
    elif header.GetNameOfClass() == "GDCMImageIO" and len(shape) == 3:
        if shape[2] == 1:
            # ITK takes 1 mm whatever the header says.
            affine[:3, 2] *= _slice_thickness(path, header) / np.linalg.norm(affine[:3, 2])
        else:
            _check_frames(files[0], affine)
    return Grid(tuple(shape), grid.channels, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)


def _header_grid(header: Any) -> Grid:
    """The grid of one file, in ITK's LPS millimetres."""
    rank = min(header.GetNumberOfDimensions(), 3)
    affine = np.eye(4)
    for axis in range(rank):
        affine[:rank, axis] = np.asarray(header.GetDirection(axis))[:rank] * header.GetSpacing(axis)
    affine[:rank, 3] = [header.GetOrigin(axis) for axis in range(rank)]
    return Grid(tuple(int(header.GetDimensions(axis)) for axis in range(rank)), header.GetNumberOfComponents(), affine)


def _check_stack(folder: str | os.PathLike, files: Sequence[str], grids: Sequence[Grid]) -> None:
    """Refuse a series whose slices are no even, straight stack, of which ITK makes a volume all the same.

    Args:
        folder: for the messages.
        files: of the slices, in the order in which they are stacked.
        grids: of the files.

    Raises:
        BadInput: slices differ in size, pixels or orientation, lie at one position, are spaced unevenly, or are shifted
            sideways.
    """
    names = [os.path.basename(name) for name in files]
    for name, grid in zip(names, grids, strict=True):
        if grid.shape[2:] != (1,):
            raise BadInput(f"{folder}: {name} holds several slices, as other files do; keep one such file a folder")
        sides = np.linalg.norm(grids[0].affine[:3, :2], axis=0)
        if grid.shape != grids[0].shape or (np.abs(grid.affine - grids[0].affine)[:3, :2] > _LEAN * sides).any():
            raise BadInput(
                f"{folder} is no one stack: {names[0]} has {_describe_slice(grids[0])}, {name} has "
                f"{_describe_slice(grid)}; take out what does not belong to the volume, such as a localizer"
            )
    origins = np.stack([grid.affine[:3, 3] for grid in grids])
    normal = np.cross(grids[0].affine[:3, 0], grids[0].affine[:3, 1])
    normal /= np.linalg.norm(normal)
    heights = (origins - origins[0]) @ normal
    order = np.argsort(heights, kind="stable")
    steps = np.diff(heights[order])
    same = np.flatnonzero(steps < _ONE_PLACE)
    if same.size:
        raise BadInput(
            f"{folder}: {same.size} of its {len(files)} files lie where another one does, such as "
            f"{names[order[same[0]]]} and {names[order[same[0] + 1]]}; keep one volume a folder (one time, echo or "
            "reconstruction), of files that have an Image Position (Patient)"
        )
    step = float(np.median(steps))
    apart = np.abs(heights - np.linspace(heights[0], heights[-1], len(files))).max()
    if apart > _GRID_TOLERANCE * step:
        worst = int(np.abs(steps - step).argmax())
        raise BadInput(
            f"{folder}: {names[order[worst]]} and {names[order[worst + 1]]} lie {steps[worst]:.4g} mm apart, other "
            f"slices {step:.4g} mm. Where slices are missing, export the series again; where they are spaced "
            "unevenly, resample it to an even spacing and give the NIfTI file"
        )
    aside = np.linalg.norm(origins - origins[0] - np.outer(heights, normal), axis=1)
    if aside.max() > max(_GRID_TOLERANCE * sides.min(), _LEAN * abs(heights[-1])):
        worst = int(aside.argmax())
        raise BadInput(
            f"{folder}: {names[worst]} is shifted sideways by {aside[worst]:.4g} mm against {names[0]}, which lies "
            f"{abs(heights[worst]):.4g} mm away, as with a tilted gantry; straighten the series (dcm2niix does) and "
            "give the NIfTI file"
        )


def _describe_slice(grid: Grid) -> str:
    sides = np.linalg.norm(grid.affine[:3, :2], axis=0)
    cosines = " ".join(f"{cosine:.3g}" for cosine in (grid.affine[:3, :2] / sides).T.ravel() + 0.0)
    return f"{grid.shape[0]} x {grid.shape[1]} pixels of {sides[0]:.4g} x {sides[1]:.4g} mm, orientation {cosines}"


def _slice_thickness(path: str | os.PathLike, header: Any) -> float:
    """The thickness in mm of a volume of one slice."""
    tags = header.GetMetaDataDictionary()
    for tag in ("0018|0050", "0018|0088"):  # Slice Thickness, Spacing Between Slices
        if tags.HasKey(tag) and tags[tag].strip() and float(tags[tag]) > 0:
            return float(tags[tag])
    raise BadInput(
        f"{path} is one DICOM slice without a Slice Thickness, so that no volume could be told in mL; give the whole "
        "series, or a NIfTI file with the right voxel size"
    )


def _check_frames(name: str, affine: np.ndarray) -> None:
    """Refuse a multi-frame file whose frames are not where ITK has them.

    ITK takes frames that it can't stack evenly for voxels of 1 x 1 x 1 mm, and a second echo for further slices.

    Args:
        name: of the file.
        affine: of the volume that ITK makes of it, LPS.

    Raises:
        BadInput: the frames lie elsewhere; or ITK finds voxels of 1 mm, and pydicom is missing or the file names no
            positions, so that nobody can tell whether it is right.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    doubtful = np.allclose(spacing, 1)
    try:
        import pydicom
    except ImportError as error:
        if not doubtful:
            return
        raise BadInput(
            f"{name} has voxels of 1 mm, or frames that are no even stack; `pip install pydicom`, which tells the two "
            "apart, or make a NIfTI file of it"
        ) from error
    groups = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
    header = pydicom.dcmread(name, stop_before_pixels=True, specific_tags=list(groups))
    try:
        shared, frames = header.SharedFunctionalGroupsSequence[0], header.PerFrameFunctionalGroupsSequence
        pixels = [frame.get("PixelMeasuresSequence", shared.get("PixelMeasuresSequence"))[0] for frame in frames]
        sides = np.array([item.PixelSpacing for item in pixels], dtype=float)[:, ::-1]
        places = np.array([frame.PlanePositionSequence[0].ImagePositionPatient for frame in frames], dtype=float)
    except (AttributeError, IndexError, TypeError) as error:
        if not doubtful:
            return
        raise BadInput(f"{name} has frames without positions; make a NIfTI file with the right voxel size") from error
    expected = affine[:3, 3] + np.arange(len(places))[:, None] * affine[:3, 2]
    apart = np.linalg.norm(places - expected, axis=1).max()
    if apart > max(_GRID_TOLERANCE * spacing.min(), _LEAN * spacing[2] * len(places)) or not np.allclose(
        sides, spacing[:2], rtol=_LEAN
    ):
        raise BadInput(
            f"{name}: its frames are no even stack in the order of their positions (missing slices, several times or "
            "echoes, a tilted gantry); export one volume a file, or make NIfTI files with dcm2niix"
        )


def _itk_header(itk: Any, name: str) -> Any:
    header = itk.ImageIOFactory.CreateImageIO(name, itk.CommonEnums.IOFileMode_ReadMode)
    if header is None:
        raise BadInput(f"{name} is in no format that can be read; expected NIfTI, NRRD, MHA or DICOM")
    header.SetFileName(name)
    header.ReadImageInformation()
    return header


def grid_difference(one: Grid, other: Grid) -> str | None:
    """How two grids differ, as words for a message; None when they are the same to a tenth of a voxel."""
    if one.shape != other.shape:
        return f"their shapes differ: {list(one.shape)} and {list(other.shape)}"
    rank = len(one.shape)
    extent = np.asarray(one.shape, dtype=float) - 1
    corners = np.stack(np.meshgrid(*[(0.0, size) for size in extent], indexing="ij"), axis=-1).reshape(-1, rank)
    placed = [corners @ affine[:rank, :rank].T + affine[:rank, -1] for affine in (one.affine, other.affine)]
    apart = float(np.linalg.norm(placed[0] - placed[1], axis=1).max())
    spacing = np.linalg.norm(one.affine[:rank, :rank], axis=0)
    if apart <= _GRID_TOLERANCE * float(spacing.min()):
        return None
    return f"their corners lie up to {apart:.3g} mm apart (origin, spacing or orientation differs)"


def check_labels(datalist: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    """Check that the datalist and the config name the same structures.

    Args:
        datalist: what :func:`read_datalist` returned; one without ``labels`` passes.
        labels: the config's label ids and names, ids 0 to K - 1.

    Raises:
        BadInput: the ids are not 0 to K - 1, or the two differ.
    """
    wanted = {str(key): str(name) for key, name in labels.items()}
    if sorted(wanted) != sorted(str(index) for index in range(len(wanted))):
        raise BadInput(f"`labels` has the ids {sorted(wanted)}; expected 0 to {len(wanted) - 1} without a gap")
    found = {str(key): str(name) for key, name in (datalist.get("labels") or {}).items()}
    if found and found != wanted:
        raise BadInput(
            f"datalist {datalist.get('path', '')} has the labels {found}, the config's `labels` is {wanted}; "
            "make them the same"
        )


def check_cases(
    entries: Sequence[Mapping[str, Any]],
    labels: Mapping[str, str] | None = None,
    channels: int | None = None,
    targets: Sequence[Mapping[str, Any]] = (),
    patch_size: Sequence[int] | None = None,
    validation: Sequence[Mapping[str, Any]] = (),
    testing: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Check cases by their headers, which takes milliseconds a case, so that a run does not stop at its hundredth.

    Every file opens; label and dense targets are on the image's grid; the images have ``channels`` channels; case-level
    targets are numbers, and lengths and volumes that the image can have; ``annotated`` names known ids, and at least
    one structure; no patient and no file is in training and in validation or testing. What voxels hold is for
    ``python -m common check``.

    Args:
        entries: entries of :func:`load_section`; any of ``label`` and the targets may be absent.
        labels: label ids and names.
        channels: channels of an image.
        targets: descriptions of the regression targets.
        patch_size: the network's patch; its length is the number of spatial dimensions that an image must have.
        validation: entries of the validation section, checked likewise and for what they share with ``entries``.
        testing: entries of the testing section, only checked for what they share; their files may be absent.

    Raises:
        BadInput: one message with all problems (the first 20 and the count).
    """
    problems: list[str] = []
    for entry in (*entries, *validation):
        problems += _case_problems(entry, labels, channels, targets, patch_size)
    labelled = [entry for entry in entries if entry.get("label") is not None]
    # Images that are learnt from without labels may be tested on, if one says so: a transductive protocol.
    for section, learnt, others in (("validation", entries, validation), ("testing", labelled, testing)):
        problems += [
            f"{case_name(ours)} and {case_name(theirs)} are of one patient, and in training and in {section}; a "
            "patient belongs to one of them"
            for ours, theirs in in_both(learnt, others, patient_key)
        ]
        problems += [
            f"image {_first_path(theirs['image'])} is in training and in {section}; it belongs to one of them"
            for _, theirs in in_both(learnt, others, lambda entry: os.path.realpath(_first_path(entry["image"])))
        ]
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        listed = "\n  ".join(problems[:_MOST_PROBLEMS])
        raise BadInput(
            f"{len(problems)} problem(s) in the data:\n  {listed}" + (f"\n  and {more} more" if more > 0 else "")
        )


def patient_key(entry: Mapping[str, Any]) -> str | None:
    """The patient of an entry, which may be written as text or number; None where the entry doesn't say."""
    return None if entry.get("patient") is None else str(entry["patient"])


def in_both(
    learnt: Sequence[Mapping[str, Any]],
    judged: Sequence[Mapping[str, Any]],
    key: Callable[[Mapping[str, Any]], str | None],
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """For each key that is on both sides the first entry of either side that has it.

    Args:
        learnt: entries of one side.
        judged: of the other.
        key: what an entry is known by; entries without one (None) are left out.
    """
    ours, theirs = ({key(entry): entry for entry in reversed(entries)} for entries in (learnt, judged))
    return [(ours[name], entry) for name, entry in reversed(theirs.items()) if name is not None and name in ours]


def _case_problems(
    entry: Mapping[str, Any],
    labels: Mapping[str, str] | None,
    channels: int | None,
    targets: Sequence[Mapping[str, Any]],
    patch_size: Sequence[int] | None,
) -> list[str]:
    case, problems = case_name(entry), []
    try:
        image = read_grid(entry["image"])
    except BadInput as error:
        return [str(error)]
    if channels is not None and image.channels != channels:
        problems.append(f"{case}: the image has {image.channels} channel(s), the network takes {channels}")
    if patch_size is not None and len(image.shape) != len(patch_size):
        problems.append(
            f"{case}: the image has {len(image.shape)} spatial dimensions, "
            f"`patch_size` {list(patch_size)} has {len(patch_size)}"
        )
    dense = dense_names(targets)
    for key in ("label", *dense):
        if entry.get(key) is None:
            continue
        if not _is_path(entry[key]):
            problems.append(f"{case}: `{key}` is {entry[key]!r}; expected the path of a map")
            continue
        try:
            difference = grid_difference(image, read_grid(entry[key]))
        except BadInput as error:
            difference = None
            problems.append(str(error))
        if difference:
            problems.append(f"{case}: image and {key} are not on one grid: {difference} ({entry[key]})")
    for target in targets:
        value = entry.get(target["name"])
        if target["name"] in dense or value is None:
            continue
        try:
            check_number(target, value, image)
        except BadInput as error:
            problems.append(f"{case}: {error}")
    return problems + [f"{case}: {problem}" for problem in annotated_problems(entry, labels)]


def check_number(target: Mapping[str, Any], value: Any, image: Grid) -> None:
    """Check a case-level target's value.

    Args:
        target: its description.
        value: as in the entry.
        image: the grid of the case's image.

    Raises:
        BadInput: it is no number, or a length, area or volume that the image can't have.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isinf(value):
        raise BadInput(f"`{target['name']}` is {value!r}; expected a number (a {target['kind']} a case)", kind="value")
    doubt = number_doubt(target, value, image.shape, image.sides)
    if doubt:
        raise BadInput(doubt, kind="units")


def annotated_problems(entry: Mapping[str, Any], labels: Mapping[str, str] | None) -> list[str]:
    """What is wrong with the ids that an entry is ``annotated`` for."""
    problems = []
    if labels is not None and entry.get("annotated") is not None:
        unknown = [str(key) for key in entry["annotated"] if str(key) not in map(str, labels)]
        if unknown:
            problems.append(f"`annotated` names the ids {unknown}; `labels` has {list(labels)}")
        if entry.get("label") is not None and not any(str(key) != "0" for key in entry["annotated"]):
            problems.append(
                f"`annotated` is {entry['annotated']}, which names no structure; list the ids that the label "
                "speaks of, or leave `annotated` out where it speaks of all. A case without a label goes to `unlabeled`"
            )
    return problems


def check_output(folder: str | os.PathLike, key: str = "output_dir") -> Path:
    """Create an output folder, which the config calls ``key``, and prove that it can be written.

    Raises:
        BadInput: it is no path, or can't be created or written.
    """
    # Not even a whole number passes: what else the config does with the folder would fail on it.
    if not isinstance(folder, (str, os.PathLike)):
        raise BadInput(
            f"{key}: found {folder!r}, expected a path. The command line takes names such as 2024 and 1.10 for "
            "numbers; write ./ in front of the name, as in ./2024."
        )
    path = Path(os.path.expanduser(folder))
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe"):
            pass
    except OSError as error:
        raise BadInput(
            f"output folder {path} can't be written ({error.strerror}); set `{key}` to one that can"
        ) from error
    return path
