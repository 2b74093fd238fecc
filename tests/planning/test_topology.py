from __future__ import annotations

import math

import numpy as np
import pytest

from common.errors import BadInput
from common.planning import (
    Topology,
    estimate_feature_maps,
    parse_memory,
    plan_features,
    plan_patch,
    plan_spacing,
    plan_topology,
)


@pytest.mark.parametrize(
    ("spacing", "median", "outputs", "cases", "patch", "batch"),
    [
        # What nnU-Net plans for the Medical Segmentation Decathlon and ACDC, axes in the order x, y, z.
        ((1, 1, 1), (140, 171, 137), 4, 484, (128, 128, 128), 2),
        ((1, 1, 1), (35, 50, 36), 3, 260, (40, 56, 40), 9),
        ((1.25, 1.25, 1.37), (320, 232, 115), 2, 20, (192, 160, 80), 2),
        ((0.625, 0.625, 3.6), (319, 320, 20), 3, 32, (256, 320, 20), 2),
        ((0.8, 0.8, 1.5), (512, 512, 150), 3, 303, (192, 192, 64), 2),
        ((0.793, 0.793, 1.6), (512, 512, 187), 2, 41, (160, 192, 64), 2),
        ((1.5625, 1.5625, 5), (208, 237, 18), 4, 200, (224, 256, 20), 4),
    ],
)
def test_published_plans(
    spacing: tuple[float, ...],
    median: tuple[int, ...],
    outputs: int,
    cases: int,
    patch: tuple[int, ...],
    batch: int,
) -> None:
    topology, batch_size = plan_patch(spacing, median, cases * math.prod(median), outputs)
    assert (topology.patch_size, batch_size) == (patch, batch)


def test_two_dimensions() -> None:
    topology, batch_size = plan_patch((0.8, 0.8), (512, 512), 1e10, outputs=2)
    assert topology.patch_size == (512, 512)
    assert topology.strides == ((1, 1), *[(2, 2)] * 7)
    assert batch_size == 12


def test_topology_of_thick_slices() -> None:
    topology = plan_topology((1.5, 1.5, 10), (160, 150, 10))
    assert topology.patch_size == (160, 160, 10)
    # 1.5 -> 3 -> 6 mm: only then is 10 mm within a factor of two, for kernels and poolings alike.
    assert topology.kernel_sizes == ((3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert topology.strides == ((1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 1), (2, 2, 1))
    assert topology.divisor == (32, 32, 2)


def test_topology_keeps_four_voxels_and_pads() -> None:
    topology = plan_topology((1, 1, 1), (36, 50, 35))
    assert topology.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    assert topology.patch_size == (40, 56, 40)
    assert plan_topology((1, 1, 1), (7, 7, 7)).strides == ((1, 1, 1),)
    # An axis alone is pooled with twelve voxels, not with eight.
    assert plan_topology((1, 1, 1), (11, 4, 4)).strides == ((1, 1, 1),)
    assert plan_topology((1, 1, 1), (12, 4, 4)).strides == ((1, 1, 1), (2, 1, 1))


def test_axis_order_does_not_matter() -> None:
    one, _ = plan_patch((0.7, 0.7, 4), (300, 260, 30), 1e12, outputs=3)
    other, _ = plan_patch((4, 0.7, 0.7), (30, 300, 260), 1e12, outputs=3)
    assert other.patch_size == (one.patch_size[2], *one.patch_size[:2])
    assert other.strides == tuple((z, x, y) for x, y, z in one.strides)
    assert other.kernel_sizes == tuple((z, x, y) for x, y, z in one.kernel_sizes)


def test_feature_maps_by_hand() -> None:
    topology = Topology(strides=((1, 1), (2, 2)), kernel_sizes=((3, 3), (3, 3)), patch_size=(8, 8))
    # Down: 2 x 4 x 64 + 2 x 8 x 16; up: (2 + 1) x 4 x 64; out: 3 x 64.
    assert estimate_feature_maps(topology, [4, 8], outputs=3) == 512 + 256 + 768 + 192


def test_features_double_to_the_cap() -> None:
    assert plan_features(6, 32, 320) == [32, 64, 128, 256, 320, 320]


def test_memory_and_width_scale_the_patch() -> None:
    arguments = ((1, 1, 1), (300, 300, 300), 1e12, 2)
    patches = [math.prod(plan_patch(*arguments, memory=memory)[0].patch_size) for memory in (2, 8, 24)]
    assert patches == sorted(set(patches))
    narrow = math.prod(plan_patch(*arguments, width=16)[0].patch_size)
    assert narrow > patches[1]
    with pytest.raises(BadInput, match="no patch fits"):
        plan_patch(*arguments, memory=1e-9)


def test_spacing_is_the_median_or_a_low_percentile_of_thick_slices() -> None:
    fine = np.array([[1.0, 1.0, 2.0], [1.2, 1.0, 2.0], [1.4, 1.0, 9.0]])
    shapes = np.array([[100, 100, 80]] * 3)
    np.testing.assert_allclose(plan_spacing(fine, shapes), [1.2, 1.0, 2.0])
    thick = np.array([[1.5, 1.5, z] for z in (5, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10)])
    flat = np.array([[200, 200, 12]] * 11)
    np.testing.assert_allclose(plan_spacing(thick, flat), [1.5, 1.5, 10.0])
    # Two of twelve with slices of 5 mm: the 10th percentile lies a tenth of the way from 5 to 10.
    thick = np.vstack([thick, thick[:1]])
    flat = np.array([[200, 200, 12]] * 12)
    np.testing.assert_allclose(plan_spacing(thick, flat), [1.5, 1.5, 5.5])
    # As many slices as pixels: not the case the rule is for.
    np.testing.assert_allclose(plan_spacing(thick, np.array([[200, 200, 200]] * 12)), [1.5, 1.5, 10.0])
    mixed = np.array([[1.0, 1.0, 0.5]] * 3 + [[1.0, 1.0, 8.0]] * 4)
    np.testing.assert_allclose(plan_spacing(mixed, np.array([[200, 200, 12]] * 7)), [1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("text", "value"), [("8GB", 8), ("11", 11), ("512 MB", 0.5), ("24gib", 24), (6.5, 6.5), (None, None)]
)
def test_memory_is_read(text: str | float | None, value: float | None) -> None:
    assert parse_memory(text) == value


@pytest.mark.parametrize("text", ["much", "-8GB", "0", "8TB"])
def test_odd_memory_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="8GB"):
        parse_memory(text)
