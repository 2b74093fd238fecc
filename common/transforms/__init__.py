"""From files to what a network takes, and from its output to results."""

from __future__ import annotations

from .augmentation import supervised_augmentation, weak_and_strong
from .cropping import crop, crop_indices
from .familiarity import CaseWarningsd
from .loading import LoadCased
from .output import CaseSummaryd, GeometricThicknessd, MaskTargetd, SplitOutputd
from .postprocessing import load_references, monitor_postprocessing, postprocessing
from .preprocessing import Spacingd, air, chain, preprocessing

__all__ = [
    "CaseSummaryd",
    "CaseWarningsd",
    "GeometricThicknessd",
    "LoadCased",
    "MaskTargetd",
    "Spacingd",
    "SplitOutputd",
    "air",
    "chain",
    "crop",
    "crop_indices",
    "load_references",
    "monitor_postprocessing",
    "postprocessing",
    "preprocessing",
    "supervised_augmentation",
    "weak_and_strong",
]
