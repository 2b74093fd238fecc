"""Where a file's voxels are, from its header alone, and what is wrong with headers and DICOM series."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np

from ..errors import BadInput

__all__ = [
    "PICTURE",
    "VOLUME_SUFFIXES",
    "Grid",
    "PathOrPaths",
    "check_right_angles",
    "describe_error",
    "dicom_files",
    "dicom_patient",
    "grid_difference",
    "is_nifti",
    "is_picture",
    "plane_affine",
    "read_grid",
]

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
PICTURE = (
    "{} is a picture, which doesn't tell the size of its pixels in mm; save it as a NIfTI file of two dimensions with "
    "its pixel size"
)
_GRID_TOLERANCE = 0.1  # of a voxel: headers round, so two files of one grid seldom agree to the last digit
_SHEAR = 0.01  # cosine of the angle between two axes: 0.6 degrees change a volume by 0.005 %
_LEAN = 0.002  # mm a mm, or of a cosine: what rounding comes to; a gantry that is tilted by 0.5 degrees gives 0.009
_ONE_PLACE = 0.001  # mm
_VOXEL_SIZE_TOLERANCE = 0.01  # of a voxel's side: what headers round, or what rotating the axes costs
_LENGTH_UNITS = {1: "metres", 3: "micrometres"}  # NIfTI's `xyzt_units`; 2 is mm, and 0 says nothing
_DEFLATE = 1032  # the most that gzip shrinks anything (Deutsch, RFC 1951, 1996)

PathOrPaths = str | os.PathLike | Sequence[str | os.PathLike]


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
    unit = _LENGTH_UNITS.get(int(image.header["xyzt_units"]) & 7) if "xyzt_units" in image.header else None
    if unit is not None:
        raise BadInput(
            f"{path}: its header gives lengths in {unit}, expected mm; write its affine and voxel size in mm, with the "
            "unit mm, or correct the unit if that is what is wrong",
            kind="affine",
        )
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


def plane_affine(affine: np.ndarray) -> np.ndarray:
    """A 2D image's affine of two axes: with a file's three, MONAI takes it for a volume here and there.

    Args:
        affine: (4, 4), voxel index to RAS millimetres; one that is (3, 3) already is returned as it is.
    """
    if affine.shape == (3, 3):
        return affine
    flat = np.eye(3)
    flat[:2, :2], flat[:2, 2] = affine[:2, :2], affine[:2, 3]
    sides = np.linalg.norm(affine[:3, :2], axis=0)
    if not np.allclose(np.linalg.norm(flat[:2, :2], axis=0), sides, rtol=1e-6):
        # A tilted slice, of which the first two axes see a shadow: pixels have the sides that they have in space, and
        # lie as is nearest to the shadow. A sagittal or coronal one's is a line, which says nothing.
        left, lengths, right = np.linalg.svd(flat[:2, :2] / np.where(sides == 0, 1, sides))
        flat[:2, :2] = (left @ right if lengths[1] > 1e-3 else np.eye(2)) * sides
    return flat


def grid_difference(one: Grid, other: Grid) -> str | None:
    """How two grids differ, as words for a message; None when they are the same to a tenth of a voxel."""
    if one.shape != other.shape:
        return f"their shapes differ: {list(one.shape)} and {list(other.shape)}"
    rank = len(one.shape)
    extent = np.asarray(one.shape, dtype=float) - 1
    corners = np.stack(np.meshgrid(*[(0.0, size) for size in extent], indexing="ij"), axis=-1).reshape(-1, rank)
    affines = [plane_affine(grid.affine) if rank == 2 else grid.affine for grid in (one, other)]
    placed = [corners @ affine[:rank, :rank].T + affine[:rank, -1] for affine in affines]
    apart = float(np.linalg.norm(placed[0] - placed[1], axis=1).max())
    spacing = np.linalg.norm(affines[0][:rank, :rank], axis=0)
    if apart <= _GRID_TOLERANCE * float(spacing.min()):
        return None
    return f"their corners lie up to {apart:.3g} mm apart (origin, spacing or orientation differs)"
