"""Losses, the certainty that masks them, and the schedules and weights in front of them."""

from __future__ import annotations

from .alignment import FeatureAlignment
from .consistency import ConfidenceMaskedConsistency, distillation_loss
from .focal import FocalDiceLoss
from .partial_labels import merge_unknown, unknown_classes
from .regression import MaskedRegression, target_mask
from .schedules import ema_decay, sigmoid_ramp_up
from .segmentation import SegmentationLoss, deep_supervision_weights
from .uncertainty import (
    Disagreement,
    Estimate,
    HighestProbability,
    NormalizedEntropy,
    PredictiveEntropy,
    Threshold,
    UncertaintyEstimator,
    confidence_mask,
    kept_fraction,
)
from .weighting import UncertaintyWeighting

__all__ = [
    "ConfidenceMaskedConsistency",
    "Disagreement",
    "Estimate",
    "FeatureAlignment",
    "FocalDiceLoss",
    "HighestProbability",
    "MaskedRegression",
    "NormalizedEntropy",
    "PredictiveEntropy",
    "SegmentationLoss",
    "Threshold",
    "UncertaintyEstimator",
    "UncertaintyWeighting",
    "confidence_mask",
    "deep_supervision_weights",
    "distillation_loss",
    "ema_decay",
    "kept_fraction",
    "merge_unknown",
    "sigmoid_ramp_up",
    "target_mask",
    "unknown_classes",
]
