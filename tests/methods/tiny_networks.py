"""What the tests of the methods share: networks and batches small enough to do by hand, and the engine's loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from common.methods import Method
from common.networks import SegmentationNetwork

Batch = dict[str, dict[str, Tensor]]


class Pointwise(nn.Module):
    """Two classes; the logit of class 1 is ``slope * voxel + bias``, that of class 0 is 0: all can be done by hand."""

    def __init__(self, slope: float, bias: float = 0.0) -> None:
        super().__init__()
        self.slope, self.bias = nn.Parameter(torch.tensor(slope)), nn.Parameter(torch.tensor(bias))

    def become(self, slope: float) -> None:
        with torch.no_grad():
            self.slope.fill_(slope)

    def encoder(self, image: Tensor) -> list[Tensor]:
        return [image]

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(image), self.slope * image + self.bias], dim=1)

    def forward_all(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return self.encoder(image), [self(image)]


def voxels(*values: float) -> Tensor:
    return torch.tensor(values).reshape(1, 1, 1, -1)


def batch_of(unlabeled: Tensor, strong: Tensor | None = None) -> Batch:
    return {
        "labeled": {"image": torch.zeros_like(unlabeled), "label": torch.zeros_like(unlabeled).long()},
        "unlabeled": {"image": unlabeled, "strong": unlabeled if strong is None else strong},
    }


def small(seed: int, features: tuple[int, ...] = (2, 4), dropout: float = 0.0) -> SegmentationNetwork:
    torch.manual_seed(seed)
    stages = len(features)
    return SegmentationNetwork(2, 1, 3, features, [3] * stages, [1] + [2] * (stages - 1), 1, dropout)


def real_batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    image, weak, noise = torch.randn(3, 2, 1, 16, 16, generator=generator)
    label = torch.randint(3, (2, 1, 16, 16), generator=generator)
    return {"labeled": {"image": image, "label": label}, "unlabeled": {"image": weak, "strong": weak + noise}}


def train(method: Method, optimizer: torch.optim.Optimizer, steps: Iterable[int], total: int = 4) -> list[float]:
    """The losses of some steps, made as the engine makes them; a step's batch and draws follow from its number."""
    losses = []
    for step in steps:
        torch.manual_seed(step)
        method.train()
        method.progress(step, total)
        optimizer.zero_grad()
        loss = method(real_batch(step))["loss"]
        loss.backward()
        optimizer.step()
        method.after_step()
        losses.append(loss.item())
    return losses


def check_resuming(make: Callable[[int], Method], interrupted: int = 2, total: int = 4) -> None:
    """Train ``make(0)``, hand its state after some steps to ``make(5)``, and see both go on alike."""
    whole, resumed = make(0), make(5)
    optimizers = [torch.optim.SGD(m.trainable_parameters(), lr=0.1, momentum=0.9) for m in (whole, resumed)]
    train(whole, optimizers[0], range(interrupted), total)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    rest = range(interrupted, total)
    assert train(resumed, optimizers[1], rest, total) == train(whole, optimizers[0], rest, total)
    assert same(resumed.state_dict(), whole.state_dict())


def check_mixed_precision(method: Method) -> None:
    """Under bf16 every term is a float32 near the one without it."""
    terms = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            terms.append(method(real_batch()))
    for name, value in terms[0].items():
        assert terms[1][name].dtype == torch.float32, name
        torch.testing.assert_close(terms[1][name], value, atol=0.05, rtol=0.05, equal_nan=True, msg=name)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def moved(network: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Names of what is no longer as it was."""
    return [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])]
