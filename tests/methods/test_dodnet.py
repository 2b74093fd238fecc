"""DoDNet: what a case teaches each task, and that it teaches nothing about the others."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_networks import check_mixed_precision, check_resuming, moved, real_batch, same, small
from torch import Tensor

from common.errors import BadInput
from common.methods import DoDNet
from common.methods.dodnet import task_targets
from common.networks.dynamic_head import DynamicHeadNetwork


def network(seed: int = 0, tasks=None) -> DynamicHeadNetwork:
    torch.manual_seed(seed)
    return DynamicHeadNetwork(2, 1, 3, [2, 4], [3, 3], [1, 2], 1, tasks=tasks)


def test_targets() -> None:
    """An organ includes its tumour; what a case has no label for is -1, and so is the tumour of a task without one."""
    label = torch.tensor([[0, 1, 2, 3], [0, 2, 2, 0], [3, 0, 1, 0]]).reshape(3, 1, 1, 4)
    targets = task_targets(label, [None, [2], [1]], [[1, 3], [2]], num_classes=4)
    absent = [-1.0] * 4
    expected = [
        [[[0, 1, 0, 1], [0, 0, 0, 1]], [[0, 0, 1, 0], absent]],
        [[absent, absent], [[0, 1, 1, 0], absent]],
        [[[1, 0, 1, 0], absent], [absent, absent]],
    ]
    assert targets.squeeze(3).tolist() == expected
    assert torch.equal(task_targets(label.byte(), [None, [2], [1]], [[1, 3], [2]], 4), targets)


class FixedHeads(DynamicHeadNetwork):
    """Answers with given logits (B, T, 2, *spatial)."""

    def answer(self, logits: Tensor) -> FixedHeads:
        self.given = torch.nn.Parameter(logits)
        return self

    def forward_tasks(self, image: Tensor) -> Tensor:
        return self.given


def test_loss_by_hand() -> None:
    """One case of organ 1 and one of organ 2: a Dice and a cross-entropy each, of two voxels."""
    logits = torch.tensor([[[1.0, -2.0], [9.0, 9.0]], [[9.0, 9.0], [0.5, 3.0]]]).reshape(2, 2, 1, 1, 2)
    given = FixedHeads(2, 1, 3, [2, 4], [3, 3], [1, 2], 1).answer(logits.expand(-1, -1, 2, -1, -1).contiguous())
    label = torch.tensor([[1, 0], [0, 2]]).reshape(2, 1, 1, 2)
    method = DoDNet(given)
    terms = method({"labeled": {"image": torch.zeros(2, 1, 1, 2), "label": label, "annotated": [[1], [2]]}})
    dice, cross_entropy = 0.0, 0.0
    for values, target in (((1.0, -2.0), (1, 0)), ((0.5, 3.0), (0, 1))):
        p = [1 / (1 + math.exp(-value)) for value in values]
        overlap = sum(probability * y for probability, y in zip(p, target, strict=True))
        dice += 1 - 2 * overlap / (sum(p) + 1 + 1)
        cross_entropy -= sum(math.log(q if y else 1 - q) for q, y in zip(p, target, strict=True)) / 2
    assert terms["dice"].item() == pytest.approx(dice / 2, rel=1e-5)
    assert terms["cross_entropy"].item() == pytest.approx(cross_entropy / 2, rel=1e-5)
    assert terms["loss"].item() == pytest.approx((dice + cross_entropy) / 2, rel=1e-5)
    terms["loss"].backward()
    learnt = given.given.grad.flatten(3).abs().sum(3)
    assert (learnt > 0).tolist() == [[[True, False], [False, False]], [[False, False], [True, False]]]


def test_nothing_calls_an_unknown_structure_background() -> None:
    """Only through what all tasks share does a case of organ 1 move what is said of organ 2."""
    method = DoDNet(network())
    batch = real_batch()
    batch["labeled"]["label"] = batch["labeled"]["label"] % 2
    seen = []
    method.network.controller.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
    method({"labeled": {**batch["labeled"], "annotated": [[1], [1]]}})["loss"].backward()
    by_task = seen[0].reshape(2, 2, -1).abs().sum(2)
    assert (by_task[:, 0] > 0).all()
    assert (by_task[:, 1] == 0).all(), "the head of organ 2 hears nothing"


def test_whole_labels_teach_every_task() -> None:
    method = DoDNet(network(tasks=[[1, 2]]))
    start = copy.deepcopy(method.network.state_dict())
    optimizer = torch.optim.SGD(method.trainable_parameters(), 0.1)
    method(real_batch())["loss"].backward()
    optimizer.step()
    assert {name.split(".")[0] for name in moved(method.network, start)} == {
        "encoder",
        "segmentation_decoder",
        "controller",
    }
    assert method.deployed is method.network
    assert same(method.deployed.state_dict(), method.network.state_dict())


def test_it_needs_its_own_network() -> None:
    with pytest.raises(BadInput, match="DynamicHeadNetwork"):
        DoDNet(small(0))


def test_state_read_back_continues_the_run() -> None:
    check_resuming(lambda seed: DoDNet(network(seed)))


def test_mixed_precision() -> None:
    check_mixed_precision(DoDNet(network()))
