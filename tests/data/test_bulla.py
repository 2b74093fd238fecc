from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.data.bulla import Bulla, rasterize

SHAPE = (32, 32, 32)


def sphere(radius: float, thickness: float, center: float = 16.3, amplitude: float = 0.0) -> Bulla:
    return Bulla(
        center=np.full(3, center),
        axes=np.full(3, radius),
        rotation=np.eye(3),
        waves=np.zeros((0, 5)),
        lobes=np.zeros((0, 5)),
        thickness=thickness,
        variation=(amplitude, np.array([0.0, 0.0, 1.0])),
        wall_hu=0.0,
    )


def volume_of_sphere(radius: float) -> float:
    return 4 / 3 * np.pi * radius**3


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 2.5)])
@pytest.mark.parametrize("thickness", [0.7, 2.5])
def test_shares_of_a_sphere_sum_to_its_volume(spacing: tuple[float, ...], thickness: float) -> None:
    shape = [round(33 / size) for size in spacing]
    _, lumen, wall, nearby = rasterize(sphere(8.0, thickness), shape, spacing)
    voxel = np.prod(spacing)
    assert lumen.sum() * voxel == pytest.approx(volume_of_sphere(8.0), rel=0.005)
    assert wall.sum() * voxel == pytest.approx(volume_of_sphere(8.0 + thickness) - volume_of_sphere(8.0), rel=0.01)
    assert (lumen + wall).max() <= 1 + 1e-9
    np.testing.assert_allclose(nearby, thickness)


def test_varying_thickness_follows_its_direction() -> None:
    box, _, wall, nearby = rasterize(sphere(8.0, 2.0, amplitude=0.3), SHAPE, (1, 1, 1))
    axes = [np.arange(part.start, part.stop) + 0.5 - 16.3 for part in box]
    offset = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    cosine = offset[..., 2] / np.linalg.norm(offset, axis=-1)
    inside = wall > 0.5
    np.testing.assert_allclose(nearby[inside], 2.0 * (1 + 0.3 * cosine[inside]), atol=0.03)
    # The wall is as thick as it says: along +z it ends at 8 + 2.6 mm, along -z at 8 + 1.4 mm.
    column = wall[wall.shape[0] // 2, wall.shape[1] // 2]
    above = offset[0, 0, :, 2] > 0
    assert column[above].sum() == pytest.approx(2.6, abs=0.15)
    assert column[~above].sum() == pytest.approx(1.4, abs=0.15)


def test_offset_wall_of_an_ellipsoid_has_constant_thickness() -> None:
    long = replace(sphere(6.0, 2.0), axes=np.array([9.0, 6.0, 5.0]))
    _, lumen, wall, _ = rasterize(long, SHAPE, (1, 1, 1))
    # Steiner: the volume within t of a convex body, with the ellipsoid's surface by Thomsen's approximation (1 %).
    p = 1.6075
    a, b, c = 9.0**p, 6.0**p, 5.0**p
    surface = 4 * np.pi * ((a * b + a * c + b * c) / 3) ** (1 / p)
    mean_radius = 6.55
    expected = surface * 2.0 + 4 * np.pi * mean_radius * 2.0**2 + volume_of_sphere(2.0)
    assert lumen.sum() == pytest.approx(4 / 3 * np.pi * 9 * 6 * 5, rel=0.005)
    assert wall.sum() == pytest.approx(expected, rel=0.03)


def test_partial_volume_dims_a_thin_wall() -> None:
    _, _, thin, _ = rasterize(sphere(9.0, 0.7), SHAPE, (1, 1, 1))
    _, _, thick, _ = rasterize(sphere(9.0, 3.0), SHAPE, (1, 1, 1))
    assert thin.max() < 0.95
    assert thick.max() == 1.0
