"""Labels that know only some of the structures."""

from __future__ import annotations

import math

import pytest
import torch

from common.errors import BadInput
from common.losses import SegmentationLoss, merge_unknown, unknown_classes


def test_unknown_classes() -> None:
    assert unknown_classes(None, 2, 3) is None
    assert unknown_classes([None, None], 2, 3) is None
    unknown = unknown_classes([[0, 2], None, [1]], 3, 4)
    assert unknown.tolist() == [[False, True, False, True], [False] * 4, [False, False, True, True]]
    with pytest.raises(BadInput, match="7"):
        unknown_classes([[7]], 1, 3)
    with pytest.raises(BadInput, match="2 cases"):
        unknown_classes([[1]], 2, 3)


def test_unknown_probability_goes_to_the_background() -> None:
    probabilities = torch.tensor([[0.5, 0.2, 0.3], [0.5, 0.2, 0.3]]).reshape(2, 3, 1, 1)
    merged = merge_unknown(probabilities.log(), unknown_classes([[0, 1], None], 2, 3)).softmax(1)
    torch.testing.assert_close(merged[0].flatten(), torch.tensor([0.8, 0.2, 0.0]))
    torch.testing.assert_close(merged[1].flatten(), torch.tensor([0.5, 0.2, 0.3]))


def test_loss_by_hand() -> None:
    """Two voxels, organ 2 not annotated: cross-entropy -log(p0 + p2) and -log p1; the Dice of organ 1 alone."""
    probabilities = torch.tensor([[0.2, 0.1], [0.3, 0.6], [0.5, 0.3]]).reshape(1, 3, 1, 2)
    label = torch.tensor([0, 1]).reshape(1, 1, 1, 2)
    loss = SegmentationLoss()(probabilities.log(), label, annotated=[[0, 1]])
    dice = 2 * 0.6 / (0.9 + 1)
    assert loss.item() == pytest.approx(1 - dice - (math.log(0.7) + math.log(0.6)) / 2, rel=1e-4)


def test_nothing_calls_an_unknown_structure_background() -> None:
    """The gradient of a voxel labelled 0 does not care how background and the unknown structure share it."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, dtype=torch.double, requires_grad=True)
    label = torch.zeros(2, 1, 4, 4)
    SegmentationLoss()(logits, label, annotated=[[0, 1], [0, 1]]).backward()
    odds = logits.grad[:, 2] / logits.grad[:, 0]
    torch.testing.assert_close(odds, (logits[:, 2] - logits[:, 0]).exp().detach(), rtol=1e-3, atol=1e-3)
    assert (logits.grad[:, 2] < 0).all(), "a step raises the unknown structure's logit along with the background's"
    logits.grad = None
    SegmentationLoss()(logits, label).backward()
    assert (logits.grad[:, 2] > 0).all(), "without `annotated` it is pushed down"


@pytest.mark.parametrize("batch_dice", [True, False])
def test_cases_of_different_organs_are_learnt_together(batch_dice: bool) -> None:
    """A perfect prediction of everything costs nothing, whichever organ each case is annotated for."""
    truth = torch.randint(3, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    logits = 50 * torch.nn.functional.one_hot(truth[:, 0], 3).movedim(-1, 1).float()
    label = truth.clone()
    label[0][truth[0] == 2] = 0
    label[1][truth[1] == 1] = 0
    loss = SegmentationLoss(batch_dice=batch_dice)
    assert loss(logits, label, annotated=[[0, 1], [0, 2]]).item() == pytest.approx(0, abs=1e-4)
    assert loss(logits, label).item() > 1
    assert loss(logits, truth, annotated=[None, None]).item() == loss(logits, truth).item()
