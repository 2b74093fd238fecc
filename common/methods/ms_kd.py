"""MS-KD: many single-organ teachers, one multi-organ student (Feng et al., "MS-KD: Multi-organ segmentation with
multiple binary-labeled datasets", 2021).

Each frozen teacher tells background from one organ. It is believed where it finds its organ, and where no teacher finds
anything all of them are believed together; the student learns these probabilities and, in the teachers' regions, their
features. No label is read: the labels have gone into the teachers, which were trained on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import ignite.distributed as idist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..errors import BadInput
from ..losses.segmentation import resized
from ..networks.reductions import likeliest_class
from .base import Method, Segmenter

__all__ = [
    "MultiTeacherDistillation",
    "PlateauLR",
    "common_background",
    "place_probabilities",
    "region_divergence",
    "sorted_channel_divergence",
]


def place_probabilities(probabilities: Tensor, organ: int, num_classes: int) -> Tensor:
    """A teacher's two probabilities in the student's channels.

    Args:
        probabilities: (B, 2, *spatial), background and organ.
        organ: the organ's class.
        num_classes: the student's classes C.

    Returns:
        (B, C, *spatial): the background in channel 0, the organ in its own, and 0 elsewhere.
    """
    placed = probabilities.new_zeros(probabilities.shape[0], num_classes, *probabilities.shape[2:])
    placed[:, 0], placed[:, organ] = probabilities[:, 0], probabilities[:, 1]
    return placed


def common_background(regions: Sequence[Tensor]) -> Tensor:
    """Where no teacher finds its organ, (B, 1, *spatial), from the regions of the same shape, bool, where each does."""
    return ~torch.stack(list(regions)).any(dim=0)


def region_divergence(student_logits: Tensor, teacher_probabilities: Tensor, region: Tensor) -> Tensor:
    """``KL(teacher || student)`` in a region, as a mean over all voxels: those outside it count as 0.

    Args:
        student_logits: (B, C, *spatial).
        teacher_probabilities: (B, C, *spatial), taken as constant; 0 where a class is none of the teacher's.
        region: (B, 1, *spatial), bool.

    Returns:
        A scalar, computed in float32; 0 for an empty region.
    """
    teacher = teacher_probabilities.detach().float()
    student = F.log_softmax(student_logits.float(), dim=1)
    divergence = (torch.special.xlogy(teacher, teacher) - teacher * student).sum(dim=1, keepdim=True)
    return torch.where(region, divergence, 0.0).mean()


def sorted_channel_divergence(student_features: Tensor, teacher_features: Tensor, region: Tensor) -> Tensor:
    """``KL(teacher || student)`` of softmaxes over the channels of two networks' features, sorted at each voxel.

    Channels of two networks do not correspond, but how activity is shared among them, largest first, does.

    Args:
        student_features: (B, C, *spatial).
        teacher_features: (B, C, *spatial), taken as constant.
        region: (B, 1, *any), bool; brought to the features' size by nearest neighbour.

    Returns:
        A scalar, the mean over all voxels of the features' grid, of which those outside the region count as 0.

    Raises:
        BadInput: the shapes differ.
    """
    if student_features.shape != teacher_features.shape:
        raise BadInput(
            f"MS-KD: the student's features have shape {tuple(student_features.shape)}, the teacher's "
            f"{tuple(teacher_features.shape)}; expected the same. Give both networks the same `features` and "
            "`strides`, or set `feature_weight` to 0."
        )
    student = student_features.float().sort(dim=1, descending=True).values
    teacher = teacher_features.detach().float().softmax(dim=1).sort(dim=1, descending=True).values
    region = resized(region.float(), student.shape[2:]).bool()
    return region_divergence(student, teacher, region)


class MultiTeacherDistillation(Method):
    """``sum_k L_logit(k) + background_weight * L_logit(B) + feature_weight * sum_k L_feat(k)``.

    ``L_logit(k)`` is :func:`region_divergence` from teacher k where its most probable class is its organ;
    ``L_logit(B)`` that from the teachers' average where all say background; ``L_feat(k)``
    :func:`sorted_channel_divergence` of an encoder stage's features in the region of teacher k, summed over the
    ``feature_stages``.

    Args:
        network: the student, a :class:`~common.networks.SegmentationNetwork` of K + 1 classes.
        teachers: K frozen networks of two classes, in the order of the student's classes.
        background_weight: weight of the common background; 1 in the paper.
        feature_weight: weight of the features; 10 in the paper.
        feature_stages: stages of the encoder, 0 being the image's resolution; the paper takes depth 1.

    Raises:
        BadInput: in use, when networks do not fit each other.
    """

    frozen = ("teachers",)

    def __init__(
        self,
        network: Segmenter,
        teachers: Sequence[Segmenter],
        background_weight: float = 1.0,
        feature_weight: float = 10.0,
        feature_stages: Sequence[int] = (1,),
    ) -> None:
        super().__init__()
        self.network = network
        self.teachers = nn.ModuleList(teachers)
        self.background_weight = background_weight
        self.feature_weight = feature_weight
        self.feature_stages = list(feature_stages)
        self.freeze()

    def forward(self, batch: Mapping[str, Mapping[str, Tensor]], optimizer: str = "") -> dict[str, Tensor]:
        image = batch["labeled"]["image"]
        features, logits = self.network.forward_all(image)
        student, classes = logits[0], logits[0].shape[1]
        if classes != len(self.teachers) + 1:
            raise BadInput(
                f"MS-KD: the student has {classes} classes for {len(self.teachers)} teachers; expected one teacher of "
                "each class but the background."
            )
        placed, regions, divergences = [], [], []
        for organ, teacher in enumerate(self.teachers, start=1):
            with torch.no_grad():
                teacher_features, (answer, *_) = cast(Segmenter, teacher).forward_all(image)
            placed.append(place_probabilities(answer.float().softmax(1), organ, classes))
            regions.append(likeliest_class(answer) == 1)
            if self.feature_weight > 0:
                divergences += [
                    sorted_channel_divergence(features[stage], teacher_features[stage], regions[-1])
                    for stage in self.feature_stages
                ]
        zero = torch.zeros((), device=image.device)
        terms = {
            "organs": sum((region_divergence(student, *pair) for pair in zip(placed, regions, strict=True)), zero),
            "background": region_divergence(student, sum(placed, zero) / len(placed), common_background(regions)),
        }
        loss = terms["organs"] + self.background_weight * terms["background"]
        if self.feature_weight > 0:
            terms["features"] = sum(divergences, zero)
            loss = loss + self.feature_weight * terms["features"]
        return {"loss": loss, **terms}


class PlateauLR(ReduceLROnPlateau):
    """Lowers the learning rate when the method's mean loss of some steps has stopped falling.

    It is stepped after every iteration, like other schedules, and gathers the losses itself.

    Args:
        optimizer: whose learning rate it is.
        method: whose ``loss`` counts; in a distributed run the mean of all processes.
        interval: steps to take the mean of; usually an epoch.
        factor: of the learning rate; 0.8 in the paper.
        patience: intervals to wait for a lower loss.
    """

    def __init__(
        self, optimizer: Optimizer, method: nn.Module, interval: int, factor: float = 0.8, patience: int = 10
    ) -> None:
        super().__init__(optimizer, factor=factor, patience=patience)
        self.interval = interval
        self.total, self.count = 0.0, 0
        method.register_forward_hook(self._gather)

    def _gather(self, method: nn.Module, inputs: tuple, terms: Mapping[str, Tensor]) -> None:
        if method.training:
            self.total += float(terms["loss"].detach())
            self.count += 1

    def step(self) -> None:  # type: ignore[override]  # called as other schedules are
        """Count an iteration; at the end of an interval look whether the loss has fallen."""
        if self.count >= self.interval:
            super().step(idist.all_reduce(self.total) / idist.all_reduce(self.count))
            self.total, self.count = 0.0, 0
