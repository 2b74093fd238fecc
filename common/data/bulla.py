"""The shape of a bulla, and its exact shares of the voxels of a grid.

A bulla is an air pocket in the lung with a thin wall. Each one here starts from a star-shaped lumen (an ellipsoid, some
deformed or lobulated); its wall is everything outside the lumen that is closer to it than the wall's thickness, so that
the thickness is a property of the construction and not a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

__all__ = ["Bulla", "box_between", "rasterize", "sphere_directions", "subvoxel_offsets", "voxel_centers"]

SURFACE_POINTS = 10000
LATTICE_STEP = 1.0  # mm; the distance field is smooth at this scale, a cubic spline brings it to the sub-voxels
SUBVOXEL_SIZE = 0.34  # mm; upper bound of a sub-voxel's edge
FEWEST_SUBVOXELS = 3  # along each axis of a voxel


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
        directions = sphere_directions(SURFACE_POINTS)
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


def sphere_directions(count: int) -> np.ndarray:
    """``count`` nearly evenly spread unit vectors (Fibonacci lattice), shape (count, 3)."""
    index = np.arange(count) + 0.5
    height = 1.0 - 2.0 * index / count
    angle = np.pi * (1.0 + 5.0**0.5) * index
    ring = np.sqrt(1.0 - height**2)
    return np.stack([ring * np.cos(angle), ring * np.sin(angle), height], axis=1)


def subvoxel_offsets(spacing: np.ndarray) -> np.ndarray:
    """Centres of the sub-voxels about a voxel's centre, mm, shape (n, 3); at least three along each axis."""
    counts = [max(FEWEST_SUBVOXELS, int(np.ceil(size / SUBVOXEL_SIZE))) for size in spacing]
    axes = [((np.arange(n) + 0.5) / n - 0.5) * size for n, size in zip(counts, spacing, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


def box_between(low: np.ndarray, high: np.ndarray, spacing: np.ndarray, shape: Sequence[int]) -> tuple[slice, ...]:
    """The voxels between two corners (mm), clipped to the volume."""
    first = np.clip(np.floor(low / spacing).astype(int), 0, shape)
    last = np.clip(np.ceil(high / spacing).astype(int), 0, shape)
    return tuple(slice(a, b) for a, b in zip(first, last, strict=True))


def voxel_centers(box: tuple[slice, ...], spacing: np.ndarray) -> np.ndarray:
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
    extent = bulla.radius(sphere_directions(SURFACE_POINTS)).max() + most + half_diagonal
    box = box_between(bulla.center - extent, bulla.center + extent, spacing, shape)
    centers = voxel_centers(box, spacing)
    points = centers.reshape(-1, 3)
    distance = field.distance(points)
    thickness = field.wall_thickness(points)

    lumen = (distance < 0).astype(float)
    wall = np.zeros_like(lumen)
    mixed = np.flatnonzero((distance > -half_diagonal) & (distance < most + half_diagonal))
    offsets = subvoxel_offsets(spacing)
    samples = (points[mixed, None] + offsets).reshape(-1, 3)
    distance = field.distance(samples).reshape(len(mixed), -1)
    limit = bulla.thickness if bulla.variation[0] == 0 else field.wall_thickness(samples).reshape(distance.shape)
    lumen[mixed] = (distance < 0).mean(axis=1)
    wall[mixed] = ((distance >= 0) & (distance <= limit)).mean(axis=1)
    grid = centers.shape[:3]
    return box, lumen.reshape(grid), wall.reshape(grid), thickness.reshape(grid)
