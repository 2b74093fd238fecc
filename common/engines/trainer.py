"""One training engine for every method: supervised, semi-supervised and above locked parts."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Events
from monai.engines import Trainer
from monai.engines.workflow import Workflow
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from ..errors import BadInput
from ..methods.base import Method
from ..processes import gathered
from ..switches import is_on
from .compilation import compiled_networks
from .occupancy import leave
from .precision import precision

__all__ = ["SemiSupervisedTrainer"]


def _to_device(batch: Any, device: torch.device, non_blocking: bool) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=non_blocking)
    if isinstance(batch, Mapping):
        return {key: _to_device(value, device, non_blocking) for key, value in batch.items()}
    return batch


class SemiSupervisedTrainer(Trainer):
    """Trains a :class:`~common.methods.Method` on streams of labelled and unlabelled batches.

    The method says what its losses are; everything else is here: mixed precision, gradient clipping, one or several
    optimisers, distributed runs, the means of every logged term over an epoch and all processes, and reproducibility:
    each epoch starts from a random state that follows from ``seed`` and its number alone, so a resumed run continues as
    if never stopped.

    Args:
        device: where to train.
        max_epochs: number of epochs.
        train_data_loader: yields ``{"labeled": batch, "unlabeled": batch, ...}``, see
            :class:`~common.data.StreamLoader`; its length is the number of iterations an epoch.
        method: what to train. It is wrapped in DistributedDataParallel when a process group exists.
        optimizer: one optimiser, or a dictionary of them. With several, the method is asked for the losses of each in
            turn, by the optimiser's name.
        amp: see :func:`~common.engines.precision`.
        gradient_clip: the largest 2-norm of an optimiser's gradients; None for no limit.
        loss_weight: what every loss is multiplied by before its gradients are taken; what is logged stays as it is.
        seed: base of the random state.
        compile: whether the networks are compiled, see :func:`~.compilation.compiled_networks`.
        train_handlers: Ignite handlers with an ``attach`` method.

    Raises:
        BadInput: during the run, when a loss or gradient is not finite.
    """

    scaler: torch.amp.GradScaler  # type: ignore[assignment]  # MONAI's is for CUDA alone

    def __init__(
        self,
        device: str | torch.device,
        max_epochs: int,
        train_data_loader: Iterable,
        method: Method,
        optimizer: Optimizer | Mapping[str, Optimizer],
        amp: bool | str = "auto",
        gradient_clip: float | None = 12.0,
        loss_weight: float = 1.0,
        seed: int = 0,
        compile: bool | str = False,  # noqa: A002 (as PyTorch calls it)
        train_handlers: Sequence | None = None,
    ) -> None:
        device = torch.device(device)
        self.method = method.to(device)
        self.optimizers = {"": optimizer} if isinstance(optimizer, Optimizer) else dict(optimizer)
        self.precision = precision(amp, device)
        self.gradient_clip = gradient_clip
        self.loss_weight = loss_weight
        self.seed = seed
        self.compile = is_on(compile, "compile")
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            data_loader=train_data_loader,
            handlers=train_handlers,
            amp=self.precision is not None,
            decollate=False,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision is torch.float16)
        self.model: torch.nn.Module = self.method
        self.add_event_handler(Events.EPOCH_STARTED, SemiSupervisedTrainer._begin_epoch)
        self.add_event_handler(Events.ITERATION_COMPLETED, SemiSupervisedTrainer._accumulate)
        self.add_event_handler(Events.EXCEPTION_RAISED, SemiSupervisedTrainer._raise)  # after everybody's clean-up
        # First among the epoch's handlers, so that those which log see this epoch's means.
        self._event_handlers[Events.EPOCH_COMPLETED].insert(0, (SemiSupervisedTrainer._finish_epoch, (self,), {}))

    def run(self) -> None:  # type: ignore[override]  # as MONAI's own, without arguments
        """Train until ``max_epochs``; a finished or resumed state is continued, not started over."""
        if dist.is_available() and dist.is_initialized():
            device = self.state.device
            ids = [device.index] if device.type == "cuda" else None
            self.model = DistributedDataParallel(self.method, device_ids=ids, find_unused_parameters=True)
        try:
            with compiled_networks(self.method) if self.compile else nullcontext():
                Workflow.run(self)
        finally:
            self.model = self.method  # what is distributed holds the process group, see `stop_distributed`
            leave()

    def _begin_epoch(self) -> None:
        self._sums.clear()
        self._counts.clear()
        rank = idist.get_rank()
        seed = (self.seed * 1_000_003 + self.state.epoch) * 1_009 + rank
        torch.manual_seed(seed)
        # Nothing here draws from these two; a method of somebody else's may.
        random.seed(seed)
        np.random.seed(seed % 2**32)
        if hasattr(self.data_loader, "set_epoch"):
            self.data_loader.set_epoch(self.state.epoch)

    def _raise(self, error: BaseException) -> None:
        raise error

    def _accumulate(self) -> None:
        for name, value in self.state.output.items():
            if math.isfinite(value):
                self._sums[name] += value
                self._counts[name] += 1

    def _finish_epoch(self) -> None:
        if dist.is_available() and dist.is_initialized():
            # As before every step, or each process would validate with the statistics of its own last batch.
            for buffer in self.method.buffers():
                dist.broadcast(buffer, 0)
        # As objects, because a term may have had no value in some of the processes.
        shares = gathered((dict(self._sums), dict(self._counts)))
        names = dict.fromkeys(name for sums, _ in shares for name in sums)
        means = {
            f"train/{name}": sum(sums.get(name, 0.0) for sums, _ in shares)
            / sum(counts.get(name, 0) for _, counts in shares)
            for name in names
        }
        for name, optimizer in self.optimizers.items():
            means[f"train/{name}/learning_rate" if name else "train/learning_rate"] = optimizer.param_groups[0]["lr"]
        # A term that has ended, or a class of which nothing is kept any more, must not go on with its last value.
        for name in [name for name in self.state.metrics if name.startswith("train/")]:
            del self.state.metrics[name]
        self.state.metrics.update(means)

    def _iteration(self, engine: SemiSupervisedTrainer, batchdata: Mapping[str, Any]) -> dict[str, float]:
        """One step of every optimiser; returns each logged term as a number, ``loss`` being the sum of all losses."""
        batch = _to_device(batchdata, self.state.device, self.non_blocking)
        self.model.train()
        self.method.progress(self.state.iteration - 1, self.state.max_epochs * self.state.epoch_length)
        logged: dict[str, float] = {}
        for name, optimizer in self.optimizers.items():
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.state.device.type, self.precision, enabled=self.precision is not None):
                terms = self.model(batch, name) if name else self.model(batch)
            values = dict(
                zip(terms, torch.stack([t.detach().float().mean() for t in terms.values()]).tolist(), strict=True)
            )
            if not math.isfinite(values["loss"]):
                raise BadInput(self._diverged(f"the loss is {values['loss']}", values))
            self.scaler.scale(self.loss_weight * terms["loss"]).backward()
            self.scaler.unscale_(optimizer)
            self._clip(optimizer, values)
            self.scaler.step(optimizer)
            self.scaler.update()
            logged.update({f"{name}/{key}" if name else key: value for key, value in values.items()})
        if "" not in self.optimizers:
            logged["loss"] = sum(logged[f"{name}/loss"] for name in self.optimizers)
        self.method.after_step()
        return logged

    def _clip(self, optimizer: Optimizer, values: dict[str, float]) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = clip_grad_norm_(parameters, self.gradient_clip if self.gradient_clip else math.inf)
        # The scaler of fp16 expects overflows now and then, skips that step and lowers its scale.
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            raise BadInput(self._diverged("a gradient is not finite", values))

    def _diverged(self, what: str, values: dict[str, float]) -> str:
        terms = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        return (
            f"training diverged in epoch {self.state.epoch}, iteration {self.state.iteration}: {what} ({terms}). "
            "No weights were written. Lower learning_rate, or try --amp false."
        )
