from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_networks import (
    Pointwise,
    batch_of,
    check_mixed_precision,
    check_resuming,
    moved,
    real_batch,
    small,
    train,
    voxels,
)

from common.losses import SegmentationLoss
from common.methods import KnowledgeDistillation


def divergence(teacher: float, student: float, temperature: float) -> float:
    """T^2 KL of two classes, from the logits of the second."""
    p, q = (1 / (1 + math.exp(-logit / temperature)) for logit in (teacher, student))
    return temperature**2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))


@pytest.mark.parametrize(("step", "ramp"), [(0, math.exp(-5)), (1, math.exp(-1.25)), (2, 1.0), (9, 1.0)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_loss_by_hand_and_its_ramp(temperature, step, ramp):
    """The teacher (slope 3) sees the weak view, the student (slope 0.5) the strong one; every voxel counts."""
    method = KnowledgeDistillation(
        Pointwise(0.5), Pointwise(3.0), temperature=temperature, consistency_weight=10.0, ramp_up=0.2
    )
    method.progress(step, 10)
    weak, strong = (1.0, -0.1, 2.0), (4.0, 1.0, -2.0)
    terms = method(batch_of(voxels(*weak), voxels(*strong)))
    expected = sum(divergence(3 * w, 0.5 * s, temperature) for w, s in zip(weak, strong, strict=True)) / 3
    assert terms["consistency"].item() == pytest.approx(expected, rel=1e-4)
    assert terms["segmentation"].item() == pytest.approx(math.log(2) + 1, rel=1e-4), "the labelled crop's alone"
    added = terms["loss"].item() - terms["segmentation"].item()
    assert added == pytest.approx(10 * ramp * expected, rel=1e-4)


def test_a_student_that_equals_its_teacher():
    terms = KnowledgeDistillation(Pointwise(3.0), Pointwise(3.0))(batch_of(voxels(1.0, -2.0)))
    assert terms["consistency"].item() == pytest.approx(0.0, abs=1e-6)


def test_gradients_keep_their_size_under_the_temperature():
    """T (q_T - p_T) x, which for a high temperature is (z_student - z_teacher) x / 4."""
    student = Pointwise(1.0)
    method = KnowledgeDistillation(student, Pointwise(3.0), temperature=1000.0)
    method(batch_of(voxels(2.0)))["consistency"].backward()
    assert student.slope.grad.item() == pytest.approx((2 - 6) * 2 / 4, rel=1e-3)


def test_a_teacher_without_doubt_gives_a_finite_loss():
    method = KnowledgeDistillation(Pointwise(1.0), Pointwise(1e4), temperature=2.0)
    terms = method(batch_of(voxels(1.0, -1.0)))
    terms["loss"].backward()
    assert math.isfinite(terms["loss"].item())
    assert math.isfinite(method.network.slope.grad.item())


def test_labels_supervise_every_level_of_the_labelled_crops():
    network = small(0, (2, 4, 4, 4))  # three levels, of which the last has no weight
    batch = real_batch()
    terms = KnowledgeDistillation(network, small(1))(batch)
    alone = SegmentationLoss()(network.forward_all(batch["labeled"]["image"])[1], batch["labeled"]["label"])
    torch.testing.assert_close(terms["segmentation"], alone)


def test_the_teacher_may_be_larger_and_never_changes():
    network, teacher = small(0, dropout=0.5), small(1, (3, 6), dropout=0.5)
    teacher.register_buffer("statistics", torch.zeros(1))
    method = KnowledgeDistillation(network, teacher)
    before, start = copy.deepcopy(teacher.state_dict()), copy.deepcopy(network.state_dict())
    assert {id(p) for p in method.trainable_parameters()} == {id(p) for p in network.parameters()}
    train(method, torch.optim.SGD(method.trainable_parameters(), lr=0.1), range(2))
    assert moved(network, start)
    assert not moved(teacher, before)
    assert all(p.grad is None for p in teacher.parameters())
    assert network.training
    assert not any(module.training for module in teacher.modules())
    assert method.deployed is network
    assert {name.split(".")[0] for name in method.state_dict()} == {"network"}, "the teacher has a file of its own"


def test_state_read_back_continues_the_run():
    check_resuming(lambda seed: KnowledgeDistillation(small(seed, dropout=0.2), small(9), consistency_weight=5.0))


def test_mixed_precision():
    check_mixed_precision(KnowledgeDistillation(small(0), small(1)))
