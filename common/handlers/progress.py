"""What a person sees while a network trains: a bar with the time left, a line an epoch, and at the end curves."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from tqdm import tqdm

from ..files import write_atomically
from .drawing import save_curves

__all__ = ["Progress"]

logger = logging.getLogger(__name__)
#: share of the training's time from which on waiting for data is worth a word
_STARVED = 0.1
_SHOWN = ("train/loss", "train/kept/all", "val_")


class Progress:
    """A progress bar over all epochs, a log line an epoch, and ``curves.png`` when training completes.

    The figures drawn lie in ``history.json``: a list of (epoch, value) pairs by name. A resumed run goes on with those
    of the epochs that it does not repeat. The last line says how long the steps waited for their data.

    Args:
        output_dir: folder for the curves and the figures.
        evaluator: its metrics are shown in the epoch's line and drawn, too.
    """

    def __init__(self, output_dir: str, evaluator: Engine | None = None) -> None:
        self.output_dir = Path(output_dir)
        self.evaluator = evaluator
        self.history: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self.bar: tqdm | None = None
        self.waited = self.computed = self._since = 0.0

    def attach(self, engine: Engine) -> None:
        """Register with the trainer. Only the first process of a distributed run shows anything."""
        if idist.get_rank() != 0:
            return
        engine.add_event_handler(Events.EPOCH_STARTED, self._open)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._lap)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._received)
        engine.add_event_handler(Events.ITERATION_STARTED, self._lap)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._advance)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._close_on_error)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(
                Events.COMPLETED, lambda evaluator: self._add(evaluator, engine.state.epoch)
            )
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    @property
    def _history_path(self) -> Path:
        return self.output_dir / "history.json"

    def _open(self, engine: Engine) -> None:
        # Not when the run starts: only now does everybody know whether, and where, it is resumed.
        if self.bar is not None:
            return
        if engine.state.epoch > 1:
            self._recall(engine.state.epoch)
        # Ignite's bar knows the time left of an epoch; a person asks for that of the run.
        epochs, length = engine.state.max_epochs, engine.state.epoch_length
        total = None if epochs is None or length is None else epochs * length
        self.bar = tqdm(total=total, initial=engine.state.iteration, desc="training", unit="step", disable=None)

    def _recall(self, first: int) -> None:
        """Take up the figures of the epochs before ``first``; without them the curves begin there."""
        try:
            saved = json.loads(self._history_path.read_text())
        except (OSError, ValueError):
            logger.warning("%s can't be read: the curves begin with epoch %d", self._history_path, first)
            return
        for name, points in saved.items():
            self.history[name] = [(epoch, value) for epoch, value in points if epoch < first]

    def _lap(self) -> float:
        """Seconds since the last call."""
        last, self._since = self._since, time.perf_counter()
        return self._since - last

    def _received(self) -> None:
        self.waited += self._lap()

    def _advance(self, engine: Engine) -> None:
        self.computed += self._lap()
        assert self.bar is not None  # opened with the epoch
        output: Any = engine.state.output
        self.bar.set_postfix(loss=f"{output['loss']:.4g}", refresh=False)
        self.bar.update()

    def _close_on_error(self, engine: Engine, error: BaseException) -> None:
        if self.bar is not None:
            self.bar.close()

    def _add(self, engine: Engine, epoch: int) -> None:
        for name, value in engine.state.metrics.items():
            if isinstance(value, int | float) and value == value:
                self.history[name].append((epoch, float(value)))

    def _epoch(self, engine: Engine) -> None:
        self._add(engine, engine.state.epoch)
        epoch = engine.state.epoch
        shown = [
            f"{name.removeprefix('train/')} {points[-1][1]:.4g}"
            for name, points in self.history.items()
            if name.startswith(_SHOWN) and points and points[-1][0] == epoch
        ]
        logger.info("Epoch %d/%d: %s", epoch, engine.state.max_epochs, ", ".join(shown))
        write_atomically(self._history_path, json.dumps(self.history))

    def _finish(self, engine: Engine) -> None:
        if self.bar is not None:
            self.bar.close()
        else:  # resumed when all epochs were done, and the curves perhaps were not
            self._recall(engine.state.epoch + 1)
        if self.computed > 0:
            share = self.waited / (self.waited + self.computed)
            advice = "; more num_workers, or fewer, may help" if share > _STARVED else ""
            logger.info("Steps waited for data for %.1f %% of their time (%.0f s)%s", 100 * share, self.waited, advice)
        if self.history:
            save_curves(self.output_dir / "curves.png", dict(self.history))
