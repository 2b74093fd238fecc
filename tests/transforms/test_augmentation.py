from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from monai.data import get_track_meta
from monai.transforms import Compose, Lambda
from random_draws import ALL, THICKNESS, VOLUME, draw

from common.errors import BadInput
from common.transforms import chain, crop, supervised_augmentation, weak_and_strong
from common.transforms.sampled_augmentation import sampled_augmentation


def test_supervised_augmentation_moves_all_maps_together(case):
    transform = supervised_augmentation(
        (20, 18, 16), ALL, [THICKNESS, VOLUME], [1.0] * 3, scale=None, rotation=30, intensity=False
    )
    moved = 0
    for seed in range(12):
        patch = draw(transform, case, seed)
        assert patch["label"].dtype == torch.int64
        assert type(patch["image"]) is torch.Tensor
        assert patch["thickness"].unique().tolist() == [-1, 3]
        assert torch.equal(patch["thickness"] == 3, patch["label"] == 2)
        # Bilinear and nearest part by less than half the step between two labels, edges of three classes apart.
        agreement = ((patch["image"] / 2).round() == patch["label"]).float().mean()
        assert agreement > 0.97
        moved += not torch.equal(patch["label"], case["label"].long().as_tensor())
    assert moved > 0


def jacobian(transform: Compose, spacing: tuple[float, ...], seed: int) -> torch.Tensor:
    """The matrix by which a transform moves points in mm, from the middle of an image of the points' coordinates."""
    shape = [24, 22, 12][: len(spacing)]
    axes = [(torch.arange(n) - (n - 1) / 2) * side for n, side in zip(shape, spacing, strict=True)]
    moved = draw(transform, {"image": torch.stack(torch.meshgrid(*axes, indexing="ij"))}, seed)["image"].double()
    middle = tuple(n // 2 for n in shape)
    slopes = torch.gradient(moved, spacing=[float(side) for side in spacing], dim=tuple(range(1, moved.ndim)))
    return torch.stack([slope[(slice(None), *middle)] for slope in slopes], dim=1)


@pytest.mark.parametrize("spacing", [(1.0, 1.5, 3.0), (2.0, 0.5, 0.5), (1.0, 2.5)])
def test_rotations_keep_lengths_and_angles_in_mm(spacing):
    patch_size = (24, 22, 12)[: len(spacing)]
    for transform in (
        supervised_augmentation(
            patch_size, ("image",), spacing=spacing, scale=None, rotation=30, mirror_axes=(), intensity=False
        ),
        weak_and_strong(
            patch_size, spacing=spacing, rotation=20, mirror_axes=(), weak_probability=1.0, strong_probability=0.0
        ),
    ):
        turned = 0
        for seed in range(12):
            matrix = jacobian(transform, spacing, seed)
            torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(spacing)).double(), atol=1e-4, rtol=0)
            turned += not torch.allclose(matrix, torch.eye(len(spacing)).double(), atol=1e-2)
        assert turned


@pytest.mark.parametrize(("spacing", "kept"), [((1.0, 3.0, 2.0), [1]), ((1.0, 1.0, 1.0), [0, 1, 2])])
def test_lengths_measured_slice_by_slice_stay_in_their_slices(spacing, kept):
    target = {**THICKNESS, "name": "image", "slicewise": True}
    transform = supervised_augmentation(
        (24, 22, 12), ("image",), [target], spacing, scale=None, mirror_axes=(), intensity=False
    )
    matrices = [jacobian(transform, spacing, seed) for seed in range(20)]
    for matrix in matrices:
        torch.testing.assert_close(matrix[kept][:, kept], torch.eye(len(kept)).double(), atol=1e-4, rtol=0)
    turned = any(not torch.allclose(matrix, torch.eye(3).double(), atol=1e-2) for matrix in matrices)
    assert turned == (len(kept) == 1)


def test_shifts_are_shares_of_the_patch_whatever_the_spacing(case):
    size = (20, 18, 16)
    for seed in range(3):
        views = [
            draw(weak_and_strong(size, spacing=spacing, rotation=0, translation=0.2, weak_probability=1.0), case, seed)
            for spacing in (None, [0.7, 0.7, 0.7], [1.0, 1.5, 3.0])
        ]
        assert torch.equal(views[0]["image"], views[1]["image"])
        torch.testing.assert_close(views[0]["image"], views[2]["image"], atol=1e-4, rtol=0)


