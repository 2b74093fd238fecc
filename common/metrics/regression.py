"""Error of a regressed quantity: inside a structure's voxels for a map, over cases for a number a case.

Besides the figures each case carries the sums behind them, so that figures over all voxels of all cases can be formed
without keeping the voxels. Deviations are summed around the case's own mean and joined by the formula of Chan, Golub
and LeVeque (1983), which keeps its precision where a plain sum of squares loses it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import BadInput

__all__ = ["REGRESSION_METRICS", "regression_metrics", "summarize_regression"]

REGRESSION_METRICS = ("mae", "rmse", "r2")


def _r2(squared_error: float, squared_deviation: float, count: int) -> float:
    return 1 - squared_error / squared_deviation if count > 1 and squared_deviation > 0 else float("nan")


def regression_metrics(
    prediction: np.ndarray, reference: np.ndarray, mask: np.ndarray | None = None
) -> dict[str, float | int]:
    """Compare predicted with reference values where ``mask`` is true.

    Args:
        prediction: values, any shape, in the target's unit.
        reference: values, same shape and unit.
        mask: which of them count, same shape; None counts all.

    Returns:
        ``mae``, ``rmse`` (in the unit), ``r2`` = 1 - SS_res / SS_tot, ``voxels``, ``mean_prediction``,
        ``mean_reference``, and the sums that :func:`summarize_regression` pools: ``sum_absolute_error``,
        ``sum_squared_error``, ``sum_squared_deviation`` (of the reference, around its mean). Figures of an empty mask
        are NaN; so is ``r2`` of fewer than two values or of a constant reference.

    Raises:
        BadInput: the shapes differ.
    """
    prediction, reference = np.asarray(prediction, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    mask = np.ones(reference.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if not prediction.shape == reference.shape == mask.shape:
        raise BadInput(
            f"prediction, reference and mask are on different grids: {prediction.shape}, {reference.shape} and "
            f"{mask.shape}. All must be on the image's own grid."
        )
    predicted, referred = prediction[mask], reference[mask]
    count = int(predicted.size)
    error = predicted - referred
    absolute, squared = float(np.abs(error).sum()), float(np.square(error).sum())
    # A constant has no deviation; rounding of its mean would leave a tiny one and an absurd R2.
    constant = count == 0 or bool((referred == referred[0]).all())
    deviation = 0.0 if constant else float(np.square(referred - referred.mean()).sum())
    return {
        "mae": absolute / count if count else float("nan"),
        "rmse": math.sqrt(squared / count) if count else float("nan"),
        "r2": _r2(squared, deviation, count),
        "voxels": count,
        "mean_prediction": float(predicted.mean()) if count else float("nan"),
        "mean_reference": float(referred.mean()) if count else float("nan"),
        "sum_absolute_error": absolute,
        "sum_squared_error": squared,
        "sum_squared_deviation": deviation,
    }


def summarize_regression(cases: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | int]]:
    """Join the results of several cases.

    Args:
        cases: what :func:`regression_metrics` returned, a dict a case; those without voxels do not count.

    Returns:
        ``voxels``: ``mae``, ``rmse``, ``r2``, ``n`` over all voxels of all cases together, so that big structures
        weigh more; ``case_means``: the same of the cases' mean values, every case weighing the same.
    """
    cases = [case for case in cases if case["voxels"] > 0]
    count = sum(case["voxels"] for case in cases)
    squared = sum(case["sum_squared_error"] for case in cases)
    mean = sum(case["voxels"] * case["mean_reference"] for case in cases) / count if count else float("nan")
    deviation = sum(case["sum_squared_deviation"] for case in cases)
    # Means equal but for rounding must not turn a constant reference into one with a tiny deviation.
    deviation += sum(
        case["voxels"] * (case["mean_reference"] - mean) ** 2
        for case in cases
        if not math.isclose(case["mean_reference"], mean, rel_tol=1e-12)
    )
    means = regression_metrics(
        np.array([case["mean_prediction"] for case in cases]), np.array([case["mean_reference"] for case in cases])
    )
    return {
        "voxels": {
            "mae": sum(case["sum_absolute_error"] for case in cases) / count if count else float("nan"),
            "rmse": math.sqrt(squared / count) if count else float("nan"),
            "r2": _r2(squared, deviation, count),
            "n": count,
        },
        "case_means": {**{key: means[key] for key in REGRESSION_METRICS}, "n": len(cases)},
    }
