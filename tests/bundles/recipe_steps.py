"""Steps of everything that is trained, by two processes, or by one with the batches of both in one.

Run by torchrun, ``recipe_steps.py FOLDER PLAN NAME ...`` trains each name with two processes, and leaves each one's
weights as ``FOLDER/NAME/RANK.pt``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bundle_runs import DoublePrecision
from ignite.engine import Engine, Events
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.training import configuration, crops
from common.engines import SemiSupervisedTrainer, start_distributed, stop_distributed
from common.methods import distillation

STEPS = 2
CROPS = 2  # of a stream and a process, as the configs have it
LAST_EPOCH = 10  # of as many: every term has its full weight


class SameDraws:
    """What is drawn at random is the same in each step of every process, so that one can draw it for two."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, lambda engine: torch.manual_seed(engine.state.iteration))


def train(name: str, folder: Path, plan: str, ranks: Sequence[int], **settings: Any) -> dict[str, Tensor]:
    """The weights after some steps of the engine with the batches of some ranks in one; settings are the engine's."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    parser = configuration(name, folder, plan, "cpu")
    handlers = [
        DoublePrecision(),
        SameDraws(),
        *([parser.get_parsed_content("lock_in")] if "lock_in" in parser else []),
    ]
    method, optimizer = parser.get_parsed_content("train#method"), parser.get_parsed_content("train#optimizer")
    for item in optimizer.values() if isinstance(optimizer, dict) else [optimizer]:
        for group in item.param_groups:
            if "eps" in group:
                group["eps"] = 1e-3  # or Adam makes whole steps of gradients that are 0 but for their rounding
    batches = [
        together([unlike(crops(parser, name, seed=2 * step + rank), rank) for rank in ranks], in_halves=name == "bcp")
        for step in range(STEPS)
    ]
    settings = {"amp": False, "gradient_clip": parser["gradient_clip"], "train_handlers": handlers, **settings}
    trainer = SemiSupervisedTrainer("cpu", LAST_EPOCH, batches, method, optimizer, **settings)
    trainer.state.epoch, trainer.state.iteration = LAST_EPOCH - 1, (LAST_EPOCH - 1) * STEPS
    with DrawForTwo() if len(ranks) > 1 else nullcontext():
        trainer.run()
    return method.state_dict()


def train_alone(name: str, folder: Path, plan: str) -> dict[str, Tensor]:
    """The weights after the same steps of one process with both batches in one."""
    with mock.patch.object(distillation, "random_boxes", boxes_for_two(distillation.random_boxes)):
        return train(name, folder, plan, (0, 1))


def unlike(batch: dict[str, dict[str, Any]], rank: int) -> dict[str, dict[str, Any]]:
    """Of the second process half of the voxels are background, and its first case has labels of all structures."""
    if rank:
        labeled = batch["labeled"]
        labeled["label"][..., labeled["label"].shape[-1] // 2 :] = 0
        if "annotated" in labeled:
            labeled["annotated"][0] = [1, 2]
    return batch


def halves(value: Any) -> tuple[Any, Any]:
    return value[: len(value) // 2], value[len(value) // 2 :]


def together(batches: Sequence[Mapping[str, Mapping[str, Any]]], in_halves: bool = False) -> dict[str, dict[str, Any]]:
    """Batches in one; BCP mixes a batch's first half with its second, so these stay such."""

    def join(values: Sequence[Any]) -> Any:
        if in_halves:
            values = [part for parts in zip(*map(halves, values), strict=True) for part in parts]
        return torch.cat(list(values)) if isinstance(values[0], Tensor) else list(chain(*values))

    return {
        stream: {key: join([batch[stream][key] for batch in batches]) for key in content}
        for stream, content in batches[0].items()
    }


class DrawForTwo(TorchDispatchMode):
    """What is drawn for a batch is drawn for one process's share of it, and the other's gets the same."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in ("normal_", "exponential_", "bernoulli_", "uniform_") and args[0].dim() > 0:
            share, _ = halves(args[0])
            return args[0].copy_(for_two(func(share, *args[1:], **kwargs)))
        if name in ("randn_like", "rand_like"):
            return for_two(func(halves(args[0])[0], *args[1:], **kwargs))
        if name in ("randn", "rand", "randint"):
            sizes = next(item for item in args if isinstance(item, list))
            if sizes:
                share = [[sizes[0] // 2, *sizes[1:]] if item is sizes else item for item in args]
                return for_two(func(*share, **kwargs))
        return func(*args, **kwargs)


def for_two(drawn: Tensor) -> Tensor:
    """Crops of several streams may lie one after the other, each of them twice as many."""
    return torch.cat([part for part in drawn.split(CROPS) for _ in (0, 1)])


def boxes_for_two(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Boxes are drawn item by item."""
    return lambda batch, *rest: for_two(draw(halves(batch)[0], *rest))


if __name__ == "__main__":
    place, given, *names = sys.argv[1:]
    start_distributed()
    number = int(os.environ["RANK"])
    for item in names:
        state = train(item, Path(place) / item / f"of_{number}", given, (number,))
        torch.save(state, Path(place) / item / f"{number}.pt")
    stop_distributed()
