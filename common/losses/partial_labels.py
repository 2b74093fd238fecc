"""Labels that know only some of the structures.

A case's ``annotated`` ids say which classes its label speaks of. Where such a label is 0, there is the background *or*
a structure it does not know, so only the sum of these probabilities can be asked for: the marginal loss of Shi et al.,
"Marginal loss and exclusion loss for partially supervised multi-organ segmentation", Medical Image Analysis 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import BadInput

__all__ = ["Annotated", "merge_unknown", "unknown_classes"]

#: the ids that each case of a batch labels, None for all; or None where all cases label all
Annotated = Sequence[Sequence[int] | None] | None

# As good as minus infinity, which would make gradients NaN.
_IMPOSSIBLE = -1e30


def unknown_classes(annotated: Annotated, batch_size: int, num_classes: int) -> Tensor | None:
    """Which classes each label says nothing about: (B, K), bool, never the background; None where all are known.

    Raises:
        BadInput: there is not one entry a case, or an id that is no class.
    """
    if annotated is None or all(ids is None for ids in annotated):
        return None
    if len(annotated) != batch_size:
        raise BadInput(
            f"annotated: found {len(annotated)} entries for a batch of {batch_size} cases; expected as many."
        )
    unknown = torch.zeros(batch_size, num_classes, dtype=torch.bool)
    for row, ids in zip(unknown, annotated, strict=True):
        if ids is None:
            continue
        outside = [number for number in ids if not 0 <= int(number) < num_classes]
        if outside:
            raise BadInput(f"annotated: found the ids {outside}, expected classes from 0 to {num_classes - 1}.")
        row[:] = True
        row[[0, *map(int, ids)]] = False
    return unknown


def merge_unknown(logits: Tensor, unknown: Tensor) -> Tensor:
    """Logits whose background has the probability of background and unknown classes together, and these none.

    Args:
        logits: (B, K, *spatial).
        unknown: (B, K), bool, of :func:`unknown_classes`.
    """
    hidden = unknown.to(logits.device).reshape(*unknown.shape, *[1] * (logits.dim() - 2))
    with_background = hidden.clone()
    with_background[:, 0] = True
    background = torch.where(with_background, logits, _IMPOSSIBLE).logsumexp(dim=1, keepdim=True)
    return torch.cat([background, torch.where(hidden, _IMPOSSIBLE, logits)[:, 1:]], dim=1)
