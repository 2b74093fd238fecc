"""The training engine, and what a run does before its first step."""

from __future__ import annotations

from .configuration import running_config
from .distributed import distributed_device, start_distributed, stop_distributed
from .precision import precision
from .prediction import predict
from .preflight import preflight, start
from .trainer import SemiSupervisedTrainer

__all__ = [
    "SemiSupervisedTrainer",
    "distributed_device",
    "precision",
    "predict",
    "preflight",
    "running_config",
    "start",
    "start_distributed",
    "stop_distributed",
]
