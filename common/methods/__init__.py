"""The training methods: one file a system."""

from __future__ import annotations

from .base import Method
from .distillation import Distillation
from .dual_decoder import DualDecoder
from .moving_average import MovingAverage
from .supervised import Supervised

__all__ = ["Distillation", "DualDecoder", "Method", "MovingAverage", "Supervised"]
