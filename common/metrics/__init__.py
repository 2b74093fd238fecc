"""Measures of a segmentation and of a regressed quantity, one case at a time and pooled."""

from __future__ import annotations

from .intervals import interval_scores, summarize_intervals
from .regression import REGRESSION_METRICS, regression_metrics, summarize_regression
from .segmentation import DISTANCE_METRICS, OVERLAP_METRICS, segmentation_metrics

__all__ = [
    "DISTANCE_METRICS",
    "OVERLAP_METRICS",
    "REGRESSION_METRICS",
    "interval_scores",
    "regression_metrics",
    "segmentation_metrics",
    "summarize_intervals",
    "summarize_regression",
]
