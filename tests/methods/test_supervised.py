from __future__ import annotations

import math

import torch
from torch import nn

from common.losses import SegmentationLoss
from common.methods import Supervised
from common.networks import SegmentationNetwork


class Logits(nn.Module):
    """Gives fixed logits."""

    def __init__(self, *levels: torch.Tensor) -> None:
        super().__init__()
        self.levels = nn.ParameterList(levels)

    def forward_all(self, image):
        return [image], list(self.levels)


def test_loss_by_hand():
    """Two voxels, one of each class, undecided: cross-entropy log 2; Dice of the foreground 2 * 0.5 / (1 + 1)."""
    method = Supervised(Logits(torch.zeros(1, 2, 1, 2)))
    terms = method({"labeled": {"image": torch.zeros(1, 1, 1, 2), "label": torch.tensor([[[[0, 1]]]])}})
    torch.testing.assert_close(terms["loss"].item(), math.log(2) + 0.5, atol=1e-4, rtol=0)
    assert terms["segmentation"] is terms["loss"]


def test_every_level_of_the_network_is_supervised_but_the_lowest_has_no_weight():
    torch.manual_seed(0)
    network = SegmentationNetwork(2, 1, 3, [2, 4, 4, 4], [3] * 4, [1, 2, 2, 2])
    batch = {"labeled": {"image": torch.randn(2, 1, 16, 16), "label": torch.randint(3, (2, 1, 16, 16))}}
    terms = Supervised(network)(batch)
    expected = SegmentationLoss()(network.forward_all(batch["labeled"]["image"])[1], batch["labeled"]["label"])
    torch.testing.assert_close(terms["loss"], expected)
    terms["loss"].backward()
    heads = [head.weight.grad.abs().max().item() for head in network.segmentation_decoder.heads]
    assert heads[0] == 0.0, "low to high resolution: the lowest only stays in the graph"
    assert min(heads[1:]) > 0.0
