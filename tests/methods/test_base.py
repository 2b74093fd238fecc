from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from common.methods import Method
from common.networks.dynamic_convolution import DyBAC


class WithTeacher(Method):
    frozen = ("teacher", "absent")

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        self.teacher = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
        self.teacher_head = nn.Linear(2, 2)
        self.absent = None
        self.freeze()


def test_what_is_frozen_has_no_gradients_and_never_trains():
    method = WithTeacher()
    for mode in (True, False, True):
        method.train(mode)
        assert method.network[1].training is mode
        assert not any(module.training for module in method.teacher.modules())
    trainable = {id(parameter) for parameter in method.trainable_parameters()}
    assert trainable == {id(p) for part in (method.network, method.teacher_head) for p in part.parameters()}


def test_state_leaves_out_what_is_frozen_and_nothing_else():
    state = WithTeacher().state_dict()
    assert sorted(state) == ["network.0.bias", "network.0.weight", "teacher_head.bias", "teacher_head.weight"]
    within = nn.ModuleDict({"method": WithTeacher()}).state_dict()
    assert sorted(within) == [f"method.{name}" for name in sorted(state)]


def test_state_read_back_replaces_all_but_what_is_frozen():
    method, other = WithTeacher(), WithTeacher()
    teacher = copy.deepcopy(method.teacher.state_dict())
    method.load_state_dict(other.state_dict())
    assert torch.equal(method.network[0].weight, other.network[0].weight)
    assert torch.equal(method.teacher_head.bias, other.teacher_head.bias)
    for name, value in method.teacher.state_dict().items():
        assert torch.equal(value, teacher[name])


def test_state_of_another_shape_is_refused():
    state = WithTeacher().state_dict()
    state["network.0.weight"] = torch.zeros(3, 2)
    with pytest.raises(RuntimeError, match=r"network\.0\.weight"):
        WithTeacher().load_state_dict(state)
    with pytest.raises(RuntimeError, match="surplus"):
        WithTeacher().load_state_dict({**WithTeacher().state_dict(), "surplus": torch.zeros(1)})


def test_progress_is_kept_for_the_schedules():
    method = WithTeacher()
    method.progress(3, 10)
    assert (method.step, method.total_steps) == (3, 10)
    method.progress(0, 0)
    assert method.total_steps == 1, "schedules divide by it"


def test_a_method_must_say_what_its_losses_are():
    with pytest.raises(NotImplementedError, match="WithTeacher"):
        WithTeacher()({})


def test_dynamic_convolutions_get_sharper_in_every_method_but_those_of_frozen_networks():
    method = WithTeacher()
    method.network, method.teacher = DyBAC(2, 4, 4), DyBAC(2, 4, 4)
    for step, expected in ((0, 34.0), (5, 17.5), (10, 1.0), (99, 1.0)):
        method.progress(step, 100)
        assert method.network.temperature.item() == pytest.approx(expected)
    assert method.teacher.temperature.item() == 34.0
    method.progress(0, 100)
    assert method.network.temperature.item() == 1.0, "weights that were trained before go on as they are"
