"""Stage 2: a student learns from few labels and from a teacher's certain predictions on unlabelled volumes.

The loss is ``L_sup + weight * R(t) * L_cons + alignment_weight * L_align``. The teacher labels a weakly augmented view
of an unlabelled crop, the student learns those labels on a strongly augmented view of the same voxels, only where the
teacher is certain (FixMatch, Sohn et al., NeurIPS 2020, brought to voxels), and its encoder features stay near the
teacher's (FitNets, Romero et al., ICLR 2015).

Strong views and labelled crops swap boxes, voxels with their labels (CutMix, Yun et al., ICCV 2019; BCP, Bai et al.,
CVPR 2023). The few labelled volumes are then never seen twice in the same surroundings, and labels and pseudo-labels
are learnt in one image.
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
from .base import Method, Segmenter
from .moving_average import MovingAverage

__all__ = ["Distillation"]


def random_boxes(batch: Tensor, probability: float, sides: Sequence[float] = (0.25, 0.75)) -> Tensor:
    """A random box in each item of a batch (B, C, *spatial), as a mask (B, 1, *spatial).

    An item has a box with ``probability``, else none.

    Args:
        batch: gives the shape.
        probability: of a box.
        sides: shortest and longest side, as shares of the item's.
    """
    shortest, longest = sides
    size = batch.shape[2:]
    mask = torch.zeros((batch.shape[0], 1, *size), dtype=torch.bool)
    for item in mask:
        if torch.rand(()) < probability:
            shares = [shortest + (longest - shortest) * float(torch.rand(())) for _ in size]
            lengths = [max(1, round(length * share)) for length, share in zip(size, shares, strict=True)]
            starts = [int(torch.randint(whole - length + 1, ())) for whole, length in zip(size, lengths, strict=True)]
            item[(0, *(slice(start, start + length) for start, length in zip(starts, lengths, strict=True)))] = True
    return mask.to(batch.device)


def swap_boxes(first: Tensor, second: Tensor, box: Tensor) -> Tensor:
    """Two batches in one, (B1 + B2, C, *spatial), the boxes swapped between the leading items of both.

    Args:
        first: (B1, C, *spatial).
        second: (B2, C, *spatial).
        box: (B, 1, *spatial), bool, B at most B1 and B2.
    """
    pairs = box.shape[0]
    one, other = first[:pairs], second[:pairs]
    return torch.cat([torch.where(box, other, one), first[pairs:], torch.where(box, one, other), second[pairs:]])


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
        mix_probability: how often a labelled crop and a strong view swap a box, labels and pseudo-labels with it.
        mix_sides: shortest and longest side of such a box, as shares of the crop's.
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
        network: Segmenter,
        teacher: Segmenter,
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
        mix_sides: Sequence[float] = (0.25, 0.75),
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
        self.mix_sides = tuple(mix_sides)
        self.average = MovingAverage(network, decay) if decay is not None else None
        self.labels_from = labels_from
        self.deploy = deploy
        self.warm_up = warm_up
        self.freeze()

    @property
    def deployed(self) -> nn.Module:
        """The network to validate and to write."""
        return self.network if self.deploy == "network" or self.average is None else self.average.module

    @property
    def teacher_labels(self) -> bool:
        """Whether the frozen teacher gives the labels at this step."""
        return self.labels_from == "teacher" or self.step < self.warm_up * self.total_steps

    def forward(self, batch: Mapping[str, Mapping[str, Tensor]], optimizer: str = "") -> dict[str, Tensor]:
        labeled, unlabeled = batch["labeled"], batch["unlabeled"]
        weak, strong = unlabeled["image"], unlabeled["strong"]
        labeler: nn.Module = self.teacher
        other: nn.Module | None = self.average
        if self.average is not None and not self.teacher_labels:
            labeler, other = self.average, self.teacher
        with torch.no_grad():
            estimate = self.estimator(labeler, weak, other)
            thresholds = self.threshold(self.step / self.total_steps, len(self.class_names))
            mask = confidence_mask(estimate, thresholds.to(estimate.certainty.device))
            kept = kept_fraction(mask, estimate.probabilities)
            fraction = mask.float().mean()

        label = labeled["label"].long()
        count = label.shape[0]
        box = random_boxes(strong[:count], self.mix_probability, self.mix_sides)
        supervised_voxels = swap_boxes(torch.ones_like(label, dtype=torch.bool), torch.zeros_like(mask), box)
        certain_voxels = swap_boxes(torch.zeros_like(label, dtype=torch.bool), mask, box)
        labels = swap_boxes(label, torch.zeros_like(mask, dtype=label.dtype), box)
        unknown = estimate.probabilities.new_zeros(count, *estimate.probabilities.shape[1:])
        probabilities = swap_boxes(unknown, estimate.probabilities, box)

        features, logits = self.network.forward_all(swap_boxes(labeled["image"], strong, box))
        known = list(labeled.get("annotated") or [None] * count)
        # A box's labelled voxels are those of the crop that it was swapped with.
        known += (known[: box.shape[0]] + [None] * len(strong))[: len(strong)]
        supervised = self.segmentation_loss(logits, labels, supervised_voxels, known)
        consistency = self.consistency(logits, probabilities, certain_voxels)
        ramp = sigmoid_ramp_up(self.step, self.ramp_up * self.total_steps)
        loss = supervised + self.consistency_weight * ramp * consistency
        terms = {"loss": loss, "segmentation": supervised, "consistency": consistency}
        if self.alignment is not None and self.alignment_weight > 0 and self.teacher_labels:
            with torch.no_grad():
                teacher_features = self.teacher.encoder(swap_boxes(labeled["image"], weak, box)[count:])
            terms["alignment"] = self.alignment([level[count:] for level in features], teacher_features)
            terms["loss"] = loss + self.alignment_weight * terms["alignment"]
        terms["kept/all"] = fraction
        terms.update({f"kept/{name}": value for name, value in zip(self.class_names, kept, strict=True)})
        return terms

    def after_step(self) -> None:
        if self.average is not None:
            self.average.update_parameters(self.network)
