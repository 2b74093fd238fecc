"""Intervals and their calibration, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from common.metrics.intervals import conformal_factor, interval_scores, summarize_intervals


def case(*scores: float) -> dict[str, object]:
    """A case whose predictions are 0 with deviations of 2, and whose references are the scores times 2."""
    reference = 2 * np.array([*scores, 100.0])
    mask = np.arange(len(reference)) < len(scores)
    return interval_scores(np.zeros_like(reference), np.full_like(reference, 2.0), reference, mask)


def test_errors_in_units_of_their_deviation() -> None:
    found = case(-3.0, 1.64, 0.5, 1.65)
    np.testing.assert_allclose(found["interval_scores"], [0.5, 1.64, 1.65, 3.0])
    assert found["interval_coverage"] == 0.5  # 1.645 deviations hold 90 % of a normal distribution
    assert math.isnan(case()["interval_coverage"])


def test_many_scores_become_as_many_quantiles() -> None:
    scores = interval_scores(np.zeros(9999), np.ones(9999), np.arange(9999.0), np.ones(9999, bool))["interval_scores"]
    assert len(scores) == 2000
    assert np.quantile(scores, 0.9) == pytest.approx(8999, rel=1e-3)


def test_the_factor_is_a_quantile_over_cases_and_one_that_is_to_come() -> None:
    cases = [np.array([float(score)]) for score in range(1, 10)]
    # Nine of ten equal weights are 90 %: the largest. Eight cases can't promise it; of 19, 18 of 20 do.
    assert conformal_factor(cases) == 9
    assert conformal_factor(cases[:8]) == math.inf
    assert conformal_factor([]) == math.inf
    assert conformal_factor([np.array([float(score)]) for score in range(1, 20)]) == 18
    # Half: five of ten.
    assert conformal_factor(cases, 0.5) == 5


def test_each_case_weighs_the_same_however_large() -> None:
    small, large = [np.array([1.0])] * 9, [np.full(1000, 5.0)]
    # Nine of eleven weights lie at 1; 90 % needs the tenth, which is 5. For 80 % the nine do, though 1000 voxels don't.
    assert conformal_factor(small + large) == 5
    assert conformal_factor(small + large, 0.8) == 1


def test_coverage_as_predicted_and_by_the_factor_of_the_other_cases() -> None:
    # Ten cases of two voxels with scores s and s + 10 where s = 1 ... 10: without a case, nine others.
    # Their weights are 1 / 20 a score, so 18 scores are 90 %: the largest, 20, or 19 without the last case.
    summary = summarize_intervals([case(s, s + 10) for s in range(1, 11)] + [case()])
    assert summary["n"] == 10
    assert summary["raw"] == pytest.approx(1 / 20)  # only a score of 1 is below 1.645
    # Of all ten: 1 / 22 a score, 0.9 are 19.8 scores: the twentieth.
    assert summary["factor"] == 20
    # Only the last case's 20 lies beyond the factor of the others, 19.
    assert summary["calibrated"] == pytest.approx(19 / 20)


def test_too_few_cases_promise_nothing() -> None:
    nine = summarize_intervals([case(1.0)] * 9)
    assert nine["factor"] == 1
    assert math.isnan(nine["calibrated"]), "eight others have no factor"
    eight = summarize_intervals([case(1.0)] * 8)
    assert math.isnan(eight["factor"])
    assert eight["raw"] == 1
    assert summarize_intervals([])["n"] == 0


def test_wrong_deviations_are_put_right_for_new_cases() -> None:
    """Deviations half as large as they should be, heavy tails, and errors that a case has in common."""
    rng = np.random.default_rng(0)

    def draw() -> dict[str, object]:
        errors = rng.standard_t(4, 400) * rng.uniform(0.5, 1.5)
        return interval_scores(np.zeros(400), np.full(400, 0.5), errors, np.ones(400, bool))

    summary = summarize_intervals([draw() for _ in range(60)])
    new = np.mean([(draw()["interval_scores"] <= summary["factor"]).mean() for _ in range(200)])
    assert summary["raw"] < 0.65
    assert summary["calibrated"] == pytest.approx(0.9, abs=0.03)
    assert new == pytest.approx(0.9, abs=0.03)
