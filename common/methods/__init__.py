"""The training methods: one file a system."""

from __future__ import annotations

from .aggregating_decoupling import AggregatingDecoupling
from .ase_net import ASENet
from .base import Method
from .bcp import BidirectionalCopyPaste
from .co_training import CoTraining
from .cps import CrossPseudoSupervision
from .distillation import Distillation
from .dodnet import DoDNet
from .dual_decoder import DualDecoder
from .knowledge_distillation import KnowledgeDistillation
from .mean_teacher import MeanTeacher
from .moving_average import MovingAverage
from .ms_kd import MultiTeacherDistillation
from .supervised import Supervised
from .ua_mt import UncertaintyAwareMeanTeacher

__all__ = [
    "ASENet",
    "AggregatingDecoupling",
    "BidirectionalCopyPaste",
    "CoTraining",
    "CrossPseudoSupervision",
    "Distillation",
    "DoDNet",
    "DualDecoder",
    "KnowledgeDistillation",
    "MeanTeacher",
    "Method",
    "MovingAverage",
    "MultiTeacherDistillation",
    "Supervised",
    "UncertaintyAwareMeanTeacher",
]
