from __future__ import annotations

import math

import pytest
import torch

from common.errors import BadInput
from common.losses import UncertaintyWeighting


def test_starts_with_half_of_each() -> None:
    weighting = UncertaintyWeighting(["segmentation", "thickness"])
    total = weighting({"segmentation": torch.tensor(2.0), "thickness": torch.tensor(6.0)})
    assert total.item() == pytest.approx(4.0)


def test_by_hand() -> None:
    weighting = UncertaintyWeighting(["segmentation", "thickness"])
    with torch.no_grad():
        weighting.log_variances.copy_(torch.tensor([math.log(2), math.log(4)]))
    total = weighting({"thickness": torch.tensor(8.0), "segmentation": torch.tensor(3.0)})
    assert total.item() == pytest.approx(0.5 * 3 / 2 + 0.5 * 8 / 4 + 0.5 * (math.log(2) + math.log(4)))


def test_each_weight_tends_to_the_inverse_of_its_loss() -> None:
    weighting = UncertaintyWeighting(["a", "b"])
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        weighting({"a": torch.tensor(0.5), "b": torch.tensor(4.0)}).backward()
        optimizer.step()
    assert weighting.log_variances.tolist() == pytest.approx([math.log(0.5), math.log(4)], abs=1e-3)


def test_a_loss_left_out_does_not_move_its_weight() -> None:
    weighting = UncertaintyWeighting(["a", "b"])
    loss = torch.tensor(3.0, requires_grad=True)
    total = weighting({"a": loss})
    assert total.item() == pytest.approx(1.5)
    total.backward()
    assert loss.grad.item() == pytest.approx(0.5)
    assert weighting.log_variances.grad.tolist() == pytest.approx([-1.0, 0.0])


def test_bad_names() -> None:
    for names in ([], ["a", "a"]):
        with pytest.raises(BadInput):
            UncertaintyWeighting(names)
    for losses in ({}, {"a": torch.tensor(1.0), "thickness": torch.tensor(1.0)}):
        with pytest.raises(BadInput, match="expected some of"):
            UncertaintyWeighting(["a", "b"])(losses)