def test_scaling_magnifies_and_shrinks_label_and_image_alike(case):
    transform = supervised_augmentation((20, 18, 16), scale=(0.7, 1.4), rotation=0, mirror_axes=(), intensity=False)
    sizes = set()
    for seed in range(40):
        patch = draw(transform, case, seed)
        assert patch["label"].shape == patch["image"].shape == (1, 20, 18, 16)
        assert ((patch["image"] / 2).round() == patch["label"]).float().mean() > 0.95
        sizes.add(int((patch["label"] == 2).sum()))
    original = int((case["label"] == 2).sum())
    assert original in sizes
    assert min(sizes) < original < max(sizes)


def test_lengths_forbid_scaling():
    with pytest.raises(BadInput, match=r"`scale` .* lengths in \['thickness'\]"):
        supervised_augmentation((8, 8, 8), ALL, [THICKNESS, VOLUME], [1.0, 1.0, 3.0])
    supervised_augmentation((8, 8, 8), ("image", "label", "volume"), [VOLUME])
    supervised_augmentation((8, 8, 8), ALL, [{**THICKNESS, "unit": ""}, VOLUME])
    supervised_augmentation((8, 8, 8), ALL, [THICKNESS, VOLUME], [1.0, 1.0, 3.0], scale=None)
    with pytest.raises(BadInput, match="smallest and the largest"):
        supervised_augmentation((8, 8, 8), scale=(1.4, 0.7))


def test_lengths_need_the_voxel_size_to_be_rotated():
    with pytest.raises(BadInput, match=r"`spacing` is null.* lengths in \['thickness'\]"):
        supervised_augmentation((8, 8, 8), ALL, [THICKNESS], scale=None)
    supervised_augmentation((8, 8, 8), ALL, [THICKNESS], scale=None, rotation=0)
    for spacing in ([1.0, 1.0], [1.0, 1.0, 0.0]):
        with pytest.raises(BadInput, match=r"`spacing` is .*expected 3 positive numbers"):
            supervised_augmentation((8, 8, 8), spacing=spacing)


@pytest.mark.parametrize("thick_axis", [0, 1, 2])
def test_anisotropic_data_keep_to_their_plane(thick_axis):
    """Slices of one constant each stay so under whatever moves voxels in the plane only, low resolution included."""
    shape = [1, 12, 12, 12]
    ramp = torch.arange(12.0).reshape([1] + [12 if axis == thick_axis else 1 for axis in range(3)])
    case = {"image": ramp.expand(shape).clone(), "label": ramp.expand(shape).to(torch.uint8)}
    transform = supervised_augmentation((12, 12, 12), thick_axis=thick_axis, mirror_axes=(), intensity=False)
    for seed in range(20):
        patch = draw(transform, case, seed)
        torch.testing.assert_close(patch["image"], case["image"], atol=1e-4, rtol=0)
        assert torch.equal(patch["label"], case["label"].long())
    from common.transforms.augmentation import _RandLowResolutiond

    low = _RandLowResolutiond("image", 1.0, 3, thick_axis)
    torch.testing.assert_close(torch.as_tensor(low(case)["image"]), case["image"])
    noise = {"image": torch.randn(1, 12, 12, 12, generator=torch.Generator().manual_seed(0))}
    low.set_random_state(1)
    assert low(noise)["image"].std() < noise["image"].std()


def test_intensities_change_the_image_only(case):
    transform = supervised_augmentation((20, 18, 16), scale=None, rotation=0, mirror_axes=())
    changed = 0
    for seed in range(10):
        patch = draw(transform, case, seed)
        assert torch.equal(patch["label"], case["label"].long().as_tensor())
        assert torch.isfinite(patch["image"]).all()
        changed += not torch.equal(patch["image"], case["image"].as_tensor())
    assert changed >= 3


