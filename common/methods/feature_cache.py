"""What the locked parts of a network made of windows that come again in every epoch."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["FeatureCache"]

logger = logging.getLogger(__name__)


class FeatureCache:
    """Keeps what was computed of a window, in main memory, until it is full; the rest is computed anew each time.

    A window is known by its content, so an augmented one is never taken for another. Nothing makes room for something
    newer: all windows come once an epoch, so what was kept last is not what is needed next.

    Args:
        gigabytes: how much to keep.
    """

    def __init__(self, gigabytes: float) -> None:
        self.limit = int(gigabytes * 1e9)
        self.held = 0
        self._kept: dict[bytes, list[Tensor]] = {}
        self._is_full = False

    def __call__(self, window: Tensor, compute: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """``compute(window)``, without gradients, on the window's device."""
        key = _digest(window)
        if key in self._kept:
            return [tensor.to(window.device) for tensor in self._kept[key]]
        with torch.no_grad():
            tensors = compute(window)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self.held + size <= self.limit:
            self.held += size
            self._kept[key] = [tensor.cpu() for tensor in tensors]
        elif not self._is_full:
            self._is_full = True
            logger.info("Feature cache: %.3g GB are full; the rest is computed in each epoch", self.limit / 1e9)
        return tensors


def _digest(window: Tensor) -> bytes:
    digest = hashlib.blake2b(repr(window.shape).encode())
    digest.update(window.detach().cpu().numpy().tobytes())
    return digest.digest()
