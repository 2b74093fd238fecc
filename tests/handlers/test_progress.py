from __future__ import annotations

import logging
import math

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events

from common.engines import SemiSupervisedTrainer
from common.handlers import Checkpoint, Progress
from common.handlers import progress as module
from common.methods import Method


class Falling(Method):
    """Its loss is 4, 3, 2 ... by step; the fraction kept 0.25 a step."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.0))
        self.fail_at = fail_at

    def forward(self, batch, optimizer=""):
        if self.step == self.fail_at:
            raise RuntimeError("the plug was pulled")
        fraction = torch.tensor(0.25 * self.step)
        return {"loss": self.weight * 0 + 4 - self.step, "kept/all": fraction, "kept/wall": fraction}


class Bar:
    """Stands for tqdm's bar."""

    made: list[Bar]

    def __init__(self, total: int, initial: int, **settings) -> None:
        self.total, self.count, self.closed, self.shown = total, initial, False, []
        Bar.made.append(self)

    def set_postfix(self, loss: str, refresh: bool) -> None:
        self.shown.append(loss)

    def update(self) -> None:
        self.count += 1

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    Bar.made = []
    monkeypatch.setattr(module, "tqdm", Bar)
    return Bar.made


class Validation:
    """An evaluator that finds what it is told, once an epoch."""

    def __init__(self, *values: float) -> None:
        self.values = iter(values)
        self.evaluator = Engine(self._find)

    def _find(self, engine: Engine, batch: int) -> None:
        engine.state.metrics["val_mean_dice"] = next(self.values)
        engine.state.metrics["val_matrix"] = torch.zeros(2, 2)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.evaluator.run([0], 1))


def train(*handlers, method: Method | None = None) -> None:
    method = method or Falling()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    SemiSupervisedTrainer("cpu", 2, [{}, {}], method, optimizer, False, train_handlers=handlers).run()


def lines(caplog) -> list[str]:
    said = [record.getMessage() for record in caplog.records if record.name == "common.handlers.progress"]
    return [line for line in said if not line.startswith("Steps waited")]


def test_a_line_an_epoch_and_curves_at_the_end(tmp_path, caplog):
    folder = tmp_path / "new"
    with caplog.at_level(logging.INFO):
        train(Progress(str(folder)))
    assert lines(caplog) == ["Epoch 1/2: loss 3.5, kept/all 0.125", "Epoch 2/2: loss 1.5, kept/all 0.625"]
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "history.json"]
    assert (folder / "curves.png").read_bytes()[1:4] == b"PNG"


def test_the_validation_is_in_the_line_of_its_epoch_only(tmp_path, caplog):
    validation = Validation(0.75, math.nan)
    handler = Progress(str(tmp_path), validation.evaluator)
    with caplog.at_level(logging.INFO):
        train(validation, handler)
    first, second = lines(caplog)
    assert "val_mean_dice 0.75" in first
    assert "val_mean_dice" not in second, "an older figure is not this epoch's"
    assert handler.history["val_mean_dice"] == [(1, 0.75)]
    assert handler.history["train/loss"] == [(1, 3.5), (2, 1.5)]
    assert handler.history["train/kept/wall"] == [(1, 0.125), (2, 0.625)]
    assert "val_matrix" not in handler.history


@pytest.mark.parametrize(
    ("loading", "said"), [(0.0, "0.0 % of their time (0 s)"), (6.0, "75.0 % of their time (24 s)")]
)
def test_waiting_for_data_is_said_at_the_end(loading, said, tmp_path, caplog, monkeypatch):
    """Four steps of 2 s each, whose batches take their time; what happens between the epochs does not count."""
    caplog.set_level(logging.INFO)
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])

    def wait(seconds: float) -> None:
        clock[0] += seconds

    class Slow:
        def __len__(self) -> int:
            return 2

        def __iter__(self):
            for _ in range(2):
                wait(loading)
                yield {}

    class Computing(Falling):
        def forward(self, batch, optimizer=""):
            wait(2.0)
            return super().forward(batch, optimizer)

    class Pause:
        def attach(self, engine: Engine) -> None:
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: wait(100.0))

    method = Computing()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    handlers = [Progress(str(tmp_path)), Pause()]
    SemiSupervisedTrainer("cpu", 2, Slow(), method, optimizer, False, train_handlers=handlers).run()
    (line,) = [record.getMessage() for record in caplog.records if "waited" in record.getMessage()]
    assert said in line
    assert ("num_workers" in line) == (loading > 0)


