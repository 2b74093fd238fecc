"""Bulla phantoms: small lung-like CT volumes whose segmentation and wall thickness are known exactly.

Intensities are averages over sub-voxels, as a scanner makes them: a wall thinner than a voxel shows as a faint line,
and can be measured only from its contrast. The same arguments give the same arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from ..errors import BadInput
from .bulla import Bulla, box_between, rasterize, sphere_directions, subvoxel_offsets, voxel_centers

__all__ = ["LABELED_DOMAIN", "LUMEN", "SHIFTED_DOMAIN", "WALL", "Domain", "Phantom", "make_phantom"]

LUMEN, WALL = 1, 2
LUNG_HU, LUMEN_HU = -850.0, -990.0
WALL_HU_RANGE = (-100.0, 50.0)
THICKNESS_RANGE = (0.7, 4.0)


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


def _random_direction(rng: np.random.Generator) -> np.ndarray:
    vector = rng.normal(size=3)
    return vector / np.linalg.norm(vector)


def _random_rotation(rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(3, 3)))[0]


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
    directions = sphere_directions(500)
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
    offsets = subvoxel_offsets(spacing)
    half_diagonal = float(np.linalg.norm(spacing)) / 2
    for start, end, radius in segments:
        reach = radius + half_diagonal
        box = box_between(np.minimum(start, end) - reach, np.maximum(start, end) + reach, spacing, shape)
        centers = voxel_centers(box, spacing)
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
        centers = voxel_centers(tuple(slice(0, n) for n in shape), spacing)
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
