"""Keeping a student's features near its teacher's.

Hints at intermediate layers: Romero et al., "FitNets: hints for thin deep nets", ICLR 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from monai.networks.layers import Conv
from torch import Tensor, nn

from ..errors import BadInput

__all__ = ["FeatureAlignment"]

Item = TypeVar("Item")

KINDS = ("mse", "cosine")
# Features shorter than this are not stretched to unit length: at a voxel where all are 0 (outside the body, say) that
# would multiply the gradient by the inverse of PyTorch's 1e-12.
SHORTEST = 1e-3


class FeatureAlignment(nn.Module):
    """The distance of two encoders' features at chosen stages, averaged over the stages.

    With f and g the two feature vectors of a voxel, each divided by its Euclidean length along the channels:

    - ``"mse"``: the squared distance ``sum over channels of (f - g)^2``, averaged over voxels and batch;
    - ``"cosine"``: ``1 - f . g``, averaged likewise.

    Both are indifferent to the features' scale, and for unit vectors the first is ``2 - 2 f . g``, twice the second:
    they differ in what the weight in front of them means. The teacher's features are constants. Computed in float32.

    Where the widths differ, a 1x1 convolution without bias brings the student's features to the teacher's width. It is
    a parameter of this module, so the optimiser must be given it; the trained student does not need it.

    Args:
        stages: the stages to align, indices into the encoders' lists of features; -1 is the last, lowest one.
        kind: ``"mse"`` or ``"cosine"``.
        student_channels: width of each of the student's stages (all of them, not only the chosen); needed, as is the
            next, where widths differ.
        teacher_channels: width of each of the teacher's stages.
        spatial_dims: 2 or 3.

    Raises:
        BadInput: when there is no stage, one does not exist, the kind is unknown, or only one list of widths is given.
    """

    def __init__(
        self,
        stages: Sequence[int],
        kind: str = "mse",
        student_channels: Sequence[int] | None = None,
        teacher_channels: Sequence[int] | None = None,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        if not stages:
            raise BadInput("stages is empty; name at least one stage to align, or set the alignment's weight to 0.")
        if kind not in KINDS:
            raise BadInput(f"kind={kind!r}: expected one of {', '.join(KINDS)}.")
        if (student_channels is None) != (teacher_channels is None):
            raise BadInput("Of student_channels and teacher_channels one is missing; give both or neither.")
        self.stages = list(stages)
        self.kind = kind
        self.projections = nn.ModuleDict()
        if student_channels is None or teacher_channels is None:
            return
        for stage in self.stages:
            student_width = _at(student_channels, stage, "student_channels")
            teacher_width = _at(teacher_channels, stage, "teacher_channels")
            if student_width != teacher_width:
                convolution = Conv[Conv.CONV, spatial_dims]
                self.projections[str(stage)] = convolution(student_width, teacher_width, kernel_size=1, bias=False)

    def forward(self, student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
        """The loss, a scalar.

        Args:
            student_features: the student's features, one (B, C_i, *spatial_i) a stage.
            teacher_features: the teacher's, on the same grids.

        Raises:
            BadInput: when a stage does not exist, or the features of one differ in grid, or in width without a
                projection.
        """
        losses = []
        for stage in self.stages:
            student = _at(student_features, stage, "the student's features").float()
            teacher = _at(teacher_features, stage, "the teacher's features").detach().float()
            with torch.autocast(device_type=student.device.type, enabled=False):
                if str(stage) in self.projections:
                    student = self.projections[str(stage)](student)
                _check_match(stage, student, teacher)
                losses.append(self._distance(student, teacher))
        return torch.stack(losses).mean()

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        student = F.normalize(student, dim=1, eps=SHORTEST)
        teacher = F.normalize(teacher, dim=1, eps=SHORTEST)
        if self.kind == "mse":
            return (student - teacher).square().sum(dim=1).mean()
        return (1.0 - (student * teacher).sum(dim=1)).mean()


def _at(values: Sequence[Item], stage: int, name: str) -> Item:
    if not -len(values) <= stage < len(values):
        raise BadInput(f"stages has {stage}, but {name} has {len(values)} stages; expected 0 to {len(values) - 1}.")
    return values[stage]


def _check_match(stage: int, student: Tensor, teacher: Tensor) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise BadInput(
            f"Stage {stage}: the student has {student.shape[1]} channels, the teacher {teacher.shape[1]}. "
            "Give student_channels and teacher_channels, so that a projection is made."
        )
    if student.shape != teacher.shape:
        raise BadInput(
            f"Stage {stage}: features of {tuple(student.shape)} (student) and {tuple(teacher.shape)} (teacher); "
            "expected the same batch and grid. Align networks of the same strides, on the same crop."
        )
