from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.losses import MaskedRegression
from common.methods import DualDecoder


class Constant(nn.Module):
    """Says the same at every place: two classes, then one regression channel; learns a factor of the last."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output, self.factor = output, nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([self.output[:, :-1], self.factor * self.output[:, -1:]], dim=1)

    def forward_all(self, image: Tensor) -> None:
        raise AssertionError("a crop is read, which knows no number of its case")


@pytest.mark.parametrize(
    ("target", "num_classes", "expected"),
    [
        ({"kind": "mean", "structure": 1}, 2, 5.0),
        ({"kind": "mean", "structure": [0, 1]}, 2, 4.0),
        ({"kind": "mean"}, 2, 4.0),
        ({"kind": "mean", "structure": 1}, 0, 4.0),
        ({"kind": "sum"}, 2, 8.0),
    ],
)
def test_a_number_a_case_is_what_inference_makes_of_the_channel(
    target: dict[str, Any], num_classes: int, expected: float
) -> None:
    """Values 3 and 5; the structure is sure to lie where there is 5. A sum or a mean over all needs no structure."""
    output = torch.tensor([[[[50.0, 0.0]], [[0.0, 50.0]], [[3.0, 5.0]]]])[:, 2 - num_classes :]
    network = Constant(output)
    method = DualDecoder(
        network, [{"name": "severity", **target}], num_classes, (1, 2), regression_loss=MaskedRegression(kind="l1")
    )
    image = torch.zeros(1, 1, 1, 2)
    truth = torch.tensor([expected - 1.0])
    terms = method({"labeled": {"image": image}, "case": {"image": image, "severity": truth}})
    assert terms["loss"].item() == pytest.approx(1.0, abs=1e-5)
    terms["loss"].backward()
    assert network.factor.grad.item() == pytest.approx(expected, abs=1e-5)
