"""Learning from a teacher's predictions, everywhere or only where it is certain.

Temperature, and the factor T^2 that keeps the gradients' size: Hinton, Vinyals & Dean, "Distilling the knowledge in a
neural network", 2015.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.networks import one_hot
from torch import Tensor, nn

from ..errors import BadInput
from ..networks.reductions import likeliest_class
from .processes import PooledDice, mean_count, mean_over_processes
from .segmentation import deep_supervision_weights, resized

__all__ = ["ConfidenceMaskedConsistency", "distillation_loss"]

LABELS = ("soft", "hard")


class ConfidenceMaskedConsistency(nn.Module):
    """How far a student is from its teacher, averaged over the voxels that count.

    - soft labels: ``T^2 KL(teacher_T || student_T)`` a voxel, both distributions softened by the temperature T;
    - hard labels: cross-entropy with the teacher's most probable class; no temperature is involved;
    - with ``dice_weight``, plus that times a soft Dice loss of the same voxels (all samples together), averaged over
      the foreground classes that are the most probable one somewhere among them, for teacher or student. With soft
      labels it is the form that is smallest at equality (Wang et al., "Dice semimetric losses", MICCAI 2023).

    No voxel that counts gives exactly 0, with a graph whose gradients are 0. What lies outside the mask, NaN included,
    changes nothing. Computed in float32. The voxels are those of all processes that train together, each of which has
    to call it as often as the others.

    Args:
        labels: ``"soft"`` or ``"hard"``.
        temperature: T, above 0; 1 leaves the distributions as they are.
        dice_weight: weight of the Dice term, at least 0; 0 leaves it out.

    Raises:
        BadInput: when an argument is out of range.
    """

    def __init__(self, labels: str = "soft", temperature: float = 1.0, dice_weight: float = 0.0) -> None:
        super().__init__()
        if labels not in LABELS:
            raise BadInput(f"labels={labels!r}: expected one of {', '.join(LABELS)}.")
        _check_temperature(temperature)
        if not dice_weight >= 0:
            raise BadInput(f"dice_weight={dice_weight!r}: expected a number that is at least 0.")
        self.labels = labels
        self.temperature = temperature
        self.dice_weight = dice_weight
        self.dice = PooledDice(include_background=False, batch=True, reduction="none", soft_label=labels == "soft")

    def forward(self, student_logits: Tensor | Sequence[Tensor], teacher_probabilities: Tensor, mask: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            student_logits: (B, K, *spatial), or a list of them from high to low resolution, weighted by
                :func:`~common.losses.deep_supervision_weights`; the others are brought to their sizes by nearest
                neighbour.
            teacher_probabilities: (B, K, *spatial), summing to 1 along the classes; taken as constant.
            mask: (B, 1, *spatial), bool, the voxels that count.

        Raises:
            BadInput: when the shapes do not fit one another.
        """
        levels = [student_logits] if isinstance(student_logits, Tensor) else list(student_logits)
        student_logits = levels[0]
        _check_same_shape(student_logits, teacher_probabilities)
        if mask.shape != (student_logits.shape[0], 1, *student_logits.shape[2:]):
            raise BadInput(
                f"The mask has shape {tuple(mask.shape)} for logits of {tuple(student_logits.shape)}; "
                f"expected {(student_logits.shape[0], 1, *student_logits.shape[2:])}."
            )
        teacher, mask = teacher_probabilities.detach().float(), mask.float()
        losses = (
            weight * self._level(level, resized(teacher, level.shape[2:]), resized(mask, level.shape[2:]).bool())
            for weight, level in zip(deep_supervision_weights(len(levels)), levels, strict=True)
        )
        return sum(losses, teacher.new_zeros(()))

    def _level(self, student_logits: Tensor, teacher_probabilities: Tensor, mask: Tensor) -> Tensor:
        # Replaced before any arithmetic: a weight of 0 does not silence a NaN or an infinity.
        student = torch.where(mask, student_logits.float(), 0.0)
        num_classes = student.shape[1]
        teacher = torch.where(mask, teacher_probabilities, 1.0 / num_classes)
        pseudo_label = likeliest_class(teacher)
        if self.labels == "hard":
            loss = F.cross_entropy(student, pseudo_label.squeeze(1), reduction="none").unsqueeze(1)
        else:
            # The smallest normal number instead of 0, so that a class ruled out has a finite logarithm.
            teacher_logits = teacher.clamp_min(torch.finfo(teacher.dtype).tiny).log()
            loss = _softened_divergence(student, teacher_logits, self.temperature)
        loss = (loss * mask).sum() / mean_count(mask)
        if self.dice_weight > 0 and num_classes > 1:
            reference = one_hot(pseudo_label, num_classes) if self.labels == "hard" else teacher
            loss = loss + self.dice_weight * self._dice(student, reference, pseudo_label, mask)
        return loss

    def _dice(self, student: Tensor, reference: Tensor, pseudo_label: Tensor, mask: Tensor) -> Tensor:
        occurs = torch.zeros(student.shape[1], dtype=torch.bool, device=student.device)
        for predicted in (pseudo_label, likeliest_class(student)):
            occurs |= (one_hot(predicted, student.shape[1]).bool() & mask).transpose(0, 1).flatten(1).any(dim=1)
        foreground = mean_over_processes(occurs[1:].float()) > 0
        a_class = self.dice(student.softmax(dim=1) * mask, reference * mask).flatten()
        return (a_class * foreground).sum() / foreground.sum().clamp(min=1)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    temperature: float,
    weight: float,
) -> Tensor:
    """Plain knowledge distillation, ``c T^2 KL(teacher_T || student_T) + (1 - c) CE(student, target)``, mean over
    voxels.

    Args:
        student_logits: (B, K, *spatial).
        teacher_logits: (B, K, *spatial); taken as constant.
        target: (B, 1, *spatial), class ids; may be None when ``weight`` is 1, for images without a label.
        temperature: T, above 0.
        weight: c, between 0 and 1.

    Returns:
        A scalar, computed in float32.

    Raises:
        BadInput: when an argument is out of range, the shapes differ, or a target is needed and there is none.
    """
    _check_temperature(temperature)
    if not 0.0 <= weight <= 1.0:
        raise BadInput(f"weight={weight!r}: expected a number from 0 to 1.")
    _check_same_shape(student_logits, teacher_logits)
    student = student_logits.float()
    distilled = _softened_divergence(student, teacher_logits.detach().float(), temperature).mean()
    if weight == 1.0:
        return distilled
    if target is None:
        raise BadInput(f"No target, but weight={weight!r} mixes cross-entropy in; give the label, or weight=1.")
    supervised = F.cross_entropy(student, target.squeeze(1).long())
    return weight * distilled + (1.0 - weight) * supervised


def _softened_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(teacher_T || student_T)`` a voxel, (B, 1, *spatial)."""
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1, keepdim=True)
    return temperature**2 * divergence


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise BadInput(f"temperature={temperature!r}: expected a number above 0.")


def _check_same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise BadInput(
            f"The student's output has shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; "
            "expected the same classes and the same grid."
        )
