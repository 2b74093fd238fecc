"""Knowledge lock-in: parts of a network that training must not change, and the proof that it did not."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from types import MethodType

from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import BadInput
from ..networks import state_digest

__all__ = ["LockIn", "LockInBroken"]

logger = logging.getLogger(__name__)


class LockInBroken(BadInput):
    """A locked parameter or buffer changed, or a configuration would let it."""


def _stay_in_evaluation_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


class LockIn:
    """Locks the parts of a network whose names match, and proves at the end that they are as they were.

    Locking happens when the handler is made, so that an optimiser made after it can be given
    :meth:`trainable_parameters`: no gradients for the locked parameters, and evaluation mode for the locked modules
    (norm statistics, dropout) through every later ``network.train()``. When training starts, the digest of the locked
    parameters and buffers is taken; when it completes, the digest is taken again and must be the same. It must so
    before the first epoch, too, when a resumed run has read its checkpoint. Put this handler before the one that reads
    checkpoints and writes weights.

    Args:
        network: the network that will be deployed.
        patterns: names of its parts with ``*`` and ``?``, such as ``encoder.*``; a bare module name means all
            below. Empty locks nothing.

    Raises:
        BadInput: a pattern that matches nothing.
        LockInBroken: at the start, when an optimiser of the engine holds a locked parameter, or a checkpoint changed
            what is locked; at the end, when the digest differs.
    """

    def __init__(self, network: nn.Module, patterns: Sequence[str]) -> None:
        self.network = network
        self.patterns = [pattern if "*" in pattern else f"{pattern}.*" for pattern in patterns]
        for pattern in self.patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in network.state_dict()):
                names = ", ".join(name for name, _ in network.named_children())
                raise BadInput(f"lock-in: nothing in the network matches {pattern!r}; its parts are {names}.")
        for name, parameter in network.named_parameters():
            if self._matches(name):
                parameter.requires_grad_(False)
        for name, module in network.named_modules():
            own = [f"{name}.{key}" for key in module.state_dict()]
            if name and (all(map(self._matches, own)) if own else self._matches(name)):
                module.train = MethodType(_stay_in_evaluation_mode, module)
                module.eval()
        self.before = ""
        self._begun = False
        self._tensors: dict[str, str] = {}

    def _matches(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)

    def locked_state(self) -> Mapping[str, Tensor]:
        """The locked parameters and buffers by name."""
        everything = {**dict(self.network.named_buffers()), **self.network.state_dict()}
        return {name: value for name, value in everything.items() if self._matches(name)}

    def trainable_parameters(self, module: nn.Module | None = None) -> list[nn.Parameter]:
        """What is not locked, for the optimiser: of the network, or of a method around it with its own parameters."""
        return [parameter for parameter in (module or self.network).parameters() if parameter.requires_grad]

    def digest(self) -> str:
        """Digest of everything locked."""
        return state_digest(self.locked_state())

    def attach(self, engine: Engine) -> None:
        """Take the digest when ``engine`` starts, compare it when it completes."""
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.EPOCH_STARTED, self._check_checkpoint)
        engine.add_event_handler(Events.COMPLETED, self._prove)

    def _begin(self, engine: Engine) -> None:
        optimizers = getattr(engine, "optimizers", {})
        for optimizer in optimizers.values() if isinstance(optimizers, Mapping) else [optimizers]:
            self._refuse_locked(optimizer)
        self.before = self.digest()
        self._begun = False
        self._tensors = self._digests()

    def _refuse_locked(self, optimizer: Optimizer) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self.network.named_parameters():
            if self._matches(name) and id(parameter) in held:
                raise LockInBroken(
                    f"lock-in: the optimiser holds the locked parameter {name!r} and could move it. Make the optimiser "
                    "after the lock-in, from its trainable_parameters()."
                )

    def _digests(self) -> dict[str, str]:
        return {name: state_digest({name: value}) for name, value in self.locked_state().items()}

    def _changed(self) -> list[str]:
        """Names of the locked tensors that are not as they were when training started."""
        now = self._digests()
        return [name for name in {**self._tensors, **now} if now.get(name) != self._tensors.get(name)]

    def _check_checkpoint(self, engine: Engine) -> None:
        # Whatever reads a checkpoint has done so when training started, but perhaps after this handler.
        if self._begun:
            return
        self._begun = True
        changed = self._changed()
        if changed:
            raise LockInBroken(
                f"lock-in: the checkpoint to resume from has other values for {len(changed)} locked tensors than the "
                f"weights this run was given to lock, first {changed[0]!r}. Give the weights that the run was begun "
                "with, or begin a new one: --resume false, or another output_dir."
            )

    def _prove(self, engine: Engine) -> None:
        changed = self._changed()
        if changed:
            raise LockInBroken(
                f"lock-in: {len(changed)} locked tensors changed during training, first {changed[0]!r}. No weights "
                "were written. Something other than the optimiser moved them: a moving average, a norm layer in "
                "training mode."
            )
        if self._tensors:
            logger.info("Lock-in holds: %d tensors unchanged, digest %s", len(self._tensors), self.before[:12])
