from __future__ import annotations

import math

import pytest
import torch

from common.errors import BadInput
from common.losses import UncertaintyWeighting
from common.losses.weighting import parameter_groups


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


def test_the_optimiser_decays_all_but_the_learnt_weights() -> None:
    module = torch.nn.ModuleDict({"network": torch.nn.Linear(2, 1), "weighting": UncertaintyWeighting(["a", "b"])})
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, 1.0)
        parameter.grad = torch.zeros_like(parameter)
    module["network"].bias.requires_grad_(False)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameter_groups(trained, module), lr=0.5, weight_decay=0.1)
    optimizer.step()
    assert module["weighting"].log_variances.tolist() == [1, 1]
    assert module["network"].weight.flatten().tolist() == pytest.approx([0.95, 0.95])
    assert module["network"].bias.tolist() == [1]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_without_learnt_weights_there_is_one_group() -> None:
    network = torch.nn.Linear(2, 1)
    assert parameter_groups(list(network.parameters()), network) == [{"params": list(network.parameters())}]


def test_bad_names() -> None:
    for names in ([], ["a", "a"]):
        with pytest.raises(BadInput):
            UncertaintyWeighting(names)
    for losses in ({}, {"a": torch.tensor(1.0), "thickness": torch.tensor(1.0)}):
        with pytest.raises(BadInput, match="expected some of"):
            UncertaintyWeighting(["a", "b"])(losses)
