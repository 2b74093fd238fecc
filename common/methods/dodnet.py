"""DoDNet (Zhang et al., "DoDNet: Learning to segment multi-organ and tumors from multiple partially labeled datasets",
CVPR 2021).

One network learns every organ from the cases that label it: its last layers are made for the task, so a case says
nothing of the tasks that it has no label for. The network is :class:`~common.networks.dynamic_head.DynamicHeadNetwork`.

A case may label several organs, or all; each of its tasks is then learnt from one pass through encoder and decoder. In
the paper a case belongs to one task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import Tensor

from ..errors import BadInput
from ..losses import unknown_classes
from ..losses.partial_labels import Annotated
from ..losses.processes import mean_count
from ..networks.dynamic_head import DynamicHeadNetwork
from .base import Method

__all__ = ["DoDNet", "task_targets"]

#: marks the voxels of a channel that a case has no label for
ABSENT = -1.0


def task_targets(label: Tensor, annotated: Annotated, tasks: Sequence[Sequence[int]], num_classes: int) -> Tensor:
    """What the tasks' sigmoids are to be: 1 in the structure, 0 outside, -1 everywhere where the case does not say.

    Args:
        label: (B, 1, *spatial), class ids.
        annotated: the class ids that each case's label knows.
        tasks: ``[organ]`` or ``[organ, tumour]`` each; an organ includes its tumour.
        num_classes: K, background included.

    Returns:
        (B, T, 2, *spatial), float; the second channel of a task without a tumour is -1.
    """
    unknown = unknown_classes(annotated, label.shape[0], num_classes)
    targets = torch.full((label.shape[0], len(tasks), 2, *label.shape[2:]), ABSENT, device=label.device)
    for index, task in enumerate(tasks):
        for channel, structure in enumerate(task):
            inside = torch.isin(label[:, 0], torch.as_tensor(task[channel:], dtype=label.dtype, device=label.device))
            known = [case for case in range(label.shape[0]) if unknown is None or not unknown[case, structure]]
            targets[known, index, channel] = inside[known].float()
    return targets


class DoDNet(Method):
    """Dice and binary cross-entropy of each task's organ and tumour, averaged over all of a batch that have labels.

    The Dice is ``2 sum(p y) / (sum(p) + sum(y) + 1)``, of each crop and channel.

    Args:
        network: a network with dynamic heads.

    Raises:
        BadInput: ``network`` is another one.
    """

    def __init__(self, network: DynamicHeadNetwork) -> None:
        super().__init__()
        if not isinstance(network, DynamicHeadNetwork):
            raise BadInput(
                f"network_def: found a {type(network).__name__}, expected a DynamicHeadNetwork, which DoDNet trains. "
                "Lay recipes/dodnet.json over the config."
            )
        self.network = network
        self.dice = DiceLoss(sigmoid=True, smooth_nr=0.0, smooth_dr=1.0, reduction="none")

    def forward(self, batch: Mapping[str, Mapping[str, Any]], optimizer: str = "") -> dict[str, Tensor]:
        labeled = batch["labeled"]
        tasks = self.network.tasks
        logits = self.network.forward_tasks(labeled["image"]).float()
        classes = 1 + sum(map(len, tasks))
        targets = task_targets(labeled["label"], labeled.get("annotated"), tasks, classes)
        known = targets.flatten(3)[..., 0] != ABSENT
        # (channels with a label, 1, *spatial): each is a sample of its own.
        logits, targets = logits[known].unsqueeze(1), targets[known].unsqueeze(1)
        count = mean_count(known)
        with torch.autocast(logits.device.type, enabled=False):
            dice = self.dice(logits, targets).sum() / count
            voxels = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            cross_entropy = voxels.flatten(1).mean(1).sum() / count
        return {"loss": dice + cross_entropy, "dice": dice, "cross_entropy": cross_entropy}
