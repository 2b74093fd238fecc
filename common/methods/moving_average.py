"""The moving average of a network's weights, as a teacher (Tarvainen & Valpola, NeurIPS 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..losses import ema_decay

__all__ = ["MovingAverage"]


class MovingAverage(AveragedModel):
    """Exponential moving average of parameters *and buffers*.

    Buffers are averaged too: an average of weights beside the norm statistics of other weights drifts and collapses.
    Counters (integer buffers) are copied. The decay has the usual warm start ``min(1 - 1 / (updates + 1), decay)``.

    Args:
        network: the network to follow; the copy needs no gradients and stays in evaluation mode.
        decay: weight of the past, below 1.
    """

    def __init__(self, network: nn.Module, decay: float = 0.99) -> None:
        def average(past: Tensor, now: Tensor, updates: Tensor | int) -> Tensor:
            if not torch.is_floating_point(past):
                return now
            return torch.lerp(past, now.to(past.dtype), 1.0 - ema_decay(int(updates), decay))

        super().__init__(network, avg_fn=average, use_buffers=True)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MovingAverage:
        """Stay in evaluation mode, whatever the method around it does."""
        return super().train(False)
