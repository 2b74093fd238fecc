from __future__ import annotations

import math

import numpy as np
import pytest

from common.errors import BadInput
from common.metrics import regression_metrics, summarize_regression


def test_hand_computed_figures_inside_the_mask() -> None:
    reference = np.array([[1.0, 2.0], [3.0, 0.0]])
    prediction = np.array([[1.0, 3.0], [1.0, 99.0]])
    result = regression_metrics(prediction, reference, reference != 0)
    assert result["mae"] == pytest.approx(1.0)
    assert result["rmse"] == pytest.approx(math.sqrt(5 / 3))
    assert result["r2"] == pytest.approx(1 - 5 / 2)
    assert result["voxels"] == 3
    assert result["mean_prediction"] == pytest.approx(5 / 3)
    assert result["mean_reference"] == pytest.approx(2.0)


def test_values_outside_the_mask_do_not_count_even_nan() -> None:
    reference, prediction = np.array([1.0, 2.0, np.nan]), np.array([1.0, 2.0, np.nan])
    result = regression_metrics(prediction, reference, np.array([True, True, False]))
    assert (result["mae"], result["rmse"], result["r2"]) == (0, 0, 1)


@pytest.mark.parametrize("reference", [[4.0], [0.1, 0.1, 0.1]])
def test_r2_needs_a_reference_that_varies(reference: list[float]) -> None:
    result = regression_metrics(np.zeros(len(reference)), np.array(reference))
    assert math.isnan(result["r2"])
    assert result["mae"] == pytest.approx(reference[0])


def test_empty_mask_is_nan_not_an_error() -> None:
    result = regression_metrics(np.ones(3), np.ones(3), np.zeros(3, dtype=bool))
    assert result["voxels"] == 0
    assert all(math.isnan(result[key]) for key in ("mae", "rmse", "r2", "mean_prediction"))


def test_different_grids_are_refused() -> None:
    with pytest.raises(BadInput, match="different grids"):
        regression_metrics(np.ones(3), np.ones(4))


def test_pooled_figures_equal_those_of_all_voxels_together() -> None:
    generator = np.random.default_rng(1)
    # A large mean: what a plain sum of squares would lose.
    references = [1e4 + generator.normal(index, 1, size) for index, size in enumerate((5, 200, 37))]
    predictions = [reference + generator.normal(0.3, 0.5, len(reference)) for reference in references]
    cases = [regression_metrics(*pair) for pair in zip(predictions, references, strict=True)]
    nothing = regression_metrics(np.ones(2), np.ones(2), np.zeros(2, dtype=bool))
    summary = summarize_regression([*cases, nothing])

    direct = regression_metrics(np.concatenate(predictions), np.concatenate(references))
    for key in ("mae", "rmse", "r2"):
        assert summary["voxels"][key] == pytest.approx(direct[key], rel=1e-9)
    assert summary["voxels"]["n"] == 242

    means = regression_metrics(
        np.array([values.mean() for values in predictions]), np.array([values.mean() for values in references])
    )
    for key in ("mae", "rmse", "r2"):
        assert summary["case_means"][key] == pytest.approx(means[key])
    assert summary["case_means"]["n"] == 3
    assert summary["case_means"]["r2"] != pytest.approx(summary["voxels"]["r2"])


def test_pooling_a_constant_reference_has_no_r2() -> None:
    cases = [regression_metrics(np.full(size, 1.0), np.full(size, 1.3)) for size in (3, 7, 11)]
    assert math.isnan(summarize_regression(cases)["voxels"]["r2"])
    assert summarize_regression(cases)["voxels"]["mae"] == pytest.approx(0.3)


def test_summary_of_no_cases() -> None:
    summary = summarize_regression([])
    assert summary["voxels"]["n"] == summary["case_means"]["n"] == 0
    assert math.isnan(summary["voxels"]["mae"])
