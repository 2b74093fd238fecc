"""Focal loss beside Dice."""

from __future__ import annotations

import math

import pytest
import torch

from common.errors import BadInput
from common.losses import FocalDiceLoss, SegmentationLoss


def volume(*rows: list[float]) -> torch.Tensor:
    """Class probabilities (1, K, 1, voxels)."""
    return torch.tensor(rows).reshape(1, len(rows), 1, -1)


def test_by_hand() -> None:
    """Two voxels of the classes 1 and 0 with probabilities 0.6 and 0.9."""
    probabilities, label = volume([0.4, 0.9], [0.6, 0.1]), torch.tensor([1, 0]).reshape(1, 1, 1, 2)
    loss = FocalDiceLoss(gamma=2.0, focal_weight=3.0, dice_weight=0.1, class_weights=[1.0, 5.0])
    focal = (5 * 0.4**2 * -math.log(0.6) + 0.1**2 * -math.log(0.9)) / 2
    dice = 1 - 2 * 0.6 / (0.7 + 1)
    assert loss(probabilities.log(), label).item() == pytest.approx(3 * focal + 0.1 * dice, rel=1e-4)


def test_without_focus_it_is_cross_entropy_and_dice() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(2, 3, size, size, generator=generator) for size in (8, 4, 2)]
    label = torch.randint(3, (2, 1, 8, 8), generator=generator)
    mask = torch.rand(2, 1, 8, 8, generator=generator) < 0.5
    plain, focal = SegmentationLoss(), FocalDiceLoss(gamma=0.0)
    for arguments in ((), (mask,), (torch.zeros_like(mask),)):
        torch.testing.assert_close(focal(outputs, label, *arguments), plain(outputs, label, *arguments))
    known = label.clamp(max=1)
    torch.testing.assert_close(
        focal(outputs, known, annotated=[[1], None]), plain(outputs, known, annotated=[[1], None])
    )


def test_it_does_not_call_an_unknown_structure_background() -> None:
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    FocalDiceLoss()(logits, torch.zeros(1, 1, 4, 4), annotated=[[1]]).backward()
    assert (logits.grad[:, 2] < 0).all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("settings", [{"gamma": -1.0}, {"dice_weight": -1.0}, {"class_weights": [1.0, -1.0]}])
def test_negative_settings(settings: dict) -> None:
    with pytest.raises(BadInput, match="at least 0"):
        FocalDiceLoss(**settings)
