"""How often a predicted interval holds the truth, and the factor that makes it so often enough.

A network with the heteroscedastic loss predicts a mean and a standard deviation, whose interval of 90 % would be that
of a normal distribution. The errors needn't be normal, nor the deviations right on new cases; so the deviations are
multiplied by a factor, found on cases that weren't trained on (split conformal prediction: Vovk, Gammerman, Shafer.
Algorithmic learning in a random world. 2005; scores scaled by a predicted spread as in Lei et al. Distribution-free
predictive inference for regression. JASA 2018).

Voxels of one case are alike, so they are not exchangeable; cases are. Each case weighs the same, and a new one counts
as if its scores were infinite (hierarchical conformal prediction: Lee, Barber, Willett. Distribution-free inference
with hierarchical data. 2023). For a voxel of a new case from the same source as these, the calibrated interval then
holds the truth with a probability of 90 % at least: on average over cases, not in each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

__all__ = ["LEVEL", "conformal_factor", "interval_scores", "summarize_intervals"]

LEVEL = 0.9
NORMAL_FACTOR = NormalDist().inv_cdf((1 + LEVEL) / 2)
KEPT = 2000  # of a case's scores: that many of its quantiles say the same to a thousandth


def interval_scores(
    prediction: np.ndarray, deviation: np.ndarray, reference: np.ndarray, mask: np.ndarray
) -> dict[str, Any]:
    """The errors of one case in units of their predicted standard deviation.

    Args:
        prediction: values, any shape, in the target's unit.
        deviation: predicted standard deviations, same shape and unit.
        reference: values, same shape and unit.
        mask: which of them count, same shape.

    Returns:
        ``interval_coverage``, the share of them within the normal distribution's interval of 90 %, NaN of none; and
        ``interval_scores``, the absolute errors divided by the deviations in rising order, or 2000 quantiles of them.
    """
    error = np.abs(prediction[mask].astype(np.float64) - reference[mask])
    scores = np.sort(error / np.maximum(deviation[mask].astype(np.float64), np.finfo(np.float32).tiny))
    coverage = float((scores <= NORMAL_FACTOR).mean()) if scores.size else float("nan")
    if scores.size > KEPT:
        scores = np.quantile(scores, (np.arange(KEPT) + 0.5) / KEPT)
    return {"interval_coverage": coverage, "interval_scores": scores}


def conformal_factor(cases: Sequence[np.ndarray], level: float = LEVEL) -> float:
    """By what to multiply the deviations so that the interval holds a share ``level`` of a new case's values.

    Args:
        cases: the scores of each, none empty.
        level: between 0 and 1.

    Returns:
        The smallest score that, with all up to it, weighs ``level`` or more, where each of the n cases weighs
        1 / (n + 1) in all; infinite for fewer than level / (1 - level) cases, nine for 90 %.
    """
    if not cases:
        return float("inf")
    scores = np.concatenate([np.asarray(case, dtype=np.float64) for case in cases])
    weights = np.concatenate([np.full(len(case), 1 / ((len(cases) + 1) * len(case))) for case in cases])
    order = np.argsort(scores, kind="stable")
    enough = np.cumsum(weights[order]) >= level - 1e-9  # sums of fractions are a little off
    return float(scores[order][np.argmax(enough)]) if enough.any() else float("inf")


def summarize_intervals(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Coverage of the intervals over cases, as predicted and calibrated.

    Args:
        cases: what :func:`interval_scores` returned, a dict a case; those without values don't count.

    Returns:
        ``level``; ``raw``, the mean over the cases of the coverage by the normal distribution's interval; ``factor``,
        of all cases, for new ones; ``calibrated``, the mean coverage of each case with the factor of the others: with
        its own among them it would be right by construction; ``n``, the number of cases. NaN where there are too few.
    """
    scores = [np.asarray(case["interval_scores"]) for case in cases]
    scores = [case for case in scores if case.size]
    nan = float("nan")
    others = [conformal_factor([*scores[:index], *scores[index + 1 :]]) for index in range(len(scores))]
    held_out = [float((case <= factor).mean()) for case, factor in zip(scores, others, strict=True)]
    raw = [case["interval_coverage"] for case in cases if np.size(case["interval_scores"])]
    factor = conformal_factor(scores)
    return {
        "level": LEVEL,
        "raw": float(np.mean(raw)) if raw else nan,
        "factor": factor if np.isfinite(factor) else nan,
        "calibrated": float(np.mean(held_out)) if held_out and np.isfinite(others).all() else nan,
        "n": len(scores),
    }
