"""What a loss divides by, over the batches of all processes of a distributed run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from monai.losses import DiceLoss
from monai.losses.utils import compute_tp_fp_fn
from torch import Tensor

from ..processes import process_share

__all__ = ["PooledDice", "distributed", "mean_count", "mean_over_processes"]


def distributed() -> bool:
    """Whether this process is one of several that train together."""
    return process_share()[1] > 1


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes, with the gradient of this one's alone; one process gets it as it is.

    DistributedDataParallel takes the mean of all processes' gradients. Where a loss divides by sums over its batch (a
    count of voxels, the sums of a Dice), that is the gradient of one process with all batches in one only if they are
    such means. All processes have to call this together, and equally often.
    """
    if not distributed():
        return value
    mean = value.detach().float().clone()
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    return mean + (value - value.detach()) if value.requires_grad else mean


def mean_count(mask: Tensor) -> Tensor:
    """How many there are in a mask, as :func:`mean_over_processes`, to divide by: 1 where there is none anywhere."""
    count = mean_over_processes(mask.sum())
    return count + (count == 0)


class PooledDice(DiceLoss):
    """MONAI's Dice of probabilities and one-hot labels, which with ``batch`` pools the batches of all processes.

    Of MONAI's arguments it takes ``batch``, ``include_background``, ``squared_pred``, ``smooth_nr``, ``smooth_dr`` and
    ``soft_label``; the reduction has to be ``"none"``.
    """

    def forward(self, probabilities: Tensor, reference: Tensor) -> Tensor:
        """See MONAI's; with ``batch`` a value a class."""
        if not (self.batch and distributed()):
            return super().forward(probabilities, reference)
        if not self.include_background:
            probabilities, reference = probabilities[:, 1:], reference[:, 1:]
        axes = [0, *range(2, reference.dim())]
        sums = compute_tp_fp_fn(probabilities, reference, axes, 2 if self.squared_pred else 1, self.soft_label)
        hit, wrong, missed = mean_over_processes(torch.stack(sums))
        return 1 - (2 * hit + self.smooth_nr) / (2 * hit + wrong + missed + self.smooth_dr)
