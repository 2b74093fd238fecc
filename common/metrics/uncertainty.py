"""How uncertain a segmentation is, as one number an image: which one to label next, and which result to doubt."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["disagreement", "entropy", "foreground_entropy"]

SMALLEST = 1e-12


def _probabilities(logits: Tensor) -> Tensor:
    return logits.double().softmax(0)


def _a_voxel_of_structure(total: Tensor, probabilities: Tensor) -> float:
    return float(total / probabilities[1:].sum().clamp_min(SMALLEST))


def entropy(logits: Tensor) -> float:
    """Predictive entropy (nats) a voxel of expected structure.

    The sum over all voxels, divided by the expected number of voxels that are not background: so large structures are
    not uncertain for their size, nor large images for their background, while an image in which hardly anything is
    found is as uncertain as it is unusual.

    Args:
        logits: (K, *spatial), background first.
    """
    probabilities = _probabilities(logits)
    return _a_voxel_of_structure(torch.special.entr(probabilities).sum(), probabilities)


def foreground_entropy(logits: Tensor) -> float:
    """Mean predictive entropy (nats) of the voxels that aren't predicted background; NaN where there are none.

    The field of view has no part in it, as it would if background counted. A layer of voxels at a time, so that no
    second copy of all classes is made.

    Args:
        logits: (K, *spatial), background first.
    """
    total, count = 0.0, 0
    for layer in logits.split(1, dim=1):
        found = layer[:, layer.argmax(0) > 0]
        total += float(torch.special.entr(_probabilities(found)).sum())
        count += found.shape[1]
    return total / count if count else float("nan")


def disagreement(one: Tensor, other: Tensor) -> float:
    """Jensen-Shannon divergence (nats) of two networks a voxel of expected structure.

    What a committee of two disagrees about (Seung, Opper, Sompolinsky. Query by committee. COLT 1992; McCallum, Nigam.
    Employing EM and pool-based active learning for text classification. ICML 1998), divided as :func:`entropy` is.

    Args:
        one: logits (K, *spatial), background first.
        other: logits of the second network, of the same shape.
    """
    first, second = _probabilities(one), _probabilities(other)
    mean = (first + second) / 2
    entropies = (torch.special.entr(p).sum() for p in (mean, first, second))
    together, *alone = entropies
    return _a_voxel_of_structure((together - sum(alone) / 2).clamp_min(0), mean)
