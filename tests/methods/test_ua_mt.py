from __future__ import annotations

import math

import pytest
import torch
from tiny_networks import (
    Pointwise,
    batch_of,
    check_mixed_precision,
    check_resuming,
    moved,
    small,
    train,
    voxels,
)
from torch import Tensor, nn

from common.methods import UncertaintyAwareMeanTeacher

NAMES = ["background", "lumen", "wall"]


class Ternary(Pointwise):
    """Three classes with the logits 0, 0 and ``slope * voxel``."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(image), torch.zeros_like(image), self.slope * image + self.bias], dim=1)


def ternary(student: float, teacher: float, **settings) -> UncertaintyAwareMeanTeacher:
    method = UncertaintyAwareMeanTeacher(Ternary(student), NAMES, **{"noise": 0.0, **settings})
    method.average.module.become(teacher)
    return method


def softmax(value: float) -> list[float]:
    total = 2 + math.exp(value)
    return [1 / total, 1 / total, math.exp(value) / total]


def entropy(value: float) -> float:
    return -sum(p * math.log(p) for p in softmax(value))


@pytest.mark.parametrize(
    ("step", "share"), [(0, 0.75 + 0.25 * math.exp(-5)), (50, 0.75 + 0.25 * math.exp(-1.25)), (100, 1.0)]
)
def test_threshold_rises_over_the_whole_run(step, share):
    method = ternary(1.0, 1.0, ramp_up=0.1)  # the weight's ramp-up is another one
    method.progress(step, 100)
    assert method.threshold == pytest.approx(share, rel=1e-12)


def squared(value: float) -> float:
    """Summed over the classes, for a student of slope 1 and a teacher of slope 2."""
    return sum((p - q) ** 2 for p, q in zip(softmax(value), softmax(2 * value), strict=True))


@pytest.mark.parametrize(("step", "kept"), [(0, [0, 1]), (50, [0, 1, 2]), (100, [0, 1, 2, 3])])
def test_loss_by_hand_is_that_of_the_certain_voxels(step, kept):
    """Entropies of 0.14, 0.67, 0.86 and 1.05: the thresholds are 0.826, 0.903 and ln 3 = 1.099. With the ln 2 of two
    classes they would be 0.521, 0.570 and 0.693."""
    values = [2.15, 1.0, 0.7, 0.3]
    assert [entropy(2 * value) for value in values] == pytest.approx([0.14, 0.67, 0.86, 1.05], abs=0.01)
    method = ternary(1.0, 2.0)
    method.progress(step, 100)
    terms = method(batch_of(voxels(*values)))
    expected = sum(squared(values[index]) for index in kept) / (3 * len(kept))
    assert terms["consistency"].item() == pytest.approx(expected, rel=1e-4)
    assert terms["kept/all"].item() == len(kept) / 4
    assert terms["kept/wall"].item() == len(kept) / 4
    assert math.isnan(terms["kept/lumen"].item())


def test_the_ramp_weighs_the_term():
    method = ternary(1.0, 2.0, consistency_weight=100.0)
    method.progress(5, 10)
    terms = method(batch_of(voxels(2.0)))
    added = terms["loss"].item() - terms["segmentation"].item()
    assert added == pytest.approx(100 * math.exp(-1.25) * terms["consistency"].item(), rel=1e-4)


def test_no_voxel_kept_gives_nothing():
    method = ternary(1.0, 0.0)
    terms = method(batch_of(voxels(2.0, -2.0)))
    assert terms["consistency"].item() == 0.0
    assert terms["kept/all"].item() == 0.0
    terms["consistency"].backward()
    assert method.network.slope.grad.item() == 0.0


class Watched(Pointwise):
    """Notes at each pass whether dropout was on; every other pass says the contrary where ``contrary`` is set."""

    contrary = False

    def __init__(self, slope: float, dropout: float) -> None:
        super().__init__(slope)
        self.dropout = nn.Dropout(dropout)
        self.seen: list[tuple[bool, Tensor]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append((self.dropout.training, image))
        return super().forward(-image if self.contrary and len(self.seen) % 2 else image)


def test_eight_passes_with_dropout_and_noise_then_the_target():
    method = UncertaintyAwareMeanTeacher(Watched(1.0, 0.5), ["background", "wall"])
    image = voxels(*[0.0] * 50)
    method.train()(batch_of(image))
    seen = method.average.module.seen
    assert [dropout for dropout, _ in seen] == [True] * 8 + [False]
    for index, (_, noisy) in enumerate(seen):
        assert 0 < noisy.abs().max() <= 0.2 + 1e-6
        assert not any(torch.equal(noisy, other) for _, other in seen[:index]), "each pass has its own noise"
    assert method.network.seen[-1][0], "the student has dropout"
    assert not method.average.module.dropout.training


def test_without_dropout_the_passes_differ_by_noise():
    assert UncertaintyAwareMeanTeacher(Watched(1.0, 0.0), "ab").estimator.perturb == ("noise",)
    assert UncertaintyAwareMeanTeacher(Watched(1.0, 0.1), "ab").estimator.perturb == ("dropout", "noise")


@pytest.mark.parametrize(("contrary", "kept"), [(False, 1.0), (True, 0.0)])
def test_passes_that_contradict_one_another_are_not_certain(contrary, kept):
    """Each alone is: it is the entropy of the mean that counts, not the mean of the entropies."""
    method = UncertaintyAwareMeanTeacher(Watched(9.0, 0.0), ["background", "wall"], noise=0.0)
    method.average.module.contrary = contrary
    assert method(batch_of(voxels(1.0, 2.0)))["kept/all"].item() == kept


def test_a_step_trains_the_student_alone():
    network = small(0, dropout=0.5)
    method = UncertaintyAwareMeanTeacher(network, "abc", passes=2)
    before, start = (
        {name: value.clone() for name, value in net.state_dict().items()} for net in (method.average.module, network)
    )
    method.after_step = lambda: None
    train(method, torch.optim.SGD(method.trainable_parameters(), lr=0.1), [0])
    assert {id(p) for p in method.trainable_parameters()} == {id(p) for p in network.parameters()}
    assert moved(network, start)
    assert not moved(method.average.module, before)
    assert method.deployed is network


def test_state_read_back_continues_the_run():
    check_resuming(
        lambda seed: UncertaintyAwareMeanTeacher(small(seed, dropout=0.2), "abc", passes=2, consistency_weight=5.0)
    )


def test_mixed_precision():
    method = UncertaintyAwareMeanTeacher(small(0), "abc", passes=2)
    method.progress(1, 1)
    check_mixed_precision(method)
