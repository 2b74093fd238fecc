"""Paired tests and Holm's correction against numbers from a hand calculation."""

from __future__ import annotations

import math

import pytest

from common.significance import holm, paired_test


def test_holm_by_hand() -> None:
    # Sorted: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 * 1, which may not fall below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_never_exceeds_one_and_leaves_what_was_not_tested() -> None:
    corrected = holm([0.6, math.nan, 0.3])
    assert corrected[0::2] == pytest.approx([0.6, 0.6])
    assert math.isnan(corrected[1])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_paired_t_and_signed_ranks_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t = 2 sqrt(3) with two degrees of freedom, whose
    # two-sided p is 1 - t / sqrt(2 + t^2). All signs agree in one of 2^3 cases a side.
    found = paired_test({"a": 1.0, "b": 2.0, "c": 3.0, "only here": 9.0}, {"c": 0.0, "b": 0.0, "a": 0.0, "there": 5.0})
    t = 2 * math.sqrt(3)
    assert found.cases == 3
    assert found.difference == pytest.approx(2.0)
    assert found.t_test == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert found.wilcoxon == pytest.approx(2 / 8)


def test_the_pairing_matters() -> None:
    scores, shifted = {str(i): float(i) for i in range(8)}, {str(i): i + 0.1 + 0.01 * i for i in range(8)}
    assert paired_test(scores, shifted).t_test < 0.001, "an unpaired test sees nothing here"
    assert paired_test(scores, shifted).difference < 0


def test_nothing_to_test() -> None:
    same = paired_test({"a": 0.5, "b": 0.7}, {"a": 0.5, "b": 0.7})
    assert (same.cases, same.difference, same.t_test, same.wilcoxon) == (2, 0.0, 1.0, 1.0)
    single = paired_test({"a": 0.5}, {"a": 0.25})
    assert single.difference == 0.25
    assert math.isnan(single.t_test)
    assert math.isnan(single.wilcoxon)
    assert math.isnan(paired_test({"a": 1.0}, {"b": 1.0}).difference)
