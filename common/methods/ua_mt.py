"""UA-MT: uncertainty-aware Mean Teacher (Yu et al., "Uncertainty-aware self-ensembling model for semi-supervised 3D
left atrium segmentation", MICCAI 2019).

Mean Teacher in which a voxel counts only where the teacher is certain: where the entropy of its mean prediction over
several noisy passes with dropout lies below a threshold that rises over the run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from ..losses import PredictiveEntropy, SegmentationLoss, kept_fraction, sigmoid_ramp_up
from ..losses.processes import mean_count
from .base import Segmenter
from .mean_teacher import MeanTeacher

__all__ = ["UncertaintyAwareMeanTeacher"]


class UncertaintyAwareMeanTeacher(MeanTeacher):
    """Mean Teacher on the voxels with ``H < (0.75 + 0.25 R(step / total)) ln K``.

    H is the entropy of the teacher's mean softmax over ``passes`` passes. The paper's ln 2 is the ln K of two classes.
    The loss is the sum of the squared differences over classes and kept voxels, divided by K times the kept voxels; no
    voxel kept gives 0. The passes differ by noise, and by dropout where the network has any. The target of the student
    is one more pass, with noise and, unlike the paper's, without dropout.

    Args:
        network: a :class:`~common.networks.SegmentationNetwork`.
        class_names: names of the classes, background first, for the log.
        passes: T.
        segmentation_loss, decay, noise, consistency_weight, ramp_up: see :class:`MeanTeacher`.
    """

    def __init__(
        self,
        network: Segmenter,
        class_names: list[str],
        passes: int = 8,
        segmentation_loss: SegmentationLoss | None = None,
        decay: float = 0.99,
        noise: float = 0.1,
        consistency_weight: float = 0.2,
        ramp_up: float = 1.0,
    ) -> None:
        super().__init__(network, segmentation_loss, decay, noise, consistency_weight, ramp_up)
        self.class_names = list(class_names)
        has_dropout = any(isinstance(module, _DropoutNd) and module.p > 0 for module in network.modules())
        self.estimator = PredictiveEntropy(passes, ["dropout", "noise"] if has_dropout else "noise", noise)

    @property
    def threshold(self) -> float:
        """The entropy below which a voxel counts, as a share of ln K."""
        return 0.75 + 0.25 * sigmoid_ramp_up(self.step, self.total_steps)

    def consistency(self, student: Tensor, image: Tensor) -> dict[str, Tensor]:
        """See :meth:`MeanTeacher.consistency`; adds the share of voxels kept, of all and a class."""
        with torch.no_grad():
            probabilities, _ = self.estimator(self.average, image)
            entropy = torch.special.entr(probabilities).sum(dim=1, keepdim=True)
            mask = entropy < self.threshold * math.log(probabilities.shape[1])
            kept = kept_fraction(mask, probabilities)
        squared = (student - self.teach(image)).square()
        loss = (squared * mask).sum() / (squared.shape[1] * mean_count(mask))
        fractions = {f"kept/{name}": value for name, value in zip(self.class_names, kept, strict=True)}
        return {"consistency": loss, "kept/all": mask.float().mean(), **fractions}
