from __future__ import annotations

import math

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor

from common.errors import BadInput
from common.losses import ConfidenceMaskedConsistency, distillation_loss

KINDS = [{"labels": labels, "dice_weight": weight} for labels in ("soft", "hard") for weight in (0.0, 1.0)]


def voxels(*columns: list[float]) -> Tensor:
    """(1, K, 1, N) from one list of K values a voxel."""
    return torch.tensor(columns).T.reshape(1, len(columns[0]), 1, len(columns))


def mask_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool).reshape(1, 1, 1, len(values))


def test_soft_by_hand() -> None:
    teacher = voxels([0.75, 0.25], [0.5, 0.5])
    student = torch.zeros(1, 2, 1, 2)
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    loss = ConfidenceMaskedConsistency("soft")
    assert loss(student, teacher, mask_of(1, 0)).item() == pytest.approx(divergence, abs=1e-6)
    # The second voxel agrees, so it halves the mean.
    assert loss(student, teacher, mask_of(1, 1)).item() == pytest.approx(divergence / 2, abs=1e-6)


def test_temperature_by_hand() -> None:
    # sqrt(0.9), sqrt(0.1) is 3 to 1; softened by T = 2 the teacher says (0.75, 0.25).
    loss = ConfidenceMaskedConsistency("soft", temperature=2.0)(torch.zeros(1, 2, 1, 1), voxels([0.9, 0.1]), mask_of(1))
    assert loss.item() == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), abs=1e-6)


def test_hard_by_hand() -> None:
    student = voxels([math.log(0.8), math.log(0.2)], [math.log(0.3), math.log(0.7)])
    teacher = voxels([0.6, 0.4], [0.9, 0.1])
    loss = ConfidenceMaskedConsistency("hard")
    assert loss(student, teacher, mask_of(1, 1)).item() == pytest.approx(-(math.log(0.8) + math.log(0.3)) / 2)
    assert loss(student, teacher, mask_of(0, 1)).item() == pytest.approx(-math.log(0.3))


def test_dice_counts_the_foreground_classes_that_occur() -> None:
    # Class 1 is right, class 2 occurs nowhere, and background's Dice is left out; the last voxel is not kept.
    teacher = voxels([0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0])
    student = 100 * teacher
    for labels in ("soft", "hard"):
        loss = ConfidenceMaskedConsistency(labels, dice_weight=1.0)
        assert loss(student, teacher, mask_of(1, 1, 0)).item() == pytest.approx(0.0, abs=1e-4)
        # Class 2 predicted where the teacher says background: its Dice is 0, class 1's is 1, so half a point.
        wrong = student.clone()
        wrong[0, :, 0, 1] = torch.tensor([0.0, 0.0, 100.0])
        plain = ConfidenceMaskedConsistency(labels)(wrong, teacher, mask_of(1, 1, 0))
        assert (loss(wrong, teacher, mask_of(1, 1, 0)) - plain).item() == pytest.approx(0.5, abs=1e-4)


def test_soft_dice_is_smallest_at_equality() -> None:
    teacher = voxels([0.4, 0.6], [0.7, 0.3])
    loss = ConfidenceMaskedConsistency("soft", dice_weight=1.0)
    assert loss(teacher.log(), teacher, mask_of(1, 1)).item() == pytest.approx(0.0, abs=1e-5)
    assert loss(voxels([0.0, 20.0], [20.0, 0.0]), teacher, mask_of(1, 1)).item() > 0.1


@pytest.mark.parametrize("arguments", KINDS)
@pytest.mark.parametrize("size", [1.0, 1e30, float("inf")])
def test_none_kept_is_exactly_zero_with_a_graph(arguments: dict, size: float) -> None:
    student = (torch.randn(2, 3, 4, 4, 4) * size).requires_grad_()
    loss = ConfidenceMaskedConsistency(**arguments)(student, torch.rand(2, 3, 4, 4, 4), torch.zeros(2, 1, 4, 4, 4) > 0)
    assert loss.item() == 0.0
    loss.backward()
    assert (student.grad == 0).all()


