"""Checkpoints: the weights to use, and everything to resume from."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator
from torch import nn

from ..engines.trainer import SemiSupervisedTrainer
from ..errors import BadInput
from ..files import remove_leftovers, write_atomically
from ..networks import check_finite, save_weights
from ..processes import gathered
from ..switches import is_on

__all__ = ["Checkpoint"]

logger = logging.getLogger(__name__)


class Checkpoint:
    """Writes ``checkpoint.pt`` after every epoch, and the weights to use once, when training completes.

    The weights to use replace ``model.pt`` only at the very end, in one step, so a run that is killed or diverges
    leaves the former ones in place. By default they are those of the last epoch, as in nnU-Net: weights chosen on the
    validation cases make the numbers of those cases too good. With ``select="best"`` they are those of the best
    validation; evaluate them on other cases.

    Args:
        trainer_state: objects with ``state_dict`` and ``load_state_dict`` by name: method, optimisers, schedulers.
        network: the network whose weights are deployed.
        output_dir: folder for ``checkpoint.pt`` and ``best.pt``.
        model_path: where the weights to use go.
        resume: continue from ``checkpoint.pt`` when it exists.
        select: ``"last"`` or ``"best"``.
        evaluator: its key metric decides with ``select="best"``.

    Raises:
        BadInput: weights that are not finite, a file that can't be written, a checkpoint of another run or of one with
            another number of epochs, or one that the first process has and another has not, a validation without the
            figure to select by.
    """

    def __init__(
        self,
        trainer_state: Mapping[str, Any],
        network: nn.Module,
        output_dir: str,
        model_path: str,
        resume: bool = False,
        select: str = "last",
        evaluator: Engine | None = None,
    ) -> None:
        if select not in ("last", "best"):
            raise BadInput(f"select: found {select!r}, expected 'last' or 'best'.")
        if select == "best" and evaluator is None:
            raise BadInput("select is 'best', so there must be a validation, but the evaluator is null.")
        self.trainer_state = dict(trainer_state)
        self.network = network
        self.checkpoint_path = Path(output_dir) / "checkpoint.pt"
        self.best_path = Path(output_dir) / "best.pt"
        self.model_path = Path(model_path)
        self.resume = is_on(resume, "resume")
        self.select = select
        self.evaluator = evaluator
        self.best: float | None = None

    def attach(self, engine: Engine) -> None:
        """Register with the trainer. Only the first process of a distributed run writes."""
        engine.add_event_handler(Events.STARTED, self._begin)
        if idist.get_rank() == 0:
            if self.select == "best" and self.evaluator is not None:
                self.evaluator.add_event_handler(Events.COMPLETED, self._keep_best)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)
            engine.add_event_handler(Events.COMPLETED, self._deploy)

    def _begin(self, engine: SemiSupervisedTrainer) -> None:
        if idist.get_rank() == 0:
            # The only files that are large, and nobody else writes them.
            for path in (self.checkpoint_path, self.best_path, self.model_path):
                remove_leftovers(path)
        if not self.resume or not self._exists():
            if idist.get_rank() == 0:
                self._set_aside()
            return
        try:
            saved = torch.load(self.checkpoint_path, map_location="cpu", weights_only=True)
            epochs, scaler = saved["max_epochs"], saved["scaler"]
            done, self.best = (saved["epoch"], saved["iteration"]), saved["best"]
            for name, item in self.trainer_state.items():
                item.load_state_dict(saved["state"][name])
        except Exception as error:
            raise BadInput(
                f"{self.checkpoint_path}: can't resume from it ({type(error).__name__}: {str(error)[:300]}). It may "
                "belong to a run with another configuration; use another output_dir, or --resume false to start over."
            ) from error
        if epochs != engine.state.max_epochs:
            raise BadInput(
                f"{self.checkpoint_path}: this run was begun for {epochs} epochs, at the end of which its learning "
                f"rate is 0; found max_epochs {engine.state.max_epochs}. Resume with --train#trainer#max_epochs "
                f"{epochs}, or begin a run in another output_dir."
            )
        engine.state.epoch, engine.state.iteration = done
        if scaler:  # empty when that part of the run needed no scaling, as with bf16
            engine.scaler.load_state_dict(scaler)
        logger.info("Resumed from %s after epoch %d", self.checkpoint_path, engine.state.epoch)

    def _exists(self) -> bool:
        """Whether there is a checkpoint, which the first process says for all: they must all do the same."""
        found = self.checkpoint_path.exists()
        of_first = gathered(found)[0]
        if of_first and not found:
            raise BadInput(
                f"{self.checkpoint_path}: found no checkpoint here, though the first process has one to resume from. "
                "Choose an output_dir on a disk that all machines of the run share."
            )
        return of_first

    def _set_aside(self) -> None:
        """Keep what a former run has left from being taken for this one's, and from being lost before it has begun."""
        for path in (self.checkpoint_path, self.best_path):
            if path.exists():
                path.replace(_former(path))
        if _former(self.checkpoint_path).exists():
            logger.info("%s is of a former run; the first epoch removes it", _former(self.checkpoint_path))

    def _save(self, engine: SemiSupervisedTrainer) -> None:
        check_finite(self.network.state_dict(), str(self.checkpoint_path))
        content = {
            "state": {name: item.state_dict() for name, item in self.trainer_state.items()},
            "scaler": engine.scaler.state_dict(),
            "max_epochs": engine.state.max_epochs,
            "epoch": engine.state.epoch,
            "iteration": engine.state.iteration,
            "best": self.best,
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(self.checkpoint_path, buffer.getbuffer())
        for path in (self.checkpoint_path, self.best_path):
            _former(path).unlink(missing_ok=True)

    def _keep_best(self, evaluator: Evaluator) -> None:
        name = evaluator.state.key_metric_name
        value = evaluator.state.metrics.get(name)
        if value is None:
            raise BadInput(
                f"select is 'best', but the validation gave no {name or 'key metric'} to select by, only "
                f"{sorted(evaluator.state.metrics)}. Give the evaluator a key_val_metric, or use --select last."
            )
        if value != value:
            return
        if self.best is None or evaluator.metric_cmp_fn(value, self.best):
            self.best = float(value)
            save_weights(self.network, self.best_path)

    def _deploy(self, engine: Engine) -> None:
        if self.select == "best" and not self.best_path.exists():
            logger.warning("No validation gave a figure to select the best weights by: those of the last epoch it is")
        if self.select == "best" and self.best_path.exists():
            state = torch.load(self.best_path, map_location="cpu", weights_only=True)["model"]
            save_weights(state, self.model_path)
        else:
            save_weights(self.network, self.model_path)
        logger.info("Weights to use: %s", self.model_path)


def _former(path: Path) -> Path:
    return path.with_name(f"former_{path.name}")
