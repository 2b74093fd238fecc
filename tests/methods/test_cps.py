from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_networks import Pointwise, check_mixed_precision, check_resuming, moved, real_batch, small, train, voxels

from common.losses import SegmentationLoss
from common.methods import CrossPseudoSupervision
from common.networks.vnet import VNet


def pair(first: float, second: float, **settings) -> CrossPseudoSupervision:
    method = CrossPseudoSupervision(Pointwise(first), **settings)
    method.second.become(second)
    return method


def crops(labeled: list[float], *unlabeled: list[float]) -> dict:
    image = voxels(*labeled)
    return {
        "labeled": {"image": image, "label": torch.zeros_like(image).long()},
        "unlabeled": {"image": torch.cat([voxels(*values) for values in unlabeled])},
    }


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


@pytest.mark.parametrize(("step", "ramp"), [(0, math.exp(-5)), (5, math.exp(-1.25)), (10, 1.0)])
def test_loss_by_hand_and_its_ramp(step, ramp):
    """Slopes 1 and -2: each finds the contrary of the other. Cross-entropies are softplus(|slope * voxel|), and the
    labelled crop counts as much as the three unlabelled ones together."""
    method = pair(1.0, -2.0, consistency_weight=100.0)
    method.progress(step, 10)
    terms = method(crops([1.0, -3.0], [2.0, 0.5], [-1.0, 4.0], [3.0, -0.1]))
    labelled = [1.0, 3.0]
    unlabelled = [2.0, 0.5, 1.0, 4.0, 3.0, 0.1]
    expected = sum(
        sum(softplus(slope * value) for value in values) / len(values)
        for values in (labelled, unlabelled)
        for slope in (1, 2)
    )
    assert terms["consistency"].item() == pytest.approx(expected, rel=1e-5)
    assert terms["agreement"].item() == 0.0
    added = terms["loss"].item() - terms["segmentation"].item()
    assert added == pytest.approx(100 * ramp * expected, rel=1e-5)


def test_networks_that_agree():
    method = pair(1.0, 2.0)
    terms = method(crops([1.0, -3.0], [2.0, -2.0]))
    sure = sum(softplus(-slope * value) / 2 for slope in (1, 2) for value in (1, 3, 2, 2))
    assert terms["consistency"].item() == pytest.approx(sure, rel=1e-5)
    assert terms["agreement"].item() == 1.0


def test_both_learn_the_labels_at_every_level():
    method = CrossPseudoSupervision(small(0, (2, 4, 4, 4)))  # three levels, of which the last has no weight
    batch = real_batch()
    image, label = batch["labeled"]["image"], batch["labeled"]["label"]
    alone = [SegmentationLoss()(net.forward_all(image)[1], label) for net in (method.network, method.second)]
    torch.testing.assert_close(method(batch)["segmentation"], sum(alone))


def test_pseudo_labels_give_no_gradient():
    """By hand: (p - y) x of the own prediction, and nothing by way of the other's."""
    method = pair(1.0, -2.0)
    method(crops([1.0], [3.0]))["consistency"].backward()
    # The first says wall (1), the second background (0), in both crops.
    expected = dict.fromkeys((1.0, -2.0), 0.0)
    for slope, label in ((1.0, 0), (-2.0, 1)):
        for value in (1.0, 3.0):
            expected[slope] += (1 / (1 + math.exp(-slope * value)) - label) * value
    assert method.network.slope.grad.item() == pytest.approx(expected[1.0], rel=1e-5)
    assert method.second.slope.grad.item() == pytest.approx(expected[-2.0], rel=1e-5)


def test_the_networks_may_change_places():
    method = CrossPseudoSupervision(small(0))
    terms = method(real_batch())
    method.network, method.second = method.second, method.network
    for name, value in method(real_batch()).items():
        torch.testing.assert_close(value, terms[name], msg=name)


@pytest.mark.parametrize("network", [small(0), VNet(2, 1, 3, [2, 4], [1, 1])], ids=["U-Net", "V-Net"])
def test_they_start_from_different_weights(network):
    torch.manual_seed(1)
    start = copy.deepcopy(network.state_dict())
    method = CrossPseudoSupervision(network)
    assert not moved(network, start)
    weights = {name: value for name, value in method.second.named_parameters() if value.dim() > 2}
    assert weights
    for name, value in weights.items():
        assert not torch.equal(value, start[name]), name
        assert torch.isfinite(value).all()
    torch.manual_seed(1)
    assert not moved(CrossPseudoSupervision(network).second, method.second.state_dict()), "but the seed's"


def test_a_step_trains_both_networks():
    method = CrossPseudoSupervision(small(0))
    start = [copy.deepcopy(network.state_dict()) for network in (method.network, method.second)]
    assert len(method.trainable_parameters()) == 2 * len(list(method.network.parameters()))
    train(method, torch.optim.SGD(method.trainable_parameters(), lr=0.1), [0])
    for network, before in zip((method.network, method.second), start, strict=True):
        assert "segmentation_decoder.heads.0.weight" in moved(network, before)
    assert method.deployed is method.network


def test_state_read_back_continues_the_run():
    check_resuming(lambda seed: CrossPseudoSupervision(small(seed, dropout=0.2), consistency_weight=5.0))


def test_mixed_precision():
    check_mixed_precision(CrossPseudoSupervision(small(0)))
