"""Co-training of weight-averaged models (Huang et al., "Multi-organ segmentation via co-training weight-averaged models
from few-organ datasets", MICCAI 2020).

Single-organ networks have completed every case's label with hard pseudo-labels (:mod:`common.completion`). Two networks
of one kind and different initial weights learn the completed labels, and each learns the soft predictions of the other
one's moving average, which are better than the hard labels where those are wrong. Only the region of the structures
that a case is not annotated for is taught so: the others have a label made by people.

The moving averages see the same crops as the networks. The paper works on slices in 2D.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadInput
from ..losses import FocalDiceLoss, SegmentationLoss, sigmoid_ramp_up, unknown_classes
from ..losses.partial_labels import Annotated
from ..losses.processes import mean_count
from ..networks.reductions import likeliest_class
from ..networks.unet import initialise
from .base import Method, Segmenter
from .moving_average import MovingAverage

__all__ = ["CoTraining", "soft_cross_entropy", "unannotated_region"]


def unannotated_region(label: Tensor, annotated: Annotated, num_classes: int, dilation: int) -> Tensor:
    """The region mask: where a completed label has, or is near, a structure that its case is not annotated for.

    Args:
        label: (B, 1, *spatial), completed class ids.
        annotated: the ids that people have labelled, a case; None where that is all, so there is nothing to teach.
        num_classes: K, background included.
        dilation: voxels by which the pseudo-labels are dilated, in all directions.

    Returns:
        (B, 1, *spatial), bool; never a voxel of a structure that the case is annotated for.
    """
    unknown = unknown_classes(annotated, label.shape[0], num_classes)
    if unknown is None:
        return torch.zeros_like(label, dtype=torch.bool)
    pseudo = torch.stack([row.to(case.device)[case.long()] for row, case in zip(unknown, label, strict=True)])
    pool = F.max_pool3d if label.dim() == 5 else F.max_pool2d
    near = pool(pseudo.float(), 2 * dilation + 1, stride=1, padding=dilation).bool()
    return near & (pseudo | (label == 0))


def soft_cross_entropy(logits: Tensor, probabilities: Tensor, mask: Tensor) -> Tensor:
    """``-sum_c q_c log p_c`` with the soft labels q, averaged over the voxels of a mask; 0 when it has none.

    Args:
        logits: (B, K, *spatial).
        probabilities: q, (B, K, *spatial), taken as constant.
        mask: (B, 1, *spatial), bool.
    """
    loss = -(probabilities.detach().float() * F.log_softmax(logits.float(), dim=1)).sum(dim=1, keepdim=True)
    return torch.where(mask, loss, 0.0).sum() / mean_count(mask)


class CoTraining(Method):
    """``L_hard(1) + L_hard(2) + soft_weight * R(t) * (L_soft(1, E2) + L_soft(2, E1))``.

    ``L_hard`` compares a network with the completed label, ``L_soft`` with the other one's moving average E under
    :func:`unannotated_region`. Both networks are in one optimiser.

    Args:
        network: a :class:`~common.networks.SegmentationNetwork`, the first of the two.
        segmentation_loss: of the completed labels; by default the paper's focal loss + 0.1 Dice.
        soft_weight: of the soft labels, after the ramp-up; 0.1 in the paper.
        decay: of the moving averages; 0.999 in the paper.
        ramp_up: length of the ramp-up as a share of the run.
        dilation: of the region mask, in voxels.
        deploy: whose moving average is deployed, that of the ``"first"`` or of the ``"second"`` network.

    Raises:
        BadInput: an unknown ``deploy``, or a negative ``dilation``.
    """

    def __init__(
        self,
        network: Segmenter,
        segmentation_loss: SegmentationLoss | None = None,
        soft_weight: float = 0.1,
        decay: float = 0.999,
        ramp_up: float = 0.2,
        dilation: int = 2,
        deploy: str = "first",
    ) -> None:
        super().__init__()
        if deploy not in ("first", "second"):
            raise BadInput(f"deploy: found {deploy!r}, expected 'first' or 'second', the network whose average it is.")
        if dilation < 0:
            raise BadInput(f"dilation: found {dilation!r}, expected a number of voxels, at least 0.")
        self.network = network
        self.second = copy.deepcopy(network)
        initialise(self.second)
        self.average = MovingAverage(self.network, decay)
        self.second_average = MovingAverage(self.second, decay)
        self.segmentation_loss = segmentation_loss or FocalDiceLoss(dice_weight=0.1)
        self.soft_weight = soft_weight
        self.ramp_up = ramp_up
        self.dilation = dilation
        self.deploy = deploy

    @property
    def deployed(self) -> nn.Module:
        """The moving average of one of the networks."""
        return (self.average if self.deploy == "first" else self.second_average).module

    def forward(self, batch: Mapping[str, Mapping[str, Any]], optimizer: str = "") -> dict[str, Tensor]:
        labeled = batch["labeled"]
        image, label = labeled["image"], labeled["label"]
        outputs = [network.forward_all(image)[1] for network in (self.network, self.second)]
        # The label is complete: all of it is learnt, whatever people have labelled of it.
        hard = torch.stack([self.segmentation_loss(logits, label) for logits in outputs]).sum()
        mask = unannotated_region(label, labeled.get("annotated"), outputs[0][0].shape[1], self.dilation)
        with torch.no_grad():
            taught = [average(image).float().softmax(1) for average in (self.second_average, self.average)]
        pairs = zip(outputs, taught, strict=True)
        soft = torch.stack([soft_cross_entropy(logits[0], other, mask) for logits, other in pairs]).sum()
        weight = self.soft_weight * sigmoid_ramp_up(self.step, self.ramp_up * self.total_steps)
        return {
            "loss": hard + weight * soft,
            "segmentation": hard,
            "consistency": soft,
            "region": mask.float().mean(),
            "agreement": (likeliest_class(outputs[0][0]) == likeliest_class(outputs[1][0])).float().mean(),
        }

    def after_step(self) -> None:
        self.average.update_parameters(self.network)
        self.second_average.update_parameters(self.second)