def test_bar_runs_over_the_whole_training(tmp_path, bars):
    train(Progress(str(tmp_path)))
    (bar,) = bars
    assert (bar.total, bar.count, bar.closed) == (4, 4, True)
    assert bar.shown == ["4", "3", "2", "1"]


def test_bar_is_closed_when_the_run_fails_and_no_curves_are_drawn(tmp_path, bars):
    with pytest.raises(RuntimeError, match="plug"):
        train(Progress(str(tmp_path)), method=Falling(fail_at=3))
    assert bars[0].closed
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("fail_at", [2, 3], ids=["at the second epoch's begin", "within it"])
def test_a_resumed_run_goes_on_with_bar_and_curves(tmp_path, bars, monkeypatch, fail_at):
    drawn = {}
    monkeypatch.setattr(module, "save_curves", lambda path, history: drawn.update(history))

    def start(resume: bool, fail_at: int | None = None) -> None:
        method = Falling(fail_at)
        optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
        state = {"method": method, "optimizer": optimizer}
        checkpoint = Checkpoint(state, method, str(tmp_path), str(tmp_path / "model.pt"), resume)
        # Before the checkpoint, as in the bundles.
        handlers = [Progress(str(tmp_path)), checkpoint]
        SemiSupervisedTrainer("cpu", 2, [{}, {}], method, optimizer, False, train_handlers=handlers).run()

    with pytest.raises(RuntimeError, match="plug"):
        start(False, fail_at)
    start(True)
    assert drawn["train/loss"] == [(1, 3.5), (2, 1.5)]
    assert (bars[1].total, bars[1].count) == (4, 4), "it does not begin at the left again"
    drawn.clear()
    start(False)
    assert drawn["train/loss"] == [(1, 3.5), (2, 1.5)], "a new run does not go on with an old one's curves"


def test_figures_of_epochs_that_are_repeated_are_not_drawn_twice(tmp_path):
    """The process was killed after the epoch's figures were written, and before its checkpoint was."""
    (tmp_path / "history.json").write_text('{"train/loss": [[1, 3.5], [2, 9.0]], "val_dice": [[2, 0.5]]}')
    handler = Progress(str(tmp_path))
    engine = Engine(lambda engine, batch: {"loss": 1.0})
    handler.attach(engine)
    engine.add_event_handler(Events.STARTED, lambda: setattr(engine.state, "epoch", 1))
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: engine.state.metrics.update({"train/loss": 1.5}))
    engine.run([0], 2)
    assert handler.history["train/loss"] == [(1, 3.5), (2, 1.5)]
    assert not handler.history["val_dice"]


def test_a_history_that_is_lost_is_said(tmp_path, caplog):
    handler = Progress(str(tmp_path))
    handler._recall(5)
    assert "history.json can't be read: the curves begin with epoch 5" in caplog.text


def test_bar_of_a_method_with_several_optimizers(tmp_path, bars):
    class Pair(Falling):
        def forward(self, batch, optimizer=""):
            return {"loss": self.weight * 0 + (1 if optimizer == "first" else 10)}

    method = Pair()
    optimizers = {name: torch.optim.SGD(method.parameters(), lr=0.1) for name in ("first", "second")}
    handler = Progress(str(tmp_path))
    SemiSupervisedTrainer("cpu", 1, [{}], method, optimizers, False, train_handlers=[handler]).run()
    assert bars[0].shown == ["11"]
    assert handler.history["train/loss"] == [(1, 11.0)]


def test_only_the_first_process_shows_anything(tmp_path, bars, monkeypatch):
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    train(Progress(str(tmp_path)))
    assert bars == []
    assert list(tmp_path.iterdir()) == []
