"""Stage 2: a student learns from few labels and from a teacher's certain predictions on unlabelled volumes.

The loss is ``L_sup + weight * R(t) * L_cons + alignment_weight * L_align``. The teacher labels a weakly augmented view
of an unlabelled crop, the student learns those labels on a strongly augmented view of the same voxels, only where the
teacher is certain (FixMatch, Sohn et al., NeurIPS 2020, brought to voxels), and its encoder features stay near the
teacher's (FitNets, Romero et al., ICLR 2015). Boxes of the strong views may be swapped within the batch together with
their labels (CutMix, Yun et al., ICCV 2019; French et al., BMVC 2020: what segmentation needs is strong, varied
perturbation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..losses import (
    ConfidenceMaskedConsistency,
    FeatureAlignment,
    HighestProbability,
    SegmentationLoss,
    Threshold,
    confidence_mask,
    kept_fraction,
    sigmoid_ramp_up,
)
from .base import Method
from .moving_average import MovingAverage

__all__ = ["Distillation"]


def random_boxes(batch: Tensor, probability: float) -> Tensor:
    """A random box in each item of a batch (B, C, *spatial), as a mask (B, 1, *spatial).

    An item has a box with ``probability``, else none; its sides are a quarter to three quarters of the item's.
    """
    size = batch.shape[2:]
    mask = torch.zeros((batch.shape[0], 1, *size), dtype=torch.bool)
    for item in mask:
        if torch.rand(()) < probability:
            sides = [max(1, round(length * (0.25 + 0.5 * float(torch.rand(()))))) for length in size]
            starts = [int(torch.randint(length - side + 1, ())) for length, side in zip(size, sides, strict=True)]
            item[(0, *(slice(start, start + side) for start, side in zip(starts, sides, strict=True)))] = True
    return mask.to(batch.device)


class Distillation(Method):
    """Uncertainty-guided distillation with feature alignment.

    Args:
        network: the student, a :class:`~common.networks.SegmentationNetwork`.
        teacher: the frozen teacher; its width may differ.
        class_names: names of the classes, background first, for the log.
        segmentation_loss: for the labelled stream.
        estimator: how certainty is measured, see :mod:`common.losses.uncertainty`.
        threshold: the certainty from which on a voxel counts, fixed or scheduled over the run.
        consistency: the loss between the student on the strong view and the teacher on the weak one.
        consistency_weight: its weight after the ramp-up.
        ramp_up: length of the sigmoid ramp-up as a fraction of the run.
        alignment: feature alignment, or None.
        alignment_weight: its weight.
        mix_probability: how often a strong view has a box swapped for that of the next unlabelled crop in the batch.
        decay: of the student's moving average. None for none.
        labels_from: ``"teacher"`` (the method as proposed) or ``"moving_average"``: after ``warm_up`` the student's own
            average gives the labels, since a student that has overtaken its teacher should not be held to it. The
            alignment to the teacher's features ends then as well.
        warm_up: fraction of the run in which the teacher labels even then.
        deploy: which weights :attr:`deployed` has: those of the ``"network"``, or their ``"moving_average"``.

    Raises:
        BadInput: an unknown ``labels_from`` or ``deploy``, or ``"moving_average"`` without a ``decay``.
    """

    frozen = ("teacher",)

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module,
        class_names: Sequence[str],
        segmentation_loss: SegmentationLoss | None = None,
        estimator: Callable | None = None,
        threshold: Threshold | None = None,
        consistency: ConfidenceMaskedConsistency | None = None,
        consistency_weight: float = 1.0,
        ramp_up: float = 0.2,
        alignment: FeatureAlignment | None = None,
        alignment_weight: float = 0.1,
        mix_probability: float = 0.5,
        decay: float | None = 0.99,
        labels_from: str = "teacher",
        warm_up: float = 0.2,
        deploy: str = "moving_average",
    ) -> None:
        super().__init__()
        for key, value, source in (("labels_from", labels_from, "teacher"), ("deploy", deploy, "network")):
            if value not in (source, "moving_average"):
                raise BadInput(f"{key}: found {value!r}, expected {source!r} or 'moving_average'.")
            if value == "moving_average" and decay is None:
                raise BadInput(f"{key} is 'moving_average', so decay must be a number such as 0.99, but it is null.")
        self.network = network
        self.teacher = teacher
        self.class_names = list(class_names)
        self.segmentation_loss = segmentation_loss or SegmentationLoss()
        self.estimator = estimator or HighestProbability()
        self.threshold = threshold or Threshold(0.9)
        self.consistency = consistency or ConfidenceMaskedConsistency()
        self.consistency_weight = consistency_weight
        self.ramp_up = ramp_up
        self.alignment = alignment
        self.alignment_weight = alignment_weight
        self.mix_probability = mix_probability
        self.average = MovingAverage(network, decay) if decay is not None else None
        self.labels_from = labels_from
        self.deploy = deploy
        self.warm_up = warm_up
        self.freeze()

    @property
    def deployed(self) -> nn.Module:
        """The network to validate and to write."""
        return self.network if self.deploy == "network" else self.average.module

    @property
    def teacher_labels(self) -> bool:
        """Whether the frozen teacher gives the labels at this step."""
        return self.labels_from == "teacher" or self.step < self.warm_up * self.total_steps

    def forward(self, batch: Mapping[str, Mapping[str, Tensor]], optimizer: str = "") -> dict[str, Tensor]:
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        weak, strong = unlabeled["image"], unlabeled["strong"]
        labeler, other = (self.teacher, self.average) if self.teacher_labels else (self.average, self.teacher)
        with torch.no_grad():
            estimate = self.estimator(labeler, weak, other)
            thresholds = self.threshold(self.step / self.total_steps, len(self.class_names))
            mask = confidence_mask(estimate, thresholds.to(estimate.certainty.device))
            kept = kept_fraction(mask, estimate.probabilities)
            fraction = mask.float().mean()
            box = random_boxes(strong, self.mix_probability)
            weak, strong, mask, probabilities = (
                torch.where(box, view.roll(1, 0), view) for view in (weak, strong, mask, estimate.probabilities)
            )

        count = labeled["image"].shape[0]
        features, logits = self.network.forward_all(torch.cat([labeled["image"], strong]))
        supervised = self.segmentation_loss([level[:count] for level in logits], labeled["label"])
        consistency = self.consistency(logits[0][count:], probabilities, mask)
        ramp = sigmoid_ramp_up(self.step, self.ramp_up * self.total_steps)
        loss = supervised + self.consistency_weight * ramp * consistency
        terms = {"loss": loss, "segmentation": supervised, "consistency": consistency}
        if self.alignment is not None and self.alignment_weight > 0 and self.teacher_labels:
            with torch.no_grad():
                teacher_features = self.teacher.encoder(weak)
            terms["alignment"] = self.alignment([level[count:] for level in features], teacher_features)
            terms["loss"] = loss + self.alignment_weight * terms["alignment"]
        terms["kept/all"] = fraction
        terms.update({f"kept/{name}": value for name, value in zip(self.class_names, kept, strict=True)})
        return terms

    def after_step(self) -> None:
        if self.average is not None:
            self.average.update_parameters(self.network)
