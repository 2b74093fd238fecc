from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from common.methods import MovingAverage


class Network(nn.Module):
    """A parameter, a floating-point buffer, a buffer that no state dict has, and a counter."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))
        self.register_buffer("statistic", torch.tensor([10 * value]))
        self.register_buffer("passing", torch.tensor([100 * value]), persistent=False)
        self.register_buffer("count", torch.tensor(0))
        self.dropout = nn.Dropout()

    def become(self, value: float, count: int) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
            self.statistic.fill_(10 * value)
            self.passing.fill_(100 * value)
            self.count.fill_(count)


@pytest.mark.parametrize(
    # The decay before updates 0 to 3 is min(0, d), min(1/2, d), min(2/3, d), min(3/4, d).
    ("decay", "expected"),
    [(0.99, [2.0, 3.0, 5.0, 6.75]), (0.5, [2.0, 3.0, 6.0, 9.0]), (0.0, [2.0, 4.0, 9.0, 12.0])],
)
def test_average_by_hand_with_its_warm_start(decay, expected):
    network = Network(1.0)
    average = MovingAverage(network, decay)
    for count, (value, past) in enumerate(zip([2.0, 4.0, 9.0, 12.0], expected, strict=True), start=1):
        network.become(value, count)
        average.update_parameters(network)
        assert average.module.weight.item() == pytest.approx(past)
        assert average.module.statistic.item() == pytest.approx(10 * past)
        assert average.module.passing.item() == pytest.approx(100 * past)
        assert average.module.count.item() == count
        assert average.module.count.dtype == torch.int64
        assert network.weight.item() == value, "the network itself must not move"


def test_it_is_a_copy_without_gradients_in_evaluation_mode():
    network = Network(1.0)
    holder = nn.ModuleDict({"network": network, "average": MovingAverage(network)}).train()
    average = holder["average"]
    assert network.dropout.training
    assert not average.training
    assert not average.module.dropout.training
    assert network.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in average.parameters())
    network.become(5.0, 1)
    assert average.module.weight.item() == 1.0


def test_a_resumed_average_continues_as_if_never_stopped():
    def follow(average, network, values):
        for value in values:
            network.become(value, int(value))
            average.update_parameters(network)

    network = Network(1.0)
    whole = MovingAverage(network)
    follow(whole, network, [2.0, 4.0])
    state = copy.deepcopy(whole.state_dict())
    follow(whole, network, [9.0, 12.0])
    resumed = MovingAverage(Network(7.0))
    resumed.load_state_dict(state)
    follow(resumed, network, [9.0, 12.0])
    assert resumed.module.weight.item() == pytest.approx(6.75)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_norm_statistics_follow_the_weights():
    """An average that keeps the statistics of the start answers with a shift that training never sees."""
    network = nn.Sequential(nn.BatchNorm1d(1))
    average = MovingAverage(network, 0.9)
    image = torch.tensor([[9.0], [11.0]])
    for _ in range(60):
        network.train()(image)
        average.update_parameters(network)
    assert average.module[0].running_mean.item() == pytest.approx(10.0, abs=0.2)
    assert average.module[0].num_batches_tracked.item() == 60
    assert average(image).mean().item() == pytest.approx(0.0, abs=0.2)
