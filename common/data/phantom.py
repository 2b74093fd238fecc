"""Bulla phantoms: small lung-like CT volumes whose segmentation and wall thickness are known exactly.

A bulla is an air pocket in the lung with a thin wall. Each one here starts from a star-shaped lumen (an ellipsoid, some
deformed or lobulated); its wall is everything outside the lumen that is closer to it than the wall's thickness, so that
the thickness is a property of the construction and not a measurement. Intensities are averages over sub-voxels, as
a scanner makes them: a wall thinner than a voxel shows as a faint line, and can be measured only from its contrast.

Everything is drawn from ``(seed, section, case number)``: the same arguments give the same arrays, and asking for more
cases doesn't change the earlier ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree
from tqdm import tqdm

from ..errors import BadInput
from ..files import intended_name, write_atomically, write_nifti

__all__ = [
    "LABELED_DOMAIN",
    "SHIFTED_DOMAIN",
    "Bulla",
    "Domain",
    "Phantom",
    "add_arguments",
    "generate_phantoms",
    "main",
    "make_phantom",
    "rasterize",
]

DATASET_NAME = "bulla_phantom"
LUMEN, WALL = 1, 2
LABELS = {"0": "background", "1": "lumen", "2": "wall"}
FOLDERS = ("images", "labels", "thickness")
FILE_PREFIX = "phantom_"
LUNG_HU, LUMEN_HU = -850.0, -990.0
WALL_HU_RANGE = (-100.0, 50.0)
THICKNESS_RANGE = (0.7, 4.0)
SURFACE_POINTS = 10000
LATTICE_STEP = 1.0  # mm; the distance field is smooth at this scale, a cubic spline brings it to the sub-voxels
SUBVOXEL_SIZE = 0.34  # mm; upper bound of a sub-voxel's edge
FEWEST_SUBVOXELS = 3  # along each axis of a voxel


@dataclass(frozen=True)
class Domain:
    """How a scanner and its patients look: what differs between the labelled and the unlabelled cases.

    Args:
        noise: standard deviation of the noise, HU.
        blur: standard deviation of the reconstruction kernel, mm.
        offset: added to every intensity, HU.
        scale: contrast, a factor about the lung's -850 HU.
        vessels: density of the vessel trees, 1 is usual.
    """

    noise: float = 20.0
    blur: float = 0.4
    offset: float = 0.0
    scale: float = 1.0
    vessels: float = 1.0


LABELED_DOMAIN = Domain()
SHIFTED_DOMAIN = Domain(noise=45.0, blur=0.8, offset=-25.0, scale=0.9, vessels=2.0)


@dataclass(frozen=True)
class Bulla:
    """One bulla; its lumen is star-shaped about ``center``.

    Args:
        center: in mm, from the corner of the first voxel.
        axes: the half-axes of the ellipsoid it starts from, mm.
        rotation: (3, 3) matrix that takes directions to the ellipsoid's frame.
        waves: smooth deformation, (n, 5) rows of (amplitude, phase, wave vector), a part of the radius each.
        lobes: lobulation, (n, 5) rows of (amplitude, sharpness, direction), a part of the radius each.
        thickness: of the wall, mm; its mean over the surface where it varies.
        variation: (amplitude, direction): thickness * (1 + amplitude * cos(angle to the direction)); 0 is constant.
        wall_hu: intensity of the wall, HU.
    """

    center: np.ndarray
    axes: np.ndarray
    rotation: np.ndarray
    waves: np.ndarray
    lobes: np.ndarray
    thickness: float
    variation: tuple[float, np.ndarray]
    wall_hu: float

    def radius(self, directions: np.ndarray) -> np.ndarray:
        """The lumen's radius in mm along unit ``directions`` of shape (n, 3)."""
        factor = np.ones(len(directions))
        for amplitude, phase, *vector in self.waves:
            factor += amplitude * np.cos(directions @ np.asarray(vector) + phase)
        for amplitude, sharpness, *direction in self.lobes:
            factor += amplitude * np.exp(sharpness * (directions @ np.asarray(direction) - 1.0))
        return factor / np.linalg.norm(directions @ self.rotation.T / self.axes, axis=1)

    def wall_thickness(self, directions: np.ndarray) -> np.ndarray:
        """The wall's thickness in mm where the lumen's surface lies along unit ``directions`` of shape (n, 3)."""
        amplitude, axis = self.variation
        return self.thickness * (1.0 + amplitude * (directions @ axis))

    def surface(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points of the lumen's surface (n, 3) about the centre in mm, outward normals (n, 3), thickness (n,)."""
        directions = _sphere_directions(SURFACE_POINTS)
        points = directions * self.radius(directions)[:, None]
        step = 1e-3
        normals = np.empty_like(points)
        for axis in range(3):
            shift = np.zeros(3)
            shift[axis] = step
            normals[:, axis] = (self._level(points + shift) - self._level(points - shift)) / (2 * step)
        normals /= np.linalg.norm(normals, axis=1, keepdims=True)
        return points, normals, self.wall_thickness(directions)

    def _level(self, points: np.ndarray) -> np.ndarray:
        lengths = np.linalg.norm(points, axis=1)
        return lengths - self.radius(points / lengths[:, None])


@dataclass(frozen=True)
class Phantom:
    """A phantom with its truth.

    Args:
        image: int16, HU, shape (x, y, z).
        label: uint8, 0 background, 1 lumen, 2 wall.
        thickness: float32, the wall's thickness in mm at wall voxels, 0 elsewhere.
        volume: of all bullae, lumen and wall together, mL; from the sub-voxels, not from the label.
        bullae: what was drawn.
    """

    image: np.ndarray
    label: np.ndarray
    thickness: np.ndarray
    volume: float
    bullae: tuple[Bulla, ...]


def _sphere_directions(count: int) -> np.ndarray:
    """``count`` nearly evenly spread unit vectors (Fibonacci lattice), shape (count, 3)."""
    index = np.arange(count) + 0.5
    height = 1.0 - 2.0 * index / count
    angle = np.pi * (1.0 + 5.0**0.5) * index
    ring = np.sqrt(1.0 - height**2)
    return np.stack([ring * np.cos(angle), ring * np.sin(angle), height], axis=1)


def _random_direction(rng: np.random.Generator) -> np.ndarray:
    vector = rng.normal(size=3)
    return vector / np.linalg.norm(vector)


def _random_rotation(rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(3, 3)))[0]


