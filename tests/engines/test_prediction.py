"""Predicting case by case."""

from __future__ import annotations

import io
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from torch import nn

from common.engines import predict
from common.engines.prediction import leave_in_place
from common.errors import BadInput


def evaluator_of(
    load: Callable[[dict[str, Any]], dict[str, Any]],
    cases: list[dict[str, Any]],
    written: list[float],
    network: nn.Module | None = None,
    workers: int = 0,
) -> SupervisedEvaluator:
    def write(output: dict[str, Any]) -> dict[str, Any]:
        if float(output["pred"].max()) == 4:
            raise OSError("disk full")
        written.append(float(output["pred"].max()))
        return output

    loader = DataLoader(Dataset(cases, load), num_workers=workers)
    return SupervisedEvaluator("cpu", loader, network or nn.Identity(), postprocessing=write)


def load(case: dict[str, Any]) -> dict[str, Any]:
    if case["image"] == "b.nii.gz":
        raise RuntimeError("a transform failed") from BadInput("b.nii.gz is shorter than its header says")
    return {"image": torch.full((1, 2, 2), float(case["value"])), "process": os.getpid()}


CASES = [{"image": f"{name}.nii.gz", "value": value} for value, name in enumerate("abcdef")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_case_that_fails_does_not_stop_the_others(workers: int) -> None:
    written: list[float] = []
    with pytest.raises(BadInput) as error:
        predict(evaluator_of(load, CASES, written, workers=workers), CASES)
    assert written == [0, 2, 3, 5], "the second can't be read, the fifth not written"
    assert "2 of 6 cases failed" in str(error.value)
    assert "\n  b.nii.gz is shorter than its header says" in str(error.value)
    assert "e.nii.gz: OSError: disk full" in str(error.value)


def test_a_bar_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    cases = [case for case in CASES if case["image"] not in ("b.nii.gz", "e.nii.gz")]
    predict(evaluator_of(load, cases, []), cases)
    assert "4/4" in screen.getvalue()
    assert ", f]" in screen.getvalue(), "the case that is being predicted"


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_load(workers: int) -> None:
    loaded_in = []

    class Network(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            loaded_in.append(int(evaluator.state.batch["process"]))
            return image

    written: list[float] = []
    evaluator = evaluator_of(load, CASES[2:4], written, Network(), workers)
    predict(evaluator, CASES[2:4])
    assert written == [2, 3]
    assert all((process != os.getpid()) == bool(workers) for process in loaded_in)
    assert len(loaded_in) == 2


def test_nothing_of_a_case_stays_when_the_next_is_loaded() -> None:
    alive: list[weakref.ref] = []

    def load_and_look(case: dict[str, Any]) -> dict[str, Any]:
        assert not [image for image in alive if image() is not None]
        return load(case)

    class Network(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            output = image + 0
            alive.extend([weakref.ref(image), weakref.ref(output)])
            return output

    written: list[float] = []
    predict(evaluator_of(load_and_look, CASES[2:4], written, Network()), CASES[2:4])
    assert written == [2, 3]


def test_an_interrupt_ends_the_run() -> None:
    class Interrupted(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    written: list[float] = []
    with pytest.raises(KeyboardInterrupt):
        predict(evaluator_of(load, CASES[2:4], written, Interrupted()), CASES[2:4])
    assert written == []


def test_the_image_stays_where_it_is() -> None:
    image = torch.zeros(1, 1, 2, 2)
    found, label = leave_in_place({"image": image}, torch.device("meta"))
    assert found is image
    assert label is None
