"""Focal loss beside Dice, for structures of very different sizes and for labels that are partly wrong.

Lin et al., "Focal loss for dense object detection", ICCV 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.losses import FocalLoss
from monai.networks import one_hot
from torch import Tensor

from ..errors import BadInput
from .partial_labels import merge_unknown
from .processes import mean_count
from .segmentation import SegmentationLoss, resized

__all__ = ["FocalDiceLoss"]


class FocalDiceLoss(SegmentationLoss):
    """``focal_weight * focal + dice_weight * Dice`` of one or several outputs, in the place of Dice + cross-entropy.

    The focal loss of a voxel is ``-w_y (1 - p_y)^gamma log p_y`` with y its class, averaged over the voxels. All else,
    masks and ``annotated`` included, is as in :class:`SegmentationLoss`.

    Args:
        gamma: how much less the voxels count that are right already; 0 is cross-entropy.
        focal_weight: weight of the focal loss.
        dice_weight: weight of the Dice.
        class_weights: w, one a class, background first; None for 1 each.
        batch_dice: as in :class:`SegmentationLoss`.
        include_background: as in :class:`SegmentationLoss`.

    Raises:
        BadInput: a negative ``gamma`` or weight.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        focal_weight: float = 1.0,
        dice_weight: float = 1.0,
        class_weights: Sequence[float] | None = None,
        batch_dice: bool = True,
        include_background: bool = False,
    ) -> None:
        super().__init__(batch_dice, include_background)
        if not gamma >= 0 or not all(w >= 0 for w in (focal_weight, dice_weight, *(class_weights or ()))):
            raise BadInput(
                f"focal loss: found gamma {gamma!r} and the weights {focal_weight!r}, {dice_weight!r} and "
                f"{class_weights!r}; expected numbers that are at least 0."
            )
        self.focal = FocalLoss(gamma=gamma, weight=class_weights, use_softmax=True, reduction="none")
        self.focal_weight = focal_weight
        self.dice_weight = dice_weight

    def _level(self, logits: Tensor, label: Tensor, mask: Tensor | None, unknown: Tensor | None) -> Tensor:
        size = logits.shape[2:]
        if unknown is not None:
            logits = merge_unknown(logits, unknown)
        reference = one_hot(resized(label, size).long(), logits.shape[1])
        mask = torch.ones_like(reference[:, :1]) if mask is None else resized(mask, size)
        focal = (self.focal(logits, reference).sum(1, keepdim=True) * mask).sum() / mean_count(mask)
        dice = self._dice(logits.softmax(1) * mask, reference * mask, unknown)
        return self.focal_weight * focal + self.dice_weight * dice
