"""Regression where the target exists, with a measure of its uncertainty if wanted.

Heteroscedastic regression: Kendall & Gal, "What uncertainties do we need in Bayesian deep learning for computer
vision?", NeurIPS 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadInput
from .processes import mean_count

__all__ = ["MaskedRegression", "target_mask"]

KINDS = ("smooth_l1", "l1", "mse", "heteroscedastic")


class MaskedRegression(nn.Module):
    """A regression loss, averaged over the voxels that have a target, in all processes that train together.

    No such voxel gives exactly 0, with a graph whose gradients are 0. What lies outside the mask, NaN included, changes
    nothing. Computed in float32. To put targets of different units on one footing, divide prediction and target by the
    target's scale first.

    Args:
        kind: ``"smooth_l1"``, ``"l1"``, ``"mse"``, or ``"heteroscedastic"``: ``0.5 (exp(-s) (x - y)^2 + s)`` with the
            predicted log-variance s.
        beta: where smooth L1 passes from ``0.5 d^2 / beta`` to ``d - 0.5 beta``, in the unit of what it is given.

    Raises:
        BadInput: when the kind is unknown or ``beta`` is not above 0.
    """

    def __init__(self, kind: str = "smooth_l1", beta: float = 1.0) -> None:
        super().__init__()
        if kind not in KINDS:
            raise BadInput(f"kind={kind!r}: expected one of {', '.join(KINDS)}.")
        if not beta > 0:
            raise BadInput(f"beta={beta!r}: expected a number above 0; for plain L1 use kind='l1'.")
        self.kind = kind
        self.beta = beta

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor, log_variance: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            prediction: any shape, as a rule (B, R, *spatial).
            target: the same shape.
            mask: bool, the same shape or one that broadcasts to it, such as (B, 1, *spatial).
            log_variance: the same shape as the prediction, the logarithm of the variance in its unit squared; required
                by, and only used for, ``"heteroscedastic"``.

        Raises:
            BadInput: when the shapes differ, or the log-variance is missing.
        """
        if prediction.shape != target.shape:
            raise BadInput(
                f"The prediction has shape {tuple(prediction.shape)}, the target {tuple(target.shape)}; "
                "expected the same."
            )
        mask = mask.bool().expand_as(target)
        # Replaced before any arithmetic: a weight of 0 does not silence a NaN or an infinity.
        prediction = torch.where(mask, prediction.float(), 0.0)
        target = torch.where(mask, target.detach().float(), 0.0)
        if self.kind == "smooth_l1":
            loss = F.smooth_l1_loss(prediction, target, reduction="none", beta=self.beta)
        elif self.kind == "l1":
            loss = F.l1_loss(prediction, target, reduction="none")
        elif self.kind == "mse":
            loss = F.mse_loss(prediction, target, reduction="none")
        else:
            if log_variance is None or log_variance.shape != prediction.shape:
                found = "nothing" if log_variance is None else f"shape {tuple(log_variance.shape)}"
                raise BadInput(
                    f"kind='heteroscedastic' needs a log-variance a prediction, shape {tuple(prediction.shape)}; found "
                    f"{found}. Build the network with one more channel a target."
                )
            log_variance = torch.where(mask, log_variance.float(), 0.0)
            loss = 0.5 * (torch.exp(-log_variance) * (prediction - target).square() + log_variance)
        # Outside the mask prediction, target and log-variance are all 0, and so is each of the losses.
        return loss.sum() / mean_count(mask)


@torch.no_grad()
def target_mask(
    target: Tensor,
    missing: float | None = 0,
    label: Tensor | None = None,
    structure: int | Sequence[int] | None = None,
) -> Tensor:
    """Where a dense target exists: it is finite, is not the missing value, and lies inside its structure.

    Args:
        target: (B, 1, *spatial) or (B, R, *spatial).
        missing: the value that says "no target here"; None where none does.
        label: (B, 1, *spatial), class ids; required with ``structure``.
        structure: the label id, or ids, inside which the target is meant; None for everywhere.

    Returns:
        bool, of the target's shape.

    Raises:
        BadInput: when there is a structure and no label, or the label lies on another grid.
    """
    mask = torch.isfinite(target)
    if missing is not None:
        mask = mask & (target != missing)
    if structure is None:
        return mask
    if label is None:
        raise BadInput(f"The target is meant inside structure {structure!r}, but the case has no label to find it in.")
    if label.shape[0] != target.shape[0] or label.shape[2:] != target.shape[2:]:
        raise BadInput(
            f"The label has shape {tuple(label.shape)}, the target {tuple(target.shape)}; expected the same grid."
        )
    ids = [structure] if isinstance(structure, int) else list(structure)
    return mask & torch.isin(label, torch.tensor(ids, dtype=label.dtype, device=label.device))
