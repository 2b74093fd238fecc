"""Plain distillation with a temperature (Hinton, Vinyals & Dean, "Distilling the knowledge in a neural network", 2015).

The student learns the frozen teacher's softened distribution at every voxel, certain or not, and the labels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..losses import SegmentationLoss, distillation_loss, sigmoid_ramp_up
from .base import Method, Segmenter

__all__ = ["KnowledgeDistillation"]


class KnowledgeDistillation(Method):
    """``L_sup + weight * R(t) * T^2 KL(teacher_T || student_T)``, the second over the unlabelled crops.

    The paper's weights ``c`` and ``1 - c`` are here ``weight`` and 1. The ramp-up, and the student's strong view beside
    the teacher's weak one, are :class:`~common.methods.Distillation`'s, so that the two methods compare.

    Args:
        network: the student, a :class:`~common.networks.SegmentationNetwork`.
        teacher: the frozen teacher.
        segmentation_loss: for the labelled stream.
        temperature: T.
        consistency_weight: after the ramp-up.
        ramp_up: length of the ramp-up as a share of the run.
    """

    frozen = ("teacher",)

    def __init__(
        self,
        network: Segmenter,
        teacher: Segmenter,
        segmentation_loss: SegmentationLoss | None = None,
        temperature: float = 2.0,
        consistency_weight: float = 1.0,
        ramp_up: float = 0.2,
    ) -> None:
        super().__init__()
        self.network = network
        self.teacher = teacher
        self.segmentation_loss = segmentation_loss or SegmentationLoss()
        self.temperature = temperature
        self.consistency_weight = consistency_weight
        self.ramp_up = ramp_up
        self.freeze()

    def forward(self, batch: Mapping[str, Mapping[str, Tensor]], optimizer: str = "") -> dict[str, Tensor]:
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        count = labeled["image"].shape[0]
        with torch.no_grad():
            teacher = self.teacher(unlabeled["image"])
        _, logits = self.network.forward_all(torch.cat([labeled["image"], unlabeled["strong"]]))
        segmentation = self.supervise(logits, labeled)
        distillation = distillation_loss(logits[0][count:], teacher, None, self.temperature, weight=1.0)
        weight = self.consistency_weight * sigmoid_ramp_up(self.step, self.ramp_up * self.total_steps)
        return {
            "loss": segmentation + weight * distillation,
            "segmentation": segmentation,
            "consistency": distillation,
        }
