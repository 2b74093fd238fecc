from __future__ import annotations

import pytest
import torch
from monai.data import CacheDataset, MetaTensor

from common.errors import BadInput
from common.transforms import chain, crop
from common.transforms.sampled_augmentation import sampled_augmentation

SIZE = (16, 16, 16)


@pytest.fixture
def patch() -> dict:
    """A patch whose image tells each voxel's label, so that what moved together can be seen."""
    label = torch.zeros(1, *SIZE, dtype=torch.uint8)
    label[:, 3:13, 3:11, 3:9] = 1
    label[:, 6:10, 6:9, 5:8] = 2
    return {"image": label.float() * 2, "label": label, "thickness": torch.where(label == 2, 3.0, -1.0)}


def draw(transform, data: dict, seed: int) -> dict:
    return transform.set_random_state(seed)(dict(data))


def spatial(**settings):
    """Only the three operations that move voxels have an effect."""
    return sampled_augmentation(
        SIZE, ("image", "label", "thickness"), 7, 1.0, sigma=(1e-3, 1e-3), factor=0.0, gamma=(1.0, 1.0), **settings
    )


def test_all_maps_move_together(patch):
    moved = 0
    for seed in range(8):
        drawn = draw(spatial(), patch, seed)
        assert {key: drawn[key].dtype for key in patch} == {
            "image": torch.float32,
            "label": torch.int64,
            "thickness": torch.float32,
        }
        assert all(type(drawn[key]) is torch.Tensor and drawn[key].shape == (1, *SIZE) for key in patch)
        assert set(drawn["label"].unique().tolist()) <= {0, 1, 2}
        assert set(drawn["thickness"].unique().tolist()) <= {-1.0, 3.0}
        assert torch.equal(drawn["thickness"] == 3, drawn["label"] == 2)
        agreement = ((drawn["image"] / 2).round() == drawn["label"]).float().mean()
        assert agreement > 0.9
        moved += not torch.equal(drawn["label"], patch["label"].long())
    assert moved == 8


@pytest.mark.parametrize(
    "settings",
    [
        {"crop": 1.0, "rotation": 0.0},
        {"crop": 1.0, "scale": (1.0, 1.0)},
        {"rotation": 0.0, "scale": (1.0, 1.0)},
    ],
    ids=["scaling", "rotation", "crop"],
)
def test_each_spatial_operation_moves_voxels(patch, settings):
    assert any(not torch.equal(draw(spatial(**settings), patch, seed)["label"], patch["label"]) for seed in range(3))


def test_intensities_change_but_labels_stay(patch):
    still = {"crop": 1.0, "rotation": 0.0, "scale": (1.0, 1.0)}
    transform = sampled_augmentation(SIZE, ("image", "label", "thickness"), 7, 1.0, **still)
    drawn = draw(transform, patch, 0)
    assert torch.equal(drawn["label"], patch["label"].long())
    assert torch.equal(drawn["thickness"], patch["thickness"])
    assert not torch.allclose(drawn["image"], patch["image"], atol=0.05)


@pytest.mark.parametrize(("operations", "probability"), [(0, 1.0), (3, 0.0)])
def test_no_operation_leaves_the_crop_as_it_is(patch, operations, probability):
    for seed in range(3):
        drawn = draw(sampled_augmentation(SIZE, operations=operations, probability=probability), patch, seed)
        assert torch.equal(drawn["image"], patch["image"])
        assert torch.equal(drawn["label"], patch["label"].long())
        assert drawn["label"].dtype == torch.int64


def test_as_many_operations_as_asked_for_each_with_its_probability(patch, monkeypatch):
    """Counts what is drawn: 3 different ones of 7 each time; of those about 0.7 are done."""
    some_of = sampled_augmentation(SIZE, operations=3, probability=0.7).transforms[0]
    drawn, done = [], []

    class Counted:
        def __init__(self, index: int) -> None:
            self.index = index

        def __call__(self, data: dict) -> dict:
            drawn[-1].append(self.index)
            return data

    operations = some_of.transforms
    assert len(operations) == 7
    for operation in operations:
        done.append(operation.weights[0] if hasattr(operation, "weights") else operation.prob)
    assert done == [pytest.approx(0.7)] * 7
    some_of.transforms = tuple(Counted(index) for index in range(7))
    some_of.set_random_state(0)
    for _ in range(40):
        drawn.append([])
        some_of({"image": patch["image"]})
    assert all(len(set(indices)) == 3 for indices in drawn)
    assert {index for indices in drawn for index in indices} == set(range(7))