def _subvoxel_offsets(spacing: np.ndarray) -> np.ndarray:
    """Centres of the sub-voxels about a voxel's centre, mm, shape (n, 3); at least three along each axis."""
    counts = [max(FEWEST_SUBVOXELS, int(np.ceil(size / SUBVOXEL_SIZE))) for size in spacing]
    axes = [((np.arange(n) + 0.5) / n - 0.5) * size for n, size in zip(counts, spacing, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def _box(low: np.ndarray, high: np.ndarray, spacing: np.ndarray, shape: Sequence[int]) -> tuple[slice, ...]:
    """The voxels between two corners (mm), clipped to the volume."""
    first = np.clip(np.floor(low / spacing).astype(int), 0, shape)
    last = np.clip(np.ceil(high / spacing).astype(int), 0, shape)
    return tuple(slice(a, b) for a, b in zip(first, last, strict=True))


def _centers(box: tuple[slice, ...], spacing: np.ndarray) -> np.ndarray:
    """Voxel centres of a box, mm, shape (*box, 3)."""
    axes = [(np.arange(part.start, part.stop) + 0.5) * size for part, size in zip(box, spacing, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


@dataclass(frozen=True)
class _DistanceField:
    """Signed distance to a lumen's surface and the wall's thickness at the nearest surface point, on a lattice."""

    low: np.ndarray
    spline: np.ndarray
    thickness: np.ndarray

    @classmethod
    def of(cls, bulla: Bulla, reach: float) -> _DistanceField:
        points, normals, thickness = bulla.surface()
        points = points + bulla.center
        low = points.min(axis=0) - reach - LATTICE_STEP
        counts = np.ceil((points.max(axis=0) + reach + LATTICE_STEP - low) / LATTICE_STEP).astype(int) + 1
        axes = [start + LATTICE_STEP * np.arange(count) for start, count in zip(low, counts, strict=True)]
        lattice = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
        nearest = cKDTree(points).query(lattice.reshape(-1, 3))[1]
        # Distance to the tangent plane of the nearest sample: exact to second order in the gap between samples.
        distance = np.einsum("ij,ij->i", lattice.reshape(-1, 3) - points[nearest], normals[nearest])
        spline = ndimage.spline_filter(distance.reshape(counts), order=3, mode="nearest")
        return cls(low, spline, thickness[nearest].reshape(counts))

    def distance(self, points: np.ndarray) -> np.ndarray:
        where = (points - self.low).T / LATTICE_STEP
        return ndimage.map_coordinates(self.spline, where, order=3, mode="nearest", prefilter=False)

    def wall_thickness(self, points: np.ndarray) -> np.ndarray:
        where = (points - self.low).T / LATTICE_STEP
        return ndimage.map_coordinates(self.thickness, where, order=1, mode="nearest")


def rasterize(
    bulla: Bulla, shape: Sequence[int], spacing: Sequence[float] | np.ndarray
) -> tuple[tuple[slice, ...], np.ndarray, np.ndarray, np.ndarray]:
    """Bring a bulla to a voxel grid.

    Args:
        bulla: what to draw.
        shape: of the volume, voxels.
        spacing: mm.

    Returns:
        The box of voxels that it may touch, and inside that box three arrays: the share of each voxel that is lumen,
        the share that is wall, and the wall's thickness (mm) at the lumen surface nearest to each voxel's centre.
    """
    spacing = np.asarray(spacing, dtype=float)
    half_diagonal = float(np.linalg.norm(spacing)) / 2
    most = bulla.thickness * (1 + abs(bulla.variation[0]))
    field = _DistanceField.of(bulla, reach=most + 2 * half_diagonal)
    extent = bulla.radius(_sphere_directions(SURFACE_POINTS)).max() + most + half_diagonal
    box = _box(bulla.center - extent, bulla.center + extent, spacing, shape)
    centers = _centers(box, spacing)
    points = centers.reshape(-1, 3)
    distance = field.distance(points)
    thickness = field.wall_thickness(points)

    lumen = (distance < 0).astype(float)
    wall = np.zeros_like(lumen)
    mixed = np.flatnonzero((distance > -half_diagonal) & (distance < most + half_diagonal))
    offsets = _subvoxel_offsets(spacing)
    samples = (points[mixed, None] + offsets).reshape(-1, 3)
    distance = field.distance(samples).reshape(len(mixed), -1)
    limit = bulla.thickness if bulla.variation[0] == 0 else field.wall_thickness(samples).reshape(distance.shape)
    lumen[mixed] = (distance < 0).mean(axis=1)
    wall[mixed] = ((distance >= 0) & (distance <= limit)).mean(axis=1)
    grid = centers.shape[:3]
    return box, lumen.reshape(grid), wall.reshape(grid), thickness.reshape(grid)


def _draw_bulla(rng: np.random.Generator, extent: np.ndarray) -> Bulla:
    size = min(rng.uniform(0.12, 0.22) * float(extent.min()), 14.0)
    axes = size * rng.uniform(0.75, 1.25, size=3)
    kind = rng.choice(["ellipsoid", "deformed", "lobulated"], p=[0.4, 0.35, 0.25])
    waves, lobes = np.zeros((0, 5)), np.zeros((0, 5))
    if kind == "deformed":
        waves = np.array(
            [[rng.uniform(0.03, 0.08), rng.uniform(0, 2 * np.pi), *(2.5 * _random_direction(rng))] for _ in range(3)]
        )
    elif kind == "lobulated":
        lobes = np.array(
            [[rng.uniform(0.25, 0.45), 6.0, *_random_direction(rng)] for _ in range(int(rng.integers(2, 4)))]
        )
    thinnest, thickest = THICKNESS_RANGE[0], max(min(THICKNESS_RANGE[1], 0.55 * size), THICKNESS_RANGE[0])
    amplitude = rng.uniform(0.1, 0.35) if rng.random() < 0.4 else 0.0
    # The mean leaves room for the variation, so that no place of the wall leaves the range.
    low, high = thinnest / (1 - amplitude), thickest / (1 + amplitude)
    if low > high:
        amplitude, low, high = 0.0, thinnest, thickest
    thickness = rng.uniform(low, high)
    return Bulla(
        center=np.zeros(3),
        axes=axes,
        rotation=_random_rotation(rng),
        waves=waves,
        lobes=lobes,
        thickness=float(thickness),
        variation=(float(amplitude), _random_direction(rng)),
        wall_hu=float(rng.uniform(*WALL_HU_RANGE)),
    )


def _place_bullae(
    rng: np.random.Generator, shape: Sequence[int], spacing: np.ndarray, lung_start: float
) -> tuple[Bulla, ...]:
    """Draw bullae whose bounding spheres, walls included, neither meet nor leave the lung."""
    extent = np.asarray(shape) * spacing
    wanted = int(rng.integers(2, 6))
    gap = 1.5 * float(spacing.max())
    placed: list[Bulla] = []
    bounds: list[float] = []
    directions = _sphere_directions(500)
    for _ in range(300):
        if len(placed) == wanted:
            break
        bulla = _draw_bulla(rng, extent - np.array([lung_start, 0.0, 0.0]))
        bound = float(bulla.radius(directions).max()) * 1.02 + bulla.thickness * (1 + bulla.variation[0])
        low = np.full(3, bound) + gap + np.array([lung_start, 0.0, 0.0])
        high = extent - bound - gap
        narrow = bulla.axes.min() < max(
            1.5 * spacing.min(), 0.75 * spacing.max()
        )  # its lumen would fall between voxels
        if narrow or (low >= high).any():
            continue
        center = rng.uniform(low, high)
        if all(
            np.linalg.norm(center - other.center) > bound + other_bound + gap
            for other, other_bound in zip(placed, bounds, strict=True)
        ):
            placed.append(replace(bulla, center=center))
            bounds.append(bound)
    if not placed:
        raise BadInput(
            f"phantom: no bulla fits into shape {tuple(shape)} with spacing {tuple(spacing.tolist())} mm "
            f"({np.round(extent, 1).tolist()} mm). Ask for a larger shape: 24 mm or more along each axis, "
            "and 16 voxels or more."
        )
    return tuple(placed)


def _vessel_segments(
    rng: np.random.Generator, extent: np.ndarray, density: float
) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """Branching trees as straight tubes: (start, end, radius) in mm."""
    segments: list[tuple[np.ndarray, np.ndarray, float]] = []

    def grow(start: np.ndarray, direction: np.ndarray, radius: float) -> None:
        if radius < 0.4 or (start < 0).any() or (start > extent).any():
            return
        end = start + direction * radius * rng.uniform(5.0, 9.0)
        segments.append((start, end, radius))
        for _ in range(2):
            branch = direction + 0.6 * _random_direction(rng)
            grow(end, branch / np.linalg.norm(branch), radius * rng.uniform(0.65, 0.85))

    for _ in range(max(1, round(density * rng.uniform(1.5, 3.5)))):
        start = rng.uniform(0, extent)
        axis = int(rng.integers(3))
        start[axis] = 0.0 if rng.random() < 0.5 else extent[axis]
        inward = extent / 2 - start + rng.normal(scale=extent / 6)
        grow(start, inward / np.linalg.norm(inward), float(rng.uniform(1.2, 2.2)))
    return segments


def _vessel_share(
    segments: list[tuple[np.ndarray, np.ndarray, float]], shape: Sequence[int], spacing: np.ndarray
) -> np.ndarray:
    """The share of each voxel that is vessel."""
    share = np.zeros(shape)
    offsets = _subvoxel_offsets(spacing)
    half_diagonal = float(np.linalg.norm(spacing)) / 2
    for start, end, radius in segments:
        reach = radius + half_diagonal
        box = _box(np.minimum(start, end) - reach, np.maximum(start, end) + reach, spacing, shape)
        centers = _centers(box, spacing)
        if centers.size == 0:
            continue
        points = centers.reshape(-1, 3)
        near = np.flatnonzero(_distance_to_segment(points, start, end) < reach)
        samples = (points[near, None] + offsets).reshape(-1, 3)
        covered = (_distance_to_segment(samples, start, end) < radius).reshape(len(near), -1).mean(axis=1)
        part = np.zeros(len(points))
        part[near] = covered
        np.maximum(share[box], part.reshape(centers.shape[:3]), out=share[box])
    return share


def _distance_to_segment(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    axis = end - start
    along = np.clip((points - start) @ axis / (axis @ axis), 0.0, 1.0)
    return np.linalg.norm(points - start - along[:, None] * axis, axis=1)


def _smooth_noise(rng: np.random.Generator, shape: Sequence[int], sigma: np.ndarray) -> np.ndarray:
    """Gaussian noise of standard deviation 1 and correlation length ``sigma`` (voxels)."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), sigma, mode="wrap")
    return noise / max(float(noise.std()), 1e-12)


def _background(
    rng: np.random.Generator, shape: Sequence[int], spacing: np.ndarray, domain: Domain, chest_wall: float
) -> np.ndarray:
    """Lung parenchyma with vessels and, below ``chest_wall`` mm along the first axis, soft tissue; HU."""
    extent = np.asarray(shape) * spacing
    image = LUNG_HU + 25.0 * _smooth_noise(rng, shape, 1.5 / spacing)
    # Blood and tissue weigh on the lower lung: it is a little denser.
    image += np.linspace(-20.0, 20.0, shape[1])[None, :, None]
    share = _vessel_share(_vessel_segments(rng, extent, domain.vessels), shape, spacing)
    image = image * (1 - share) + float(rng.uniform(0.0, 50.0)) * share
    if chest_wall > 0:
        centers = _centers(tuple(slice(0, n) for n in shape), spacing)
        off_axis = ((centers[..., 1:] - extent[1:] / 2) / extent[1:]) ** 2
        surface = chest_wall * (0.6 + 0.8 * off_axis.sum(axis=-1))
        tissue = np.clip(0.5 + (surface - centers[..., 0]) / spacing[0], 0.0, 1.0)
        image = image * (1 - tissue) + 40.0 * tissue
    return image


def _label(lumen: np.ndarray, wall: np.ndarray) -> np.ndarray:
    """Labels from shares of voxels.

    Lumen where it fills half a voxel or more. Wall where it does, and beside every lumen voxel that would otherwise
    touch the background by a face: so also a wall thinner than a voxel is a closed shell, and a thick one unbiased.
    """
    label = np.zeros(lumen.shape, dtype=np.uint8)
    is_lumen = lumen >= 0.5
    label[(wall >= 0.5) | ndimage.binary_dilation(is_lumen)] = WALL
    label[is_lumen] = LUMEN
    return label


def make_phantom(
    shape: Sequence[int] = (48, 48, 48),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    seed: int | Sequence[int] = 0,
    domain: Domain = LABELED_DOMAIN,
) -> Phantom:
    """Draw one case.

    Args:
        shape: of the volume, voxels (x, y, z).
        spacing: mm.
        seed: a number, or several that together seed the case.
        domain: how scanner and patient look.

    Raises:
        BadInput: the volume is too small for a bulla.
    """
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in shape)
    sizes = np.asarray(spacing, dtype=float)
    if len(shape) != 3 or sizes.shape != (3,) or min(shape) < 1 or (sizes <= 0).any():
        raise BadInput(
            f"phantom: shape {shape} and spacing {tuple(np.ravel(spacing).tolist())}: expected three positive numbers "
            "each, like --shape 48 48 48 --spacing 1 1 1."
        )
    chest_wall = float(rng.uniform(0.05, 0.1) * shape[0] * sizes[0]) if rng.random() < 0.5 else 0.0
    bullae = _place_bullae(rng, shape, sizes, lung_start=1.1 * chest_wall)
    image = _background(rng, shape, sizes, domain, chest_wall)
    lumen, wall, thickness = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=np.float32)
    label = np.zeros(shape, dtype=np.uint8)
    for bulla in bullae:
        box, lumen_share, wall_share, nearby = rasterize(bulla, shape, sizes)
        image[box] *= 1 - lumen_share - wall_share
        image[box] += LUMEN_HU * lumen_share + bulla.wall_hu * wall_share
        lumen[box] += lumen_share
        wall[box] += wall_share
        own = _label(lumen_share, wall_share)
        np.maximum(label[box], own, out=label[box])
        thickness[box] = np.where(own == WALL, nearby, thickness[box])
    image = ndimage.gaussian_filter(image, domain.blur / sizes)
    image = LUNG_HU + domain.scale * (image - LUNG_HU) + domain.offset
    image += domain.noise * rng.uniform(0.8, 1.2) * _smooth_noise(rng, shape, 0.5 * domain.blur / sizes)
    return Phantom(
        image=np.clip(np.rint(image), -1024, 3071).astype(np.int16),
        label=label,
        thickness=thickness,
        volume=float((lumen + wall).sum() * np.prod(sizes) / 1000.0),
        bullae=bullae,
    )


def _clear(output: Path) -> None:
    """Make room for new phantoms: remove those of an earlier run, refuse anything else."""
    if not output.exists():
        return
    if not output.is_dir():
        raise BadInput(f"{output}: is a file, expected a folder for the phantoms. Choose another --output.")
    files = [path for path in sorted(output.rglob("*")) if not path.is_dir()]
    for path in files:
        in_folder = path.parent.parent == output and path.parent.name in FOLDERS
        name = intended_name(path.name)
        if in_folder and name.startswith(FILE_PREFIX) and name.endswith(".nii.gz"):
            continue
        if path.parent == output and name == "datalist.json" and (name != path.name or _is_own_datalist(path)):
            continue
        raise BadInput(
            f"{output}: not empty, and {path.relative_to(output)} was not written by this command. Nothing was "
            "touched. Choose a new or empty folder."
        )
    for path in files:
        path.unlink()


def _is_own_datalist(path: Path) -> bool:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return False
    return isinstance(content, dict) and content.get("name") == DATASET_NAME


def _affine(shape: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -0.5 * (np.asarray(shape) - 1) * np.asarray(spacing)
    return affine


def _write(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    write_nifti(path, image)


def generate_phantoms(
    output: str | Path,
    labeled: int = 6,
    unlabeled: int = 16,
    validation: int = 6,
    shape: Sequence[int] = (48, 48, 48),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write a data set of phantoms with its ``datalist.json``.

    Labelled cases come from :data:`LABELED_DOMAIN`, unlabelled ones from :data:`SHIFTED_DOMAIN` (noisier, blurrier,
    fainter, more vessels), validation cases from both in turn, so that what the unlabelled volumes teach can be seen.

    Args:
        output: folder; new, empty, or holding phantoms of an earlier run, which are replaced.
        labeled: how many cases with label, thickness map and volume.
        unlabeled: how many images without any truth on disk.
        validation: how many validation cases.
        shape: of each volume, voxels.
        spacing: mm.
        seed: of everything drawn.
        progress: show a bar over the cases.

    Returns:
        The datalist's path.

    Raises:
        BadInput: the folder holds something else, a count is negative, or the volume is too small for a bulla.
    """
    counts = {"training": labeled, "unlabeled": unlabeled, "validation": validation}
    for section, count in counts.items():
        if count < 0:
            raise BadInput(f"phantom: {count} cases asked for {section}, expected 0 or more.")
    output = Path(output)
    _clear(output)
    sections: dict[str, list[dict[str, object]]] = {section: [] for section in counts}
    affine = _affine(shape, spacing)
    thickness_sum, thickness_count = 0.0, 0
    cases = [(name, index) for name, count in counts.items() for index in range(count)]
    for section, index in tqdm(cases, desc="phantoms", unit="case", disable=None if progress else True):
        shifted = section == "unlabeled" or (section == "validation" and index % 2 == 1)
        domain = SHIFTED_DOMAIN if shifted else LABELED_DOMAIN
        case = make_phantom(shape, spacing, seed=(seed, list(counts).index(section), index), domain=domain)
        name = f"{FILE_PREFIX}{section}_{index:03d}.nii.gz"
        entry: dict[str, object] = {"image": f"images/{name}", "domain": "shifted" if shifted else "labeled"}
        _write(case.image, affine, output / "images" / name)
        if section != "unlabeled":
            _write(case.label, affine, output / "labels" / name)
            _write(case.thickness, affine, output / "thickness" / name)
            entry |= {
                "label": f"labels/{name}",
                "thickness": f"thickness/{name}",
                "volume": round(case.volume, 6),
            }
        if section == "training":
            values = case.thickness[case.label == WALL]
            thickness_sum, thickness_count = thickness_sum + float(values.sum()), thickness_count + values.size
        sections[section].append(entry)
    datalist = {
        "name": DATASET_NAME,
        "description": "Synthetic lung bullae; thickness in mm at wall voxels, volume in mL of lumen and wall.",
        "modality": {"0": "CT"},
        "labels": LABELS,
        "targets": [
            {
                "name": "thickness",
                "unit": "mm",
                "kind": "dense",
                "structure": WALL,
                "missing": 0,
                "scale": round(thickness_sum / thickness_count, 2) if thickness_count else 1.0,
                "inner": [1],
            }
        ],
        **sections,
    }
    path = output / "datalist.json"
    write_atomically(path, json.dumps(datalist, indent=1) + "\n")
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m common phantom``."""
    parser.add_argument("--output", required=True, help="folder for the volumes and their datalist.json")
    parser.add_argument("--labeled", type=int, default=6, help="cases with label, thickness and volume")
    parser.add_argument("--unlabeled", type=int, default=16, help="images without any truth")
    parser.add_argument("--validation", type=int, default=6, help="validation cases")
    parser.add_argument("--shape", type=int, nargs=3, default=(48, 48, 48), metavar="N", help="voxels along x, y, z")
    parser.add_argument("--spacing", type=float, nargs=3, default=(1.0, 1.0, 1.0), metavar="MM", help="voxel size")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same volumes")


def main(args: argparse.Namespace) -> int:
    """Run ``python -m common phantom``; returns the exit code."""
    path = generate_phantoms(
        args.output,
        labeled=args.labeled,
        unlabeled=args.unlabeled,
        validation=args.validation,
        shape=args.shape,
        spacing=args.spacing,
        seed=args.seed,
    )
    print(f"{args.labeled + args.unlabeled + args.validation} phantoms: {path}")
    return 0
