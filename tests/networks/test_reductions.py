from __future__ import annotations

import pytest
import torch

from common.errors import BadInput
from common.networks import likeliest_class, reduce_to_case

VALUES = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]).reshape(2, 1, 2, 2)


def test_sum_adds_all_voxels():
    assert reduce_to_case(VALUES, "sum").tolist() == [10, 26]
    assert reduce_to_case(VALUES, "sum", torch.zeros_like(VALUES)).tolist() == [10, 26]
    assert reduce_to_case(torch.ones(1, 1, 64, 64, dtype=torch.bfloat16), "sum").item() == 4096


def test_mean_is_weighted_by_the_structure():
    weights = torch.tensor([[1.0, 0, 0, 0.5], [0, 0, 0, 0]]).reshape(2, 1, 2, 2)
    assert reduce_to_case(VALUES, "mean", weights).tolist() == [2.0, 0.0]
    assert reduce_to_case(VALUES, "mean").tolist() == [2.5, 6.5]


def test_gradients_stay_finite_without_the_structure():
    values, weights = VALUES.clone().requires_grad_(), torch.zeros_like(VALUES).requires_grad_()
    reduce_to_case(values, "mean", weights).sum().backward()
    assert torch.isfinite(values.grad).all()
    assert torch.isfinite(weights.grad).all()


def test_another_kind_is_explained():
    with pytest.raises(BadInput, match="'dense'"):
        reduce_to_case(VALUES, "dense")


def test_the_likeliest_class_has_the_highest_score_and_of_equal_ones_is_the_first():
    scores = torch.tensor([[1.0, 5, 2], [4, 5, 2], [3, 0, 7]]).reshape(1, 3, 3, 1)
    assert likeliest_class(scores).flatten().tolist() == [1, 0, 2]
    scores = torch.randn(2, 4, 5, 6, 7)
    assert torch.equal(likeliest_class(scores), scores.argmax(1, keepdim=True))