def test_unlabelled_crops_get_the_same_operations(patch):
    """The draws are those of a labelled crop with the same seed."""
    for seed in range(6):
        labeled = draw(sampled_augmentation(SIZE, ("image", "label")), patch, seed)["image"]
        unlabeled = draw(sampled_augmentation(SIZE, ("image",)), {"image": patch["image"]}, seed)
        assert torch.equal(unlabeled["image"], labeled)


def test_thick_axis_is_neither_cropped_nor_scaled_nor_rotated_out_of_its_plane():
    """Slices along the thick axis are constant and stay so, each at its place."""
    label = torch.arange(16).reshape(1, 1, 1, 16).expand(1, *SIZE).contiguous()
    data = {"image": label.float(), "label": label, "thickness": label.float()}
    for seed in range(5):
        assert torch.equal(draw(spatial(thick_axis=2), data, seed)["label"], label)


def test_flat_crops():
    label = torch.zeros(1, 16, 12, dtype=torch.uint8)
    label[:, 4:10, 3:9] = 1
    transform = sampled_augmentation((16, 12), operations=7, probability=1.0)
    drawn = draw(transform, {"image": label.float(), "label": label}, 0)
    assert drawn["image"].shape == drawn["label"].shape == (1, 16, 12)
    assert torch.isfinite(drawn["image"]).all()


def test_behind_a_crop_and_a_cache(patch):
    """As the bundle uses it: seeded, repeatable, and the cached case stays as it was."""
    case = {key: MetaTensor(patch[key]) for key in ("image", "label")}
    everything = chain(crop((8, 8, 8), 3), sampled_augmentation((8, 8, 8), probability=1.0))
    dataset = CacheDataset([case], everything, copy_cache=False, progress=False)
    before = dataset._cache[0]["image"].clone()
    draws = []
    for seed in (1, 2, 1):
        everything.set_random_state(seed)
        draws.append(dataset[0][0])
    assert torch.equal(dataset._cache[0]["image"], before)
    assert torch.equal(draws[0]["image"], draws[2]["image"])
    assert torch.equal(draws[0]["label"], draws[2]["label"])
    assert not torch.equal(draws[0]["image"], draws[1]["image"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operations": 8}, "`operations` is 8"),
        ({"probability": 1.5}, "`probability` is 1.5"),
        ({"crop": 0.0}, "`crop` is 0.0"),
        ({"scale": (1.3, 0.7)}, "`scale` is"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(BadInput, match=message):
        sampled_augmentation(SIZE, **settings)


def test_rotations_keep_lengths_and_angles_in_mm():
    """Seen from the middle of an image of the points' coordinates, with all but the rotation made to do nothing."""
    spacing, shape = (1.0, 1.5, 3.0), (24, 22, 12)
    axes = [(torch.arange(n) - (n - 1) / 2) * side for n, side in zip(shape, spacing, strict=True)]
    image = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    nothing = {"crop": 1.0, "scale": (1, 1), "sigma": (1e-3, 1e-3), "factor": 0.0, "gamma": (1, 1)}
    transform = sampled_augmentation(shape, ["image"], 7, 1.0, rotation=20, spacing=spacing, **nothing)
    for seed in range(4):
        moved = transform.set_random_state(seed)({"image": image})["image"].double()
        slopes = torch.gradient(moved, spacing=list(spacing), dim=(1, 2, 3))
        matrix = torch.stack([slope[:, 12, 11, 6] for slope in slopes], dim=1)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(3).double(), atol=1e-3, rtol=0)
        assert not torch.allclose(matrix, torch.eye(3).double(), atol=1e-2)
