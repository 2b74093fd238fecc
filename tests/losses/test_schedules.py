from __future__ import annotations

import math

import pytest

from common.errors import BadInput
from common.losses import ema_decay, sigmoid_ramp_up


@pytest.mark.parametrize(
    ("step", "length", "expected"),
    [(0, 40, math.exp(-5)), (20, 40, math.exp(-1.25)), (40, 40, 1.0), (90, 40, 1.0), (0, 0, 1.0), (7, 0, 1.0)],
)
def test_ramp_up(step: float, length: float, expected: float) -> None:
    assert sigmoid_ramp_up(step, length) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.0), (1, 0.5), (3, 0.75), (49, 0.98), (99, 0.99), (10**6, 0.99)])
def test_ema_decay_starts_as_a_plain_average(step: int, expected: float) -> None:
    assert ema_decay(step, 0.99) == pytest.approx(expected)


def test_arguments_are_checked() -> None:
    for call in (
        lambda: sigmoid_ramp_up(-1, 10),
        lambda: sigmoid_ramp_up(1, -10),
        lambda: sigmoid_ramp_up(float("nan"), 10),
        lambda: ema_decay(-1, 0.9),
        lambda: ema_decay(1, 1.5),
    ):
        with pytest.raises(BadInput):
            call()
