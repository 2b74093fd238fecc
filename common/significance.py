"""Whether one method's scores differ from another's on the same cases: paired tests, corrected for their number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ttest_rel, wilcoxon

__all__ = ["PairedTest", "holm", "paired_test"]


@dataclass(frozen=True)
class PairedTest:
    """Scores against a reference's, case by case.

    Args:
        cases: how many cases both have.
        difference: mean of score minus reference; NaN without cases.
        t_test: two-sided p of the paired t-test; NaN with fewer than two cases.
        wilcoxon: two-sided p of Wilcoxon's signed-rank test; NaN with fewer than two cases.
    """

    cases: int
    difference: float
    t_test: float
    wilcoxon: float


def paired_test(scores: Mapping[str, float], reference: Mapping[str, float]) -> PairedTest:
    """Test whether ``scores`` differ from ``reference`` on the cases that both name.

    Args:
        scores: a score a case.
        reference: the same of the method to compare with.
    """
    cases = sorted(set(scores) & set(reference))
    first, second = (np.array([values[case] for case in cases], dtype=float) for values in (scores, reference))
    if len(cases) < 2:
        return PairedTest(len(cases), float(first[0] - second[0]) if cases else math.nan, math.nan, math.nan)
    if np.array_equal(first, second):
        return PairedTest(len(cases), 0.0, 1.0, 1.0)  # neither test is defined, and nothing differs
    return PairedTest(
        len(cases),
        float((first - second).mean()),
        float(ttest_rel(first, second).pvalue),
        float(wilcoxon(first, second).pvalue),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down procedure (Scandinavian Journal of Statistics, 1979).

    The k-th smallest of m is multiplied by m - k + 1, is at least as large as the one before it, and at most 1.

    Args:
        p_values: one a hypothesis; NaN is no hypothesis: it is not counted and stays.

    Returns:
        The corrected values in the same order.
    """
    corrected = [math.nan] * len(p_values)
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[index] = largest
    return corrected
