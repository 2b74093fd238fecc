from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import CacheDataset
from random_draws import ALL, THICKNESS, VOLUME, draw

from common.errors import BadInput
from common.transforms import chain, crop, crop_indices, weak_and_strong


def test_crop_takes_the_same_place_from_every_map(case):
    transform = crop((8, 8, 8), 3, ALL, targets=[THICKNESS, VOLUME])
    for seed in range(5):
        patch = draw(transform, case, seed)
        assert patch["image"].shape == patch["label"].shape == patch["thickness"].shape == (1, 8, 8, 8)
        assert torch.equal(patch["image"], patch["label"].float() * 2)
        assert torch.equal(patch["thickness"] == 3, patch["label"] == 2)
        assert patch["volume"] == 5
        assert "label_cls_indices" not in patch
        assert type(patch["image"]) is torch.Tensor


def test_share_of_foreground_centres(case):
    def share(foreground: float) -> float:
        transform = crop((1, 1, 1), 3, ("image", "label"), foreground)
        return float(np.mean([int(draw(transform, case, seed)["label"]) > 0 for seed in range(60)]))

    assert share(0) == 0
    assert share(1) == 1
    assert 0.3 < share(0.5) < 0.7


def test_structures_that_a_case_lacks_take_nothing_from_the_share(case):
    """With one of five structures MONAI's own ratios would give it 17 % where half was asked for."""
    transform = crop((1, 1, 1), 6, ("image", "label"), 0.5)
    one = {**case, "label": (case["label"] == 1).to(case["label"].dtype)}
    found = [int(draw(transform, one, seed)["label"]) for seed in range(100)]
    assert 0.35 < np.mean(found) < 0.65


def test_smaller_volumes_are_padded(case):
    patch = draw(crop((24, 8, 20), 3, ALL, targets=[THICKNESS, VOLUME]), case, 0)
    assert patch["image"].shape == (1, 24, 8, 20)
    assert (patch["image"][:, 0] == 0).all()
    assert (patch["label"][:, 0] == 0).all()
    assert (patch["thickness"][:, 0] == -1).all()


def test_unlabelled_cases_need_no_label(case):
    unlabelled = {"image": case["image"]}
    patches = [draw(crop((24, 8, 8), None, ("image",)), unlabelled, seed)["image"] for seed in range(2)]
    assert patches[0].shape == (1, 24, 8, 8)
    assert not torch.equal(patches[0], patches[1])


def test_a_case_of_background_only_is_cropped_too(case):
    empty = {"image": case["image"], "label": torch.zeros_like(case["label"])}
    assert draw(crop((8, 8, 8), 3, foreground=1.0), empty, 0)["label"].shape == (1, 8, 8, 8)


def test_indices_are_found_once_a_case(case):
    prepared = crop_indices((8, 8, 8), 3)(case)
    sizes = [len(indices) for indices in prepared["label_cls_indices"]]
    assert sizes == [int((case["label"] == index).sum()) for index in range(3)]


def test_a_cache_without_copies_stays_as_it_was(case):
    everything = chain(
        crop((8, 8, 8), 3),
        weak_and_strong((8, 8, 8), ("image", "label"), weak_probability=1, strong_probability=1),
    )
    dataset = CacheDataset([case], everything, copy_cache=False, progress=False)
    assert "label_cls_indices" in dataset._cache[0]
    before = {key: dataset._cache[0][key].clone() for key in ("image", "label")}
    steps = len(dataset._cache[0]["image"].applied_operations)
    for _ in range(3):
        dataset[0]
    for key, value in before.items():
        assert torch.equal(dataset._cache[0][key], value)
        assert len(dataset._cache[0][key].applied_operations) == steps


@pytest.mark.parametrize("arguments", [{"foreground": 2}, {"num_classes": 1}])
def test_crops_that_make_no_sense(arguments):
    with pytest.raises(BadInput):
        crop(**{"patch_size": (8, 8), "num_classes": 2, **arguments})
