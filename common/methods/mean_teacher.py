"""Mean Teacher (Tarvainen & Valpola, "Mean teachers are better role models", NeurIPS 2017), as the segmentation
literature uses it.

The teacher is the moving average of the student. Both see the same unlabelled crops, the student as they are and the
teacher with Gaussian noise, and the squared difference of their softmax outputs is a loss beside the supervised one. In
the paper labelled images count in it too, and both inputs have noise.

The teacher predicts in evaluation mode, with averaged norm statistics and without dropout; much public code leaves it
in training mode. The student is deployed, as the segmentation literature does, not its average, as the paper.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..losses import SegmentationLoss, sigmoid_ramp_up
from .base import Method, Segmenter
from .moving_average import MovingAverage

__all__ = ["MeanTeacher", "clipped_noise"]


def clipped_noise(image: Tensor, standard_deviation: float) -> Tensor:
    """Gaussian noise of the image's shape, clipped to two standard deviations."""
    limit = 2.0 * standard_deviation
    return (torch.randn_like(image) * standard_deviation).clamp(-limit, limit)


class MeanTeacher(Method):
    """``L_sup + weight * R(t) * mean((p_student - p_teacher)^2)``.

    Args:
        network: a :class:`~common.networks.SegmentationNetwork`.
        segmentation_loss: for the labelled stream.
        decay: of the moving average.
        noise: standard deviation of the teacher's noise, clipped at twice that; 0.1 in the literature, for images of
            standard deviation 1.
        consistency_weight: after the ramp-up. The literature's 0.1 stands beside half the sum of Dice and
            cross-entropy, which here is the whole sum.
        ramp_up: length of the ramp-up as a share of the run.
    """

    def __init__(
        self,
        network: Segmenter,
        segmentation_loss: SegmentationLoss | None = None,
        decay: float = 0.99,
        noise: float = 0.1,
        consistency_weight: float = 0.2,
        ramp_up: float = 1.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.segmentation_loss = segmentation_loss or SegmentationLoss()
        self.average = MovingAverage(network, decay)
        self.noise = noise
        self.consistency_weight = consistency_weight
        self.ramp_up = ramp_up

    def forward(self, batch: Mapping[str, Mapping[str, Tensor]], optimizer: str = "") -> dict[str, Tensor]:
        labeled, image = batch["labeled"], batch["unlabeled"]["image"]
        count = labeled["image"].shape[0]
        _, logits = self.network.forward_all(torch.cat([labeled["image"], image]))
        segmentation = self.supervise(logits, labeled)
        terms = self.consistency(logits[0][count:].float().softmax(1), image)
        weight = self.consistency_weight * sigmoid_ramp_up(self.step, self.ramp_up * self.total_steps)
        return {"loss": segmentation + weight * terms["consistency"], "segmentation": segmentation, **terms}

    def consistency(self, student: Tensor, image: Tensor) -> dict[str, Tensor]:
        """The term ``consistency``, and what else is worth logging.

        Args:
            student: the student's probabilities, (B, K, *spatial).
            image: the unlabelled crops, (B, C, *spatial).
        """
        return {"consistency": (student - self.teach(image)).square().mean()}

    @torch.no_grad()
    def teach(self, image: Tensor) -> Tensor:
        """The teacher's probabilities (B, K, *spatial) of a crop with noise."""
        return self.average(image + clipped_noise(image, self.noise)).float().softmax(1)

    def after_step(self) -> None:
        self.average.update_parameters(self.network)