@pytest.mark.parametrize("arguments", KINDS)
def test_nothing_outside_the_mask_matters(arguments: dict) -> None:
    torch.manual_seed(0)
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    mask[:, :, :2] = True
    student = torch.randn(2, 3, 4, 4)
    teacher = torch.randn(2, 3, 4, 4).softmax(1)
    results = []
    for value in (0.2, float("nan"), float("inf")):
        logits = student.masked_fill(~mask, value).requires_grad_()
        given = teacher.masked_fill(~mask, value).requires_grad_()
        loss = ConfidenceMaskedConsistency(**arguments)(logits, given, mask)
        loss.backward()
        assert (logits.grad[~mask.expand_as(logits)] == 0).all()
        assert logits.grad[mask.expand_as(logits)].abs().min() > 0
        assert given.grad is None
        results.append(loss.item())
    assert results[0] > 0
    assert results[0] == results[1] == results[2]


def test_one_hot_teacher_is_finite() -> None:
    student = torch.zeros(1, 2, 1, 1, requires_grad=True)
    for temperature in (0.5, 1.0, 4.0):
        loss = ConfidenceMaskedConsistency("soft", temperature)(student, voxels([1.0, 0.0]), mask_of(1))
        assert loss.item() == pytest.approx(temperature**2 * math.log(2), rel=1e-5)


def test_gradients_keep_their_size_over_temperatures() -> None:
    # For large T both softmaxes are linear in the logits, so T^2 KL tends to a constant: the gradient is that of MSE.
    torch.manual_seed(0)
    teacher = torch.randn(1, 4, 6, 6)
    sizes = []
    for temperature in (4.0, 8.0, 16.0):
        student = torch.zeros(1, 4, 6, 6, requires_grad=True)
        mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
        ConfidenceMaskedConsistency("soft", temperature)(student, teacher.softmax(1), mask).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)
    assert sizes[2] == pytest.approx(sizes[1], rel=0.1)


def test_half_precision_and_meta_tensors() -> None:
    student = torch.randn(2, 3, 4, 4)
    teacher = torch.randn(2, 3, 4, 4).softmax(1)
    mask = torch.rand(2, 1, 4, 4) > 0.3
    for arguments in KINDS:
        loss = ConfidenceMaskedConsistency(**arguments)
        plain = loss(student.bfloat16(), teacher, mask)
        assert plain.dtype == torch.float32
        assert plain.item() == pytest.approx(loss(student.bfloat16().float(), teacher, mask).item())
        wrapped = loss(MetaTensor(student), MetaTensor(teacher), MetaTensor(mask))
        assert wrapped.item() == pytest.approx(loss(student, teacher, mask).item())


def test_bad_arguments() -> None:
    for arguments in ({"labels": "firm"}, {"temperature": 0.0}, {"dice_weight": -1.0}):
        with pytest.raises(BadInput):
            ConfidenceMaskedConsistency(**arguments)
    loss = ConfidenceMaskedConsistency()
    with pytest.raises(BadInput, match="same classes"):
        loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4), torch.ones(1, 1, 4, 4))
    with pytest.raises(BadInput, match="mask has shape"):
        loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4))


def test_distillation_by_hand() -> None:
    student = torch.zeros(1, 2, 1, 1, requires_grad=True)
    # Logits 2 log 3 and 0 softened by T = 2 are 3 to 1.
    teacher = voxels([2 * math.log(3), 0.0]).requires_grad_()
    soft = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    target = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    loss = distillation_loss(student, teacher, target, temperature=2.0, weight=0.25)
    assert loss.item() == pytest.approx(0.25 * soft + 0.75 * math.log(2), rel=1e-5)
    loss.backward()
    assert teacher.grad is None
    assert distillation_loss(student, teacher, None, 2.0, 1.0).item() == pytest.approx(soft, rel=1e-5)
    assert distillation_loss(student, teacher, target, 2.0, 0.0).item() == pytest.approx(math.log(2))
    with pytest.raises(BadInput, match="No target"):
        distillation_loss(student, teacher, None, 2.0, 0.5)
    with pytest.raises(BadInput, match="weight"):
        distillation_loss(student, teacher, target, 2.0, 1.5)


def test_lower_resolutions_are_weighted_as_in_deep_supervision() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(1, 3, 8, 8), torch.randn(1, 3, 4, 4), torch.randn(1, 3, 2, 2)]
    # Blocks of 4, so that nearest neighbour leaves every level with the same regions.
    blocks = torch.randn(1, 3, 2, 2).softmax(1)
    teacher = blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    loss = ConfidenceMaskedConsistency("hard", dice_weight=1.0)
    first = loss(logits[0], teacher, mask)
    second = loss(logits[1], teacher[..., ::2, ::2], mask[..., ::2, ::2])
    assert loss(logits, teacher, mask).item() == pytest.approx((2 * first.item() + second.item()) / 3, rel=1e-5)
