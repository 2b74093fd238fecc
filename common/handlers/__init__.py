"""Ignite handlers: checkpoints, lock-in, tracking, evaluation, and what a person sees."""

from __future__ import annotations

from .checkpoint import Checkpoint
from .drawing import save_curves, save_overview
from .evaluation import CaseJsonWriter, EvaluationWriter
from .lock_in import LockIn, LockInBroken
from .pictures import StagePicture
from .progress import Progress
from .target_error import TargetError
from .tracking import EvaluationTracking, Tracking, read_lineage, weights_digest
from .validation import Validation

__all__ = [
    "CaseJsonWriter",
    "Checkpoint",
    "EvaluationTracking",
    "EvaluationWriter",
    "LockIn",
    "LockInBroken",
    "Progress",
    "StagePicture",
    "TargetError",
    "Tracking",
    "Validation",
    "read_lineage",
    "save_curves",
    "save_overview",
    "weights_digest",
]
