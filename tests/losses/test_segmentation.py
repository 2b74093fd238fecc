from __future__ import annotations

import math

import pytest
import torch
from monai.data import MetaTensor

from common.errors import BadInput
from common.losses import SegmentationLoss, deep_supervision_weights


def certain_logits(label: torch.Tensor, num_classes: int, size: float = 50.0) -> torch.Tensor:
    one_hot = torch.nn.functional.one_hot(label[:, 0].long(), num_classes).movedim(-1, 1)
    return size * one_hot.float()


def test_weights_are_nnu_nets() -> None:
    assert deep_supervision_weights(1) == [1.0]
    assert deep_supervision_weights(2) == [1.0, 0.0]
    assert deep_supervision_weights(3) == pytest.approx([2 / 3, 1 / 3, 0.0])
    # From five levels on MONAI's own weights have a floor of 1/16; nnU-Net's do not.
    assert deep_supervision_weights(7) == pytest.approx([w / 63 for w in (32, 16, 8, 4, 2, 1)] + [0.0])


def test_uniform_prediction_by_hand() -> None:
    # Two classes at 0.5 everywhere, 1 of 4 voxels foreground: Dice = 2 * 0.5 / (1 + 2) = 1/3.
    label = torch.tensor([[[[0, 0], [0, 1]]]])
    loss = SegmentationLoss()(torch.zeros(1, 2, 2, 2), label)
    assert loss.item() == pytest.approx(1 - 1 / 3 + math.log(2), abs=1e-4)


def test_squared_denominator_by_hand() -> None:
    """Two voxels of class 1 of four, all predicted with 0.5: 2 * 1 / (4 * 0.25 + 2) of Dice, ln 2 of cross-entropy."""
    label = torch.tensor([0, 0, 1, 1]).reshape(1, 1, 2, 2)
    loss = SegmentationLoss(squared=True)(torch.zeros(1, 2, 2, 2), label)
    assert loss.item() == pytest.approx(1 - 2 / 3 + math.log(2), abs=1e-4)


def test_batch_dice_pools_the_batch() -> None:
    label = torch.zeros(2, 1, 2, 2, dtype=torch.long)
    label[0, 0, 0, 0] = 1
    logits = torch.zeros(2, 2, 2, 2)
    # Pooled: 2 * 0.5 / (1 + 4) = 0.2. A Dice a sample: 1/3 and 0.
    assert SegmentationLoss(batch_dice=True)(logits, label).item() == pytest.approx(0.8 + math.log(2), abs=1e-4)
    assert SegmentationLoss(batch_dice=False)(logits, label).item() == pytest.approx(5 / 6 + math.log(2), abs=1e-4)


def test_include_background() -> None:
    label = torch.tensor([[[[0, 0], [0, 1]]]])
    # Background: 2 * 1.5 / (3 + 2) = 0.6; the mean with the foreground's 1/3.
    loss = SegmentationLoss(include_background=True)(torch.zeros(1, 2, 2, 2), label)
    assert loss.item() == pytest.approx(1 - (0.6 + 1 / 3) / 2 + math.log(2), abs=1e-4)


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("size", [(8, 8), (8, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_perfect_prediction_under_deep_supervision(num_classes: int, size: tuple, dtype: torch.dtype) -> None:
    # Blocks of 4, so that nearest neighbour leaves every level with the same regions.
    label = torch.zeros(2, 1, *size, dtype=dtype)
    label[:, :, :4] = num_classes - 1
    label[:, :, 4:, :4] = 1
    outputs = [certain_logits(label[(..., *[slice(None, None, 2**i)] * len(size))], num_classes) for i in range(3)]
    loss = SegmentationLoss(include_background=True)
    # With four classes the third occurs nowhere; predicted nowhere, it costs nothing.
    assert loss(outputs, label).item() == pytest.approx(0.0, abs=1e-4)
    assert loss([-output for output in outputs], label).item() > 10


def test_levels_are_weighted_and_the_lowest_has_a_zero_gradient() -> None:
    label = (torch.arange(64).reshape(1, 1, 8, 8) % 3 == 0).long()
    outputs = [torch.randn(1, 2, size, size, requires_grad=True) for size in (8, 4, 2)]
    loss = SegmentationLoss()
    small = torch.nn.functional.interpolate(label.float(), size=(4, 4), mode="nearest-exact")
    expected = 2 / 3 * loss(outputs[0], label) + 1 / 3 * loss(outputs[1], small)
    total = loss(outputs, label)
    torch.testing.assert_close(total, expected)
    total.backward()
    assert outputs[0].grad.abs().sum() > 0
    assert outputs[2].grad is not None
    assert outputs[2].grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_a_float32_loss(dtype: torch.dtype) -> None:
    # 2^18 voxels: a half-precision sum of the probabilities would overflow or stall.
    label = torch.zeros(1, 1, 64, 64, 64, dtype=torch.uint8)
    label[..., :32] = 1
    logits = certain_logits(label, 2, 8.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = SegmentationLoss()(logits.to(dtype), label)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(SegmentationLoss()(logits, label).item(), abs=1e-6)


def test_meta_tensors_do_not_leak() -> None:
    label = MetaTensor(torch.ones(1, 1, 4, 4))
    logits = MetaTensor(torch.zeros(1, 2, 4, 4))
    assert type(SegmentationLoss()(logits, label)) is torch.Tensor


def test_wrong_shapes() -> None:
    with pytest.raises(BadInput, match="at least 2"):
        SegmentationLoss()(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4))
    with pytest.raises(BadInput, match="expected the label as"):
        SegmentationLoss()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 8, 8))
    with pytest.raises(BadInput, match="at least one output"):
        SegmentationLoss()([], torch.zeros(1, 1, 8, 8))


def test_what_lies_outside_the_mask_changes_nothing() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)]
    label = torch.randint(3, (2, 1, 8, 8))
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[..., :4, :] = True
    loss = SegmentationLoss()
    # The Dice's sums and the cross-entropy's mean are those of the upper half alone.
    upper = loss([output[..., : output.shape[2] // 2, :] for output in logits], label[..., :4, :])
    assert loss(logits, label, mask).item() == pytest.approx(upper.item(), rel=1e-5)
    other = torch.where(mask, label, 2 - label)
    assert loss(logits, other, mask).item() == loss(logits, label, mask).item()
    assert loss(logits, label, torch.ones_like(mask)).item() == pytest.approx(loss(logits, label).item(), rel=1e-6)


def test_an_empty_mask_gives_nothing() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = SegmentationLoss()(logits, torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()


def test_a_mask_on_another_grid_is_refused() -> None:
    with pytest.raises(BadInput, match="mask"):
        SegmentationLoss()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 2, 2))
