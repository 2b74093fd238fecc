"""CPS: cross pseudo supervision (Chen et al., "Semi-supervised semantic segmentation with cross pseudo supervision",
CVPR 2021).

Two networks of one kind and different initial weights learn the labels, and each learns the other's hard predictions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import SegmentationLoss, sigmoid_ramp_up
from ..networks.reductions import likeliest_class
from ..networks.unet import initialise
from .base import Method, Segmenter

__all__ = ["CrossPseudoSupervision"]


class CrossPseudoSupervision(Method):
    """``L_sup(1) + L_sup(2) + weight * R(t) * (L_cps(labelled) + L_cps(unlabelled))``, with
    ``L_cps = CE(p_1, argmax p_2) + CE(p_2, argmax p_1)``, a mean over the voxels.

    That is the paper's sum; its code takes one mean over all crops, medical code the unlabelled ones alone. The ramp-up
    is of the latter. Both networks are in one optimiser, which for SGD is the same as one each but for the gradients'
    clipping, whose norm is that of both. Only the second network's convolutions are drawn anew; other weights, where a
    network has any, start alike.

    Args:
        network: a :class:`~common.networks.SegmentationNetwork`, the one that is deployed.
        segmentation_loss: for the labelled stream.
        consistency_weight: after the ramp-up. 1.5 in the paper (natural images); 0.1 in medical code beside half the
            sum of Dice and cross-entropy, which here is the whole sum.
        ramp_up: length of the ramp-up as a share of the run.
    """

    def __init__(
        self,
        network: Segmenter,
        segmentation_loss: SegmentationLoss | None = None,
        consistency_weight: float = 0.2,
        ramp_up: float = 1.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.second = copy.deepcopy(network)
        initialise(self.second)
        self.segmentation_loss = segmentation_loss or SegmentationLoss()
        self.consistency_weight = consistency_weight
        self.ramp_up = ramp_up

    def forward(self, batch: Mapping[str, Mapping[str, Tensor]], optimizer: str = "") -> dict[str, Tensor]:
        labeled = batch["labeled"]
        count = labeled["image"].shape[0]
        images = torch.cat([labeled["image"], batch["unlabeled"]["image"]])
        first, second = (network.forward_all(images)[1] for network in (self.network, self.second))
        segmentation = self.supervise(first, labeled) + self.supervise(second, labeled)
        terms = [
            _cross_entropy(first[0][part], second[0][part]) + _cross_entropy(second[0][part], first[0][part])
            for part in (slice(count), slice(count, None))
        ]
        consistency = torch.stack(terms).sum()
        weight = self.consistency_weight * sigmoid_ramp_up(self.step, self.ramp_up * self.total_steps)
        return {
            "loss": segmentation + weight * consistency,
            "segmentation": segmentation,
            "consistency": consistency,
            "agreement": (likeliest_class(first[0]) == likeliest_class(second[0])).float().mean(),
        }


def _cross_entropy(logits: Tensor, other: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), likeliest_class(other.detach()).squeeze(1))
