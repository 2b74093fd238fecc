"""The training engine, and what a run does before its first step."""

from __future__ import annotations

from .configuration import running_config
from .distributed import distributed_device, start_distributed, stop_distributed
from .occupancy import leave
from .origin import load_teacher, load_weights, selected_on, start_from
from .precision import precision
from .prediction import predict
from .preflight import check_evaluation, preflight, start
from .trainer import SemiSupervisedTrainer

__all__ = [
    "SemiSupervisedTrainer",
    "check_evaluation",
    "distributed_device",
    "leave",
    "load_teacher",
    "load_weights",
    "precision",
    "predict",
    "preflight",
    "running_config",
    "selected_on",
    "start",
    "start_distributed",
    "start_from",
    "stop_distributed",
]
