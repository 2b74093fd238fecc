"""Co-training of weight-averaged models: the region mask, the soft labels, and who teaches whom."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_networks import Pointwise, check_mixed_precision, check_resuming, moved, real_batch, small, train, voxels

from common.errors import BadInput
from common.losses import FocalDiceLoss
from common.methods import CoTraining
from common.methods.co_training import soft_cross_entropy, unannotated_region


def labels(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows).reshape(len(rows), 1, 1, -1)


@pytest.mark.parametrize(
    ("dilation", "expected"),
    [
        (0, [[0, 0, 0, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0]]),
        (1, [[0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0]]),
        (2, [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 0]]),
    ],
)
def test_region_mask(dilation: int, expected: list[list[int]]) -> None:
    """Near the structures that a case is not annotated for, and never where it has one that it is annotated for."""
    label = labels([0, 1, 1, 0, 2, 0, 0], [0, 0, 1, 1, 2, 0, 0])
    region = unannotated_region(label, [[1], [2]], 3, dilation)
    assert region.squeeze().long().tolist() == expected


def test_where_people_labelled_everything_there_is_no_region() -> None:
    label = labels([0, 1, 2])
    for annotated in (None, [None], [[1, 2]]):
        assert not unannotated_region(label, annotated, 3, 5).any()
    three_dimensional = torch.ones(1, 1, 3, 3, 3).long()
    assert unannotated_region(three_dimensional, [[2]], 3, 1).all()


def test_soft_labels_in_a_mask() -> None:
    probabilities, own = torch.tensor([[0.3, 0.9], [0.7, 0.1]]), torch.tensor([[0.5, 0.2], [0.5, 0.8]])
    probabilities.requires_grad_()
    logits = own.log().reshape(1, 2, 1, 2).requires_grad_()
    mask = torch.tensor([True, False]).reshape(1, 1, 1, 2)
    loss = soft_cross_entropy(logits, probabilities.reshape(1, 2, 1, 2), mask)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(logits.grad[0, :, 0, 0], own[:, 0] - probabilities.detach()[:, 0])
    assert probabilities.grad is None, "the soft labels are constants"
    assert logits.grad[..., 1].abs().max() == 0
    assert soft_cross_entropy(logits, probabilities.reshape(1, 2, 1, 2), ~mask & mask).item() == 0


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_loss_by_hand() -> None:
    """Slopes 1 and -2, averages 3 and -1: the first learns from -1, the second from 3, in the second voxel alone."""
    method = CoTraining(Pointwise(1.0), soft_weight=0.1, dilation=0)
    for network, slope in ((method.second, -2.0), (method.average.module, 3.0), (method.second_average.module, -1.0)):
        network.become(slope)
    method.progress(5, 5)
    image, label = voxels(1.0, 2.0), labels([0, 1])
    terms = method({"labeled": {"image": image, "label": label, "annotated": [[]]}})
    soft = 0.0
    for slope, teacher in ((1.0, -1.0), (-2.0, 3.0)):
        own, other = sigmoid(2 * slope), sigmoid(2 * teacher)
        soft -= other * math.log(own) + (1 - other) * math.log(1 - own)
    hard = sum(
        FocalDiceLoss(dice_weight=0.1)(network(image), label).item() for network in (method.network, method.second)
    )
    assert terms["segmentation"].item() == pytest.approx(hard, rel=1e-5)
    assert terms["consistency"].item() == pytest.approx(soft, rel=1e-5)
    assert terms["loss"].item() == pytest.approx(hard + 0.1 * soft, rel=1e-5)
    assert terms["region"].item() == 0.5
    assert terms["agreement"].item() == 0.0
    assert method({"labeled": {"image": image, "label": label}})["consistency"].item() == 0, "all of it is people's"


def test_the_averages_teach_and_are_not_taught() -> None:
    method = CoTraining(small(0))
    batch = partly_labeled()
    method(batch)["consistency"].backward()
    for average in (method.average, method.second_average):
        assert all(parameter.grad is None for parameter in average.parameters())
        assert not average.training
    for network in (method.network, method.second):
        assert network.segmentation_decoder.heads[-1].weight.grad.abs().sum() > 0


def partly_labeled(seed: int = 0) -> dict[str, dict]:
    batch = real_batch(seed)
    return {"labeled": {**batch["labeled"], "annotated": [[1], [2]]}}


def test_a_step_moves_both_networks_and_then_their_averages() -> None:
    method = CoTraining(small(0), decay=0.5)
    parts = (method.network, method.second, method.average.module, method.second_average.module)
    start = [copy.deepcopy(part.state_dict()) for part in parts]
    head = "segmentation_decoder.heads.0.weight"
    assert not torch.equal(start[0][head], start[1][head]), "they begin apart"
    for average, network in ((2, 0), (3, 1)):
        assert torch.equal(start[average][head], start[network][head]), "each is its own network's"
    train(method, torch.optim.SGD(method.trainable_parameters(), lr=0.1), [0])
    for part, before in zip(parts, start, strict=True):
        assert head in moved(part, before)
    assert torch.equal(method.second_average.module.state_dict()[head], method.second.state_dict()[head])


def test_either_average_is_deployed() -> None:
    first, second = (CoTraining(small(0), deploy=which) for which in ("first", "second"))
    assert first.deployed is first.average.module
    assert second.deployed is second.second_average.module
    with pytest.raises(BadInput, match="'third'"):
        CoTraining(small(0), deploy="third")
    with pytest.raises(BadInput, match="dilation"):
        CoTraining(small(0), dilation=-1)


def test_state_read_back_continues_the_run() -> None:
    check_resuming(lambda seed: CoTraining(small(seed, dropout=0.2)))


def test_mixed_precision() -> None:
    check_mixed_precision(CoTraining(small(0)))