def test_mirroring_of_one_axis_leaves_the_others(case):
    marked = {"image": torch.arange(24.0).reshape(1, 2, 3, 4)}
    transform = supervised_augmentation(
        (2, 3, 4), ("image",), scale=None, rotation=0, mirror_axes=(1,), intensity=False
    )
    seen = {tuple(draw(transform, marked, seed)["image"].flatten().tolist()) for seed in range(10)}
    flipped = marked["image"].flip(2)
    assert seen == {tuple(marked["image"].flatten().tolist()), tuple(flipped.flatten().tolist())}


def test_the_strong_view_of_probability_nought_is_the_weak_one(case):
    transform = weak_and_strong((20, 18, 16), ("image", "label"), weak_probability=1.0, strong_probability=0.0)
    for seed in range(3):
        views = draw(transform, case, seed)
        assert torch.equal(views["strong"], views["image"])
        assert views["strong"].data_ptr() != views["image"].data_ptr()
        assert not torch.equal(views["image"], case["image"].as_tensor())
        assert ((views["image"] / 2).round() == views["label"]).float().mean() > 0.97


@pytest.mark.parametrize("shape", [(20, 18, 16), (24, 20)])
def test_the_strong_view_has_the_weak_ones_geometry(shape):
    image = torch.nn.functional.interpolate(
        torch.randn(1, 1, *(5 for _ in shape), generator=torch.Generator().manual_seed(0)),
        size=shape,
        mode="trilinear" if len(shape) == 3 else "bilinear",
    )[0]
    transform = weak_and_strong(shape, weak_probability=1.0, strong_probability=1.0, cutout=None)
    for seed in range(6):
        views = draw(transform, {"image": image}, seed)
        assert views["strong"].shape == views["image"].shape == (1, *shape)
        assert type(views["image"]) is type(views["strong"]) is torch.Tensor
        assert not torch.equal(views["strong"], views["image"])

        def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
            return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])

        assert correlation(views["strong"], views["image"]) > 0.8
        assert correlation(views["strong"], views["image"]) > correlation(views["strong"], views["image"].roll(3, 1))


def test_cut_out_fills_boxes_of_the_strong_view_only():
    image = torch.full((1, 16, 16, 8), 5.0)
    transform = weak_and_strong((16, 16, 8), strong_probability=1.0, cutout=0.25, holes=1)
    views = draw(transform, {"image": image}, 0)
    assert (views["image"] == 5).all()
    assert int((views["strong"] == 0).sum()) == 4 * 4 * 2


def test_draws_repeat_with_their_seed(case):
    transform = chain(crop((8, 8, 8), 3), supervised_augmentation((8, 8, 8)))
    again = [draw(transform, case, seed)["image"] for seed in (1, 2, 1)]
    assert torch.equal(again[0], again[2])
    assert not torch.equal(again[0], again[1])


@pytest.mark.parametrize("make", [supervised_augmentation, weak_and_strong, sampled_augmentation])
def test_what_is_not_recorded_changes_nothing(case, make):
    """In the main thread, where records are switched off, and in another, where a server may need them meanwhile."""
    seen = []
    [patch] = crop((16, 16, 16), 3)(case)
    transform = make((16, 16, 16))
    transform.transforms = (Lambda(lambda data: seen.append(get_track_meta()) or data), *transform.transforms)

    def draws() -> list[dict]:
        return [draw(transform, dict(patch), seed) for seed in range(12)]

    alone = draws()
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(draws).result()
    assert seen == [False] * 12 + [True] * 12
    assert get_track_meta()
    for one, other in zip(alone, elsewhere, strict=True):
        for key in set(one) & {"image", "label", "strong"}:
            assert type(one[key]) is torch.Tensor
            assert torch.equal(one[key], torch.as_tensor(other[key]))

    def fail(data):
        raise RuntimeError("a step fails")

    transform.transforms = (fail,)
    with pytest.raises(RuntimeError, match="applying transform"):
        transform(dict(patch))
    assert get_track_meta()


def test_two_dimensions():
    case = {"image": torch.rand(2, 20, 18), "label": torch.randint(0, 2, (1, 20, 18))}
    transform = chain(crop((16, 24), 2), supervised_augmentation((16, 24)))
    for seed in range(10):
        patch = draw(transform, case, seed)
        assert patch["image"].shape == (2, 16, 24)
        assert patch["label"].shape == (1, 16, 24)
