"""Weights among several losses that are learnt with the network.

Kendall, Gal & Cipolla, "Multi-task learning using uncertainty to weigh losses for scene geometry and semantics", CVPR
2018.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput

__all__ = ["UncertaintyWeighting", "parameter_groups"]


class UncertaintyWeighting(nn.Module):
    """``sum over i of 0.5 exp(-s_i) L_i + 0.5 s_i``, with a learnt log-variance ``s_i`` a loss that starts at 0.

    The best ``s_i`` is ``log L_i``, so each loss ends up divided by about its own size. The optimiser must be given
    this module's parameter, without weight decay: see :func:`parameter_groups`.

    Args:
        names: the losses' names, each once.

    Raises:
        BadInput: when there is no name, or one twice.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        if not self.names or len(set(self.names)) != len(self.names):
            raise BadInput(f"names={self.names!r}: expected the names of the losses to weigh, each once.")
        self.log_variances = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum, a scalar.

        Args:
            losses: scalars by name. One that a batch can't have (no case in it has the target) is best left out: it
                then does not move its weight, whereas a loss of 0 would raise it without end.

        Raises:
            BadInput: when there is no loss, or one with an unknown name.
        """
        unknown = [name for name in losses if name not in self.names]
        if unknown or not losses:
            raise BadInput(f"Losses {list(losses)} found; expected some of {self.names}.")
        total = torch.zeros((), dtype=torch.float32, device=self.log_variances.device)
        for name, log_variance in zip(self.names, self.log_variances, strict=True):
            if name in losses:
                total = total + 0.5 * torch.exp(-log_variance) * losses[name].float() + 0.5 * log_variance
        return total


def parameter_groups(parameters: Sequence[nn.Parameter], module: nn.Module) -> list[dict[str, Any]]:
    """Groups for an optimiser: all that ``parameters`` has, learnt weights among losses without weight decay.

    Decay would pull a log-variance to 0, the weight of its loss to 0.5, whatever the size of the loss.

    Args:
        parameters: what the optimiser is to train.
        module: where the :class:`UncertaintyWeighting` is, if there is one; without one the only group is
            ``parameters``.
    """
    weightings = [part for part in module.modules() if isinstance(part, UncertaintyWeighting)]
    learnt = {id(parameter) for weighting in weightings for parameter in weighting.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if id(parameter) not in learnt]},
        {"params": [parameter for parameter in parameters if id(parameter) in learnt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
