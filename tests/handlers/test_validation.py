from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator

from common.errors import BadInput
from common.handlers.validation import Validation


class Evaluator(SupervisedEvaluator):
    """Notes when it is asked."""

    def __init__(self) -> None:
        super().__init__("cpu", [{}], torch.nn.Identity())
        self.asked: list[int] = []

    def run(self, global_epoch: int = 1) -> None:
        self.asked.append(global_epoch)


def asked(epochs: int, interval: int, done: int = 0) -> list[int]:
    evaluator, trainer = Evaluator(), Engine(lambda engine, batch: None)

    @trainer.on(Events.STARTED)
    def resume(engine: Engine) -> None:
        engine.state.epoch = done

    Validation(evaluator, interval).attach(trainer)
    trainer.run([0], epochs)
    return evaluator.asked


@pytest.mark.parametrize(
    ("epochs", "interval", "expected"),
    [(7, 3, [3, 6, 7]), (6, 3, [3, 6]), (4, 1, [1, 2, 3, 4]), (2, 1000, [2]), (1, 1, [1])],
)
def test_the_last_epoch_is_validated_and_none_twice(epochs: int, interval: int, expected: list[int]) -> None:
    assert asked(epochs, interval) == expected


def test_a_resumed_run_validates_at_the_epochs_of_the_whole_run() -> None:
    assert asked(7, 3, done=4) == [6, 7]


@pytest.mark.parametrize("interval", [0, -1, 2.5, None])
def test_an_interval_that_is_none(interval: float | None) -> None:
    with pytest.raises(BadInput, match="val_interval"):
        Validation(Evaluator(), interval)
