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
    same,
    small,
    train,
    voxels,
)

from common.losses import SegmentationLoss
from common.methods import MeanTeacher
from common.methods.mean_teacher import clipped_noise


def pair(student: float, teacher: float, **settings) -> MeanTeacher:
    method = MeanTeacher(Pointwise(student), **{"noise": 0.0, **settings})
    method.average.module.become(teacher)
    return method


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize(("step", "ramp"), [(0, math.exp(-5)), (5, math.exp(-1.25)), (10, 1.0)])
def test_loss_by_hand_and_its_ramp(step, ramp):
    """Both classes differ by the same, so their mean is that of one. The labelled crop, voxels of 0, is no part."""
    method = pair(1.0, 2.0, consistency_weight=100.0)
    method.progress(step, 10)
    terms = method(batch_of(voxels(1.0, -3.0)))
    expected = ((sigmoid(1) - sigmoid(2)) ** 2 + (sigmoid(-3) - sigmoid(-6)) ** 2) / 2
    assert terms["consistency"].item() == pytest.approx(expected, rel=1e-5)
    assert terms["segmentation"].item() == pytest.approx(math.log(2) + 1, rel=1e-4), "p = 0.5 for a structure of 0"
    added = terms["loss"].item() - terms["segmentation"].item()
    assert added == pytest.approx(100 * ramp * expected, rel=1e-4)


def test_ramp_may_end_before_the_run_does():
    method = pair(1.0, 2.0, consistency_weight=100.0, ramp_up=0.5)
    method.progress(5, 10)
    terms = method(batch_of(voxels(1.0, -3.0)))
    added = terms["loss"].item() - terms["segmentation"].item()
    assert added == pytest.approx(100 * terms["consistency"].item(), rel=1e-4)


def test_numbers_of_the_literature():
    """A weight of 0.1 beside half the sum of Dice and cross-entropy is 0.2 beside the sum."""
    method = MeanTeacher(Pointwise(1.0))
    assert (method.noise, method.consistency_weight, method.ramp_up) == (0.1, 0.2, 1.0)


def test_noise_is_gaussian_and_clipped_at_two_standard_deviations():
    torch.manual_seed(0)
    noise = clipped_noise(torch.zeros(2, 1, 200, 200), 0.1)
    assert (noise.min().item(), noise.max().item()) == pytest.approx((-0.2, 0.2))
    assert (noise.abs() > 0.1999).float().mean().item() == pytest.approx(0.0455, abs=0.004)
    # The variance of a standard normal clipped at 2: (0.9545 - 4 phi(2)) + 4 * 0.0455 = 0.9205.
    assert noise.std().item() == pytest.approx(0.1 * math.sqrt(0.9205), rel=0.02)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.002)
    assert not clipped_noise(torch.ones(3), 0.0).any()


def test_the_teacher_alone_has_noise():
    method = pair(1.0, 1.0, noise=0.5)
    image = voxels(1.0, -3.0, 0.5)
    torch.manual_seed(3)
    terms = method(batch_of(image))
    torch.manual_seed(3)
    noisy = image + clipped_noise(image, 0.5)
    expected = (image.sigmoid() - noisy.sigmoid()).square().mean()
    assert expected > 0
    assert terms["consistency"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert pair(1.0, 1.0)(batch_of(image))["consistency"].item() == 0.0


def test_labels_supervise_every_level_of_the_labelled_crops():
    network = small(0, (2, 4, 4, 4))  # three levels, of which the last has no weight
    batch = real_batch()
    terms = MeanTeacher(network)(batch)
    alone = SegmentationLoss()(network.forward_all(batch["labeled"]["image"])[1], batch["labeled"]["label"])
    torch.testing.assert_close(terms["segmentation"], alone)


def test_a_step_trains_the_student_and_the_average_follows():
    network = small(0, dropout=0.5)
    method = MeanTeacher(network, decay=0.9)
    optimizer = torch.optim.SGD(method.trainable_parameters(), lr=0.1)
    assert {id(p) for p in method.trainable_parameters()} == {id(p) for p in network.parameters()}
    start = copy.deepcopy(network.state_dict())
    train(method, optimizer, [0])
    first = copy.deepcopy(network.state_dict())
    assert moved(network, start)
    assert same(method.average.module.state_dict(), first), "the first update copies"
    train(method, optimizer, [1])
    for name, value in method.average.module.state_dict().items():
        torch.testing.assert_close(value, (first[name] + network.state_dict()[name]) / 2, msg=name)
    assert all(p.grad is None and not p.requires_grad for p in method.average.parameters())
    assert network.training
    assert not any(module.training for module in method.average.modules())
    assert method.deployed is network


def test_the_teacher_gives_no_gradient():
    method = pair(1.0, 2.0)
    method(batch_of(voxels(1.0)))["consistency"].backward()
    p, q = sigmoid(1), sigmoid(2)
    assert method.network.slope.grad.item() == pytest.approx(2 * (p - q) * p * (1 - p), rel=1e-4)


def test_state_read_back_continues_the_run():
    check_resuming(lambda seed: MeanTeacher(small(seed, dropout=0.2), consistency_weight=5.0))


def test_mixed_precision():
    check_mixed_precision(MeanTeacher(small(0)))
