"""From dense channels to a class a voxel, and to a number a case."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BadInput

__all__ = ["likeliest_class", "reduce_to_case"]


def likeliest_class(scores: Tensor) -> Tensor:
    """The class with the highest score at each voxel; of equal ones the first.

    Args:
        scores: logits or probabilities, (B, K, *spatial).

    Returns:
        Class ids, (B, 1, *spatial).
    """
    # `argmax` says the same and takes ten times as long on a CPU, more than the convolutions before it.
    return scores.max(dim=1, keepdim=True).indices


def reduce_to_case(regression: Tensor, kind: str, probabilities: Tensor | None = None) -> Tensor:
    """One number a case from a dense channel over whole volumes.

    Args:
        regression: (B, 1, *spatial), in the target's unit.
        kind: "sum" for what adds up (a volume): the plain sum over voxels. "mean" for what doesn't (a severity): the
            mean weighted by ``probabilities``.
        probabilities: (B, 1, *spatial) of the structure. None weighs all voxels alike.

    Returns:
        (B,) in float32 or better. A mean over a structure that isn't there is 0.

    Raises:
        BadInput: when ``kind`` is another one.
    """
    if kind not in ("sum", "mean"):
        raise BadInput(f"target kind: found {kind!r}, expected 'sum' or 'mean' for a number a case.")
    values = regression.flatten(1)
    # Half precision can't hold the sum of a volume.
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    if kind == "sum":
        return values.sum(dim=1)
    if probabilities is None:
        return values.mean(dim=1)
    weights = probabilities.flatten(1).to(values.dtype)
    return (weights * values).sum(dim=1) / weights.sum(dim=1).clamp_min(torch.finfo(values.dtype).eps)
