from __future__ import annotations

import math

import pytest
import torch
from monai.data import MetaTensor

from common.errors import BadInput
from common.losses import MaskedRegression, target_mask

KINDS = ("smooth_l1", "l1", "mse", "heteroscedastic")
# Differences 0.5, 3 and, outside the mask, 100.
PREDICTION = torch.tensor([1.5, 5.0, 100.0]).reshape(1, 1, 1, 3)
TARGET = torch.tensor([1.0, 2.0, 0.0]).reshape(1, 1, 1, 3)
MASK = torch.tensor([True, True, False]).reshape(1, 1, 1, 3)


@pytest.mark.parametrize(
    ("kind", "beta", "expected"),
    [
        ("smooth_l1", 1.0, (0.125 + 2.5) / 2),
        ("smooth_l1", 4.0, (0.25 / 8 + 9 / 8) / 2),
        ("l1", 1.0, 1.75),
        ("mse", 1.0, (0.25 + 9) / 2),
    ],
)
def test_by_hand(kind: str, beta: float, expected: float) -> None:
    assert MaskedRegression(kind, beta)(PREDICTION, TARGET, MASK).item() == pytest.approx(expected)


def test_heteroscedastic_by_hand() -> None:
    log_variance = torch.tensor([0.0, math.log(9), 5.0]).reshape(1, 1, 1, 3)
    expected = (0.5 * 0.25 + 0.5 * (9 / 9 + math.log(9))) / 2
    loss = MaskedRegression("heteroscedastic")
    assert loss(PREDICTION, TARGET, MASK, log_variance).item() == pytest.approx(expected)
    with pytest.raises(BadInput, match="log-variance"):
        loss(PREDICTION, TARGET, MASK)


def test_the_best_log_variance_is_that_of_the_residual() -> None:
    log_variance = torch.full((1, 1, 1, 3), math.log(9), requires_grad=True)
    mask = torch.tensor([False, True, False]).reshape(1, 1, 1, 3)
    MaskedRegression("heteroscedastic")(PREDICTION, TARGET, mask, log_variance).backward()
    assert log_variance.grad.abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outside", [float("nan"), float("inf"), -1e38])
def test_nothing_outside_the_mask_matters(kind: str, outside: float) -> None:
    prediction = PREDICTION.masked_fill(~MASK, outside).requires_grad_()
    log_variance = torch.zeros(1, 1, 1, 3).masked_fill(~MASK, outside).requires_grad_()
    loss = MaskedRegression(kind)
    result = loss(prediction, TARGET.masked_fill(~MASK, outside), MASK, log_variance)
    result.backward()
    assert result.item() == loss(PREDICTION, TARGET, MASK, torch.zeros(1, 1, 1, 3)).item()
    assert (prediction.grad[~MASK] == 0).all()
    assert (prediction.grad[MASK] != 0).all()
    if kind == "heteroscedastic":
        assert (log_variance.grad[~MASK] == 0).all()
        assert log_variance.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_empty_mask_is_exactly_zero_with_a_graph(kind: str) -> None:
    prediction = torch.full((2, 1, 3, 3), float("inf"), requires_grad=True)
    target = torch.full((2, 1, 3, 3), float("nan"))
    loss = MaskedRegression(kind)(prediction, target, torch.zeros(2, 1, 3, 3) > 0, torch.zeros(2, 1, 3, 3))
    assert loss.item() == 0.0
    loss.backward()
    assert (prediction.grad == 0).all()


def test_a_broadcast_mask_counts_every_channel() -> None:
    prediction = torch.tensor([2.0, 4.0]).reshape(1, 2, 1, 1)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    assert MaskedRegression("l1")(prediction, torch.zeros(1, 2, 1, 1), mask).item() == pytest.approx(3.0)


def test_half_precision_does_not_overflow() -> None:
    prediction = torch.full((1, 1, 40, 40), 300.0, dtype=torch.float16)
    loss = MaskedRegression("mse")(prediction, torch.zeros(1, 1, 40, 40), torch.ones(1, 1, 40, 40, dtype=torch.bool))
    assert loss.item() == pytest.approx(90000.0)


def test_bad_arguments() -> None:
    for arguments in ({"kind": "huber"}, {"beta": 0.0}):
        with pytest.raises(BadInput):
            MaskedRegression(**arguments)
    with pytest.raises(BadInput, match="expected the same"):
        MaskedRegression()(PREDICTION, TARGET[..., :2], MASK)


def test_target_mask() -> None:
    target = torch.tensor([0.0, 1.0, float("nan"), float("inf"), -1.0, 2.0]).reshape(1, 1, 1, 6)
    label = torch.tensor([2, 2, 2, 2, 1, 0]).reshape(1, 1, 1, 6)

    def found(**arguments) -> list[int]:
        return target_mask(target, **arguments).flatten().int().tolist()

    assert found() == [0, 1, 0, 0, 1, 1]
    assert found(missing=-1) == [1, 1, 0, 0, 0, 1]
    assert found(missing=None) == [1, 1, 0, 0, 1, 1]
    assert found(missing=float("nan")) == [1, 1, 0, 0, 1, 1]
    assert found(label=label) == [0, 1, 0, 0, 1, 1]
    for dtype in (torch.uint8, torch.int64, torch.float32):
        assert found(label=label.to(dtype), structure=2) == [0, 1, 0, 0, 0, 0]
        assert found(label=MetaTensor(label.to(dtype)), structure=[1, 2]) == [0, 1, 0, 0, 1, 0]
    assert target_mask(target).dtype == torch.bool
    with pytest.raises(BadInput, match="no label"):
        target_mask(target, structure=2)
    with pytest.raises(BadInput, match="same grid"):
        target_mask(target, label=label[..., :3], structure=2)
