"""The supervised segmentation loss of nnU-Net v2: Dice and cross-entropy under deep supervision.

Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation", Nature
Methods 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks import one_hot
from monai.utils import convert_to_tensor
from torch import Tensor, nn

from ..errors import BadInput
from .partial_labels import Annotated, merge_unknown, unknown_classes
from .processes import PooledDice, distributed, mean_count, mean_over_processes

__all__ = ["SegmentationLoss", "deep_supervision_weights", "resized"]


def deep_supervision_weights(levels: int) -> list[float]:
    """nnU-Net's weights of the outputs, highest resolution first: 1/2^i, the lowest 0, normalised to a sum of 1.

    Args:
        levels: the number of outputs; a single one has weight 1.

    Raises:
        BadInput: when ``levels`` is less than 1.
    """
    if levels < 1:
        raise BadInput(f"levels={levels!r}: deep supervision needs at least one output.")
    weights = [0.5**level for level in range(levels)]
    if levels > 1:
        weights[-1] = 0.0
    total = sum(weights)
    return [weight / total for weight in weights]


class SegmentationLoss(nn.Module):
    """Dice + cross-entropy of one or several outputs, weighted by :func:`deep_supervision_weights`.

    The label is brought to each output's size by nearest neighbour. Computed in float32, whatever autocast does: sums
    over a volume do not fit a half-precision number. The Dice enters as ``1 - Dice``, nnU-Net's as ``-Dice``: the
    values differ by 1, the gradients are the same. Several processes that train together divide by what all their
    batches hold, so each has to call it as often as the others.

    Args:
        batch_dice: sum the Dice's overlaps over the batch, of all processes, before the division (nnU-Net's choice for
            patches), rather than a Dice a sample, in which a class that a patch lacks costs a whole point.
        include_background: let class 0 count in the Dice; it always does in the cross-entropy.
        squared: square probabilities and label in the Dice's denominator, as V-Net's authors do.
    """

    def __init__(self, batch_dice: bool = True, include_background: bool = False, squared: bool = False) -> None:
        super().__init__()
        self.batch_dice = batch_dice
        self.include_background = include_background
        self.dice = PooledDice(
            include_background=include_background,
            batch=batch_dice,
            squared_pred=squared,
            smooth_nr=1e-5,
            smooth_dr=1e-5,
            reduction="none",
        )

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        label: Tensor,
        mask: Tensor | None = None,
        annotated: Annotated = None,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            logits: (B, K, *spatial), or a list of them from high to low resolution.
            label: (B, 1, *spatial), class ids 0 to K - 1, at the first output's size.
            mask: (B, 1, *spatial), bool, the voxels that count, both in the Dice's sums and in the cross-entropy's
                mean; by default all. None at all gives 0.
            annotated: the class ids that each case's label knows. The others count as background with it, and have no
                Dice of their own, so a label's 0 never calls a structure that it does not know background.

        Raises:
            BadInput: when there is no output, fewer than two classes, label and first output differ in size, or
                ``annotated`` does not fit.
        """
        outputs = [logits] if isinstance(logits, Tensor) else list(logits)
        weights = deep_supervision_weights(len(outputs))
        first = outputs[0]
        if first.shape[1] < 2:
            raise BadInput(f"The network gives {first.shape[1]} class; expected at least 2, background included.")
        for name, volume in (("label", label), ("mask", mask)):
            if volume is not None and volume.shape != (first.shape[0], 1, *first.shape[2:]):
                raise BadInput(
                    f"The {name} has shape {tuple(volume.shape)}, the network's output {tuple(first.shape)}; expected "
                    f"the {name} as {(first.shape[0], 1, *first.shape[2:])}. Crop or pad image and {name} alike."
                )
        # As floats, because PyTorch has no nearest interpolation of integers; ids stay exact.
        label = convert_to_tensor(label, track_meta=False).float()
        mask = None if mask is None else mask.float()
        unknown = unknown_classes(annotated, first.shape[0], first.shape[1])
        with torch.autocast(device_type=first.device.type, enabled=False):
            # The lowest output's weight of 0 keeps it in the graph, so that distributed training finds a gradient for
            # it.
            losses = (
                weight * self._level(convert_to_tensor(output, track_meta=False).float(), label, mask, unknown)
                for weight, output in zip(weights, outputs, strict=True)
            )
            return sum(losses, label.new_zeros(()))

    def _level(self, logits: Tensor, label: Tensor, mask: Tensor | None, unknown: Tensor | None) -> Tensor:
        size = logits.shape[2:]
        if unknown is not None:
            logits = merge_unknown(logits, unknown)
        target = resized(label, size).long()
        probabilities, reference = logits.softmax(1), one_hot(target, logits.shape[1])
        if mask is None:
            return self._dice(probabilities, reference, unknown) + F.cross_entropy(logits, target.squeeze(1))
        mask = resized(mask, size)
        cross_entropy = F.cross_entropy(logits, target.squeeze(1), reduction="none").unsqueeze(1)
        dice = self._dice(probabilities * mask, reference * mask, unknown)
        return dice + (cross_entropy * mask).sum() / mean_count(mask)

    def _dice(self, probabilities: Tensor, reference: Tensor, unknown: Tensor | None) -> Tensor:
        """The mean over the classes that are known (with ``batch_dice`` to any case of the batch)."""
        loss = self.dice(probabilities, reference).flatten(0 if self.batch_dice else 1)
        if unknown is None and not distributed():
            return loss.mean()
        # Of several processes each has to ask the others, whatever its own cases know.
        if unknown is None:
            unknown = torch.zeros(reference.shape[:2], dtype=torch.bool)
        known = ~unknown[:, 0 if self.include_background else 1 :].to(loss.device)
        known = mean_over_processes(known.any(0).float()) > 0 if self.batch_dice else known
        return (loss * known).sum() / mean_count(known)


def resized(volume: Tensor, size: torch.Size) -> Tensor:
    """A volume (B, C, *spatial) at another ``size``, each voxel that of the nearest: for labels and masks."""
    return volume if volume.shape[2:] == size else F.interpolate(volume, size=size, mode="nearest-exact")
