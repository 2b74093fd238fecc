"""Steps of everything that is trained, by two processes or by one that does for both what they should do.

Run by torchrun, ``recipe_steps.py FOLDER PLAN NAME ...`` trains each name with two processes, and leaves each one's
weights as ``FOLDER/NAME/RANK.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from benchmarks.training import DUAL, configuration, crops
from common.engines import SemiSupervisedTrainer, start_distributed, stop_distributed
from common.methods.base import Method

STEPS = 2
LAST_EPOCH = 10  # of as many: every term has its full weight


class Setup:
    """The method, its optimisers and a rank's batches; the same weights whatever the rank."""

    def __init__(self, name: str, folder: Path, plan: str, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        parser = configuration(name, folder, plan, "cpu")
        self.lock_in = [parser.get_parsed_content("lock_in")] if name in DUAL else []
        self.method: Method = parser.get_parsed_content("train#method")
        found = parser.get_parsed_content("train#optimizer")
        self.optimizer = found
        self.optimizers = found if isinstance(found, dict) else {"": found}
        self.clip = parser["gradient_clip"]
        self.batches = [crops(parser, name, seed=2 * step + rank) for step in range(STEPS)]


def train(name: str, folder: Path, plan: str, rank: int) -> dict[str, Tensor]:
    """The weights after some steps of the engine, in this process and its fellow."""
    setup = Setup(name, folder, plan, rank)
    trainer = SemiSupervisedTrainer(
        "cpu", LAST_EPOCH, setup.batches, setup.method, setup.optimizer, False, setup.clip, train_handlers=setup.lock_in
    )
    trainer.state.epoch, trainer.state.iteration = LAST_EPOCH - 1, (LAST_EPOCH - 1) * STEPS
    trainer.run()
    return setup.method.state_dict()


def train_alone(name: str, folder: Path, plan: str) -> dict[str, Tensor]:
    """What both should have: each rank's losses of its own batches and draws, a step by the mean of their gradients."""
    ranks = [Setup(name, folder / str(rank), plan, rank) for rank in (0, 1)]
    first, second = (setup.method for setup in ranks)
    random = []
    for rank in (0, 1):
        torch.manual_seed(LAST_EPOCH * 1_009 + rank)  # as the engine begins an epoch of seed 0
        random.append(torch.get_rng_state())
    for step in range(STEPS):
        for setup in ranks:
            setup.method.train()
            setup.method.progress((LAST_EPOCH - 1) * STEPS + step, LAST_EPOCH * STEPS)
        for optimizer in ranks[0].optimizers:
            with torch.no_grad():  # buffers are the first one's before every pass
                for own, other in zip(second.buffers(), first.buffers(), strict=True):
                    own.copy_(other)
            for rank, setup in enumerate(ranks):
                setup.optimizers[optimizer].zero_grad()
                torch.set_rng_state(random[rank])
                batch = setup.batches[step]
                terms = setup.method(batch, optimizer) if optimizer else setup.method(batch)
                random[rank] = torch.get_rng_state()
                terms["loss"].backward()
            for own, other in zip(first.parameters(), second.parameters(), strict=True):
                grads = [p.grad for p in (own, other) if p.grad is not None]
                if grads:
                    own.grad = torch.stack(grads).sum(0) / 2
                    other.grad = own.grad.clone()
            for setup in ranks:
                groups: list[dict[str, Any]] = setup.optimizers[optimizer].param_groups
                held = [p for group in groups for p in group["params"] if p.grad is not None]
                clip_grad_norm_(held, setup.clip)
                setup.optimizers[optimizer].step()
        for setup in ranks:
            setup.method.after_step()
    return first.state_dict()


if __name__ == "__main__":
    place, given, *names = sys.argv[1:]
    start_distributed()
    number = int(os.environ["RANK"])
    for item in names:
        state = train(item, Path(place) / item / f"of_{number}", given, number)
        torch.save(state, Path(place) / item / f"{number}.pt")
    stop_distributed()
