"""Predicting case by case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator

from common.engines import predict
from common.errors import BadInput


def evaluator_of(dataset: Dataset, written: list[float], network: torch.nn.Module | None = None) -> SupervisedEvaluator:
    def write(output: dict[str, Any]) -> dict[str, Any]:
        if float(output["pred"].max()) == 4:
            raise OSError("disk full")
        written.append(float(output["pred"].max()))
        return output

    return SupervisedEvaluator("cpu", DataLoader(dataset), network or torch.nn.Identity(), postprocessing=write)


def load(case: dict[str, Any]) -> dict[str, Any]:
    if case["image"] == "b.nii.gz":
        raise BadInput("b.nii.gz is shorter than its header says")
    return {"image": torch.full((1, 2, 2), float(case["value"]))}


CASES = [{"image": f"{name}.nii.gz", "value": value} for value, name in enumerate("abcdef")]


def test_a_case_that_fails_does_not_stop_the_others() -> None:
    dataset = Dataset(CASES, load)
    written: list[float] = []
    with pytest.raises(BadInput) as error:
        predict(evaluator_of(dataset, written), CASES, dataset)
    assert written == [0, 2, 3, 5], "the second can't be read, the fifth not written"
    assert "2 of 6 cases failed" in str(error.value)
    assert "b.nii.gz: b.nii.gz is shorter than its header says" in str(error.value)
    assert "e.nii.gz: OSError: disk full" in str(error.value)


def test_all_cases_that_work() -> None:
    dataset = Dataset(CASES[2:4], load)
    written: list[float] = []
    predict(evaluator_of(dataset, written), CASES[2:4], dataset)
    assert written == [2, 3]


def test_an_interrupt_ends_the_run() -> None:
    class Interrupted(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    dataset = Dataset(CASES[2:4], load)
    written: list[float] = []
    with pytest.raises(KeyboardInterrupt):
        predict(evaluator_of(dataset, written, Interrupted()), CASES[2:4], dataset)
    assert written == []
