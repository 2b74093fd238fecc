"""Schedules of the semi-supervised literature: the weight's ramp-up and the moving average's decay.

Both come from Laine & Aila, "Temporal Ensembling for Semi-Supervised Learning", ICLR 2017, and Tarvainen & Valpola,
"Mean teachers are better role models", NeurIPS 2017.
"""

from __future__ import annotations

import math

from ..errors import BadInput

__all__ = ["ema_decay", "sigmoid_ramp_up"]


def sigmoid_ramp_up(step: float, length: float) -> float:
    """``exp(-5 (1 - t)^2)`` with ``t = min(step / length, 1)``: from 0.0067 at step 0 to 1 at ``length`` and after.

    Args:
        step: steps (or epochs, in the unit of ``length``) done, at least 0.
        length: when the ramp ends, at least 0; 0 switches it off, so that the weight is 1 from the start.

    Raises:
        BadInput: when ``step`` or ``length`` is negative or not a number.
    """
    _check_not_negative("step", step)
    _check_not_negative("length", length)
    if length == 0:
        return 1.0
    progress = min(step / length, 1.0)
    return math.exp(-5.0 * (1.0 - progress) ** 2)


def ema_decay(step: float, decay: float) -> float:
    """The decay of an exponential moving average with a warm start, ``min(1 - 1 / (step + 1), decay)``.

    Early on this is the plain average of the weights so far, so that the random start is soon forgotten.

    Args:
        step: updates done before this one, at least 0; at 0 the decay is 0, which copies the weights.
        decay: the decay to reach, between 0 and 1.

    Raises:
        BadInput: when ``step`` is negative or ``decay`` lies outside 0 to 1.
    """
    _check_not_negative("step", step)
    if not 0.0 <= decay <= 1.0:
        raise BadInput(f"decay={decay!r}: expected a number from 0 to 1, such as 0.99.")
    return min(1.0 - 1.0 / (step + 1.0), float(decay))


def _check_not_negative(name: str, value: float) -> None:
    if not value >= 0:  # written so that NaN fails too
        raise BadInput(f"{name}={value!r}: expected a number that is at least 0.")
