"""Where a teacher may be believed: estimators of its certainty, thresholds, and the mask of the voxels kept.

Every estimator is called as ``estimator(predict, image, other)`` and answers with an :class:`Estimate`, so that a
config swaps one for another. Predictive entropy over stochastic passes is Yu et al., "Uncertainty-aware self-ensembling
model for semi-supervised 3D left atrium segmentation", MICCAI 2019 (dropout: Gal & Ghahramani, "Dropout as a Bayesian
approximation", ICML 2016; flips: Wang et al., "Aleatoric uncertainty estimation with test-time augmentation", 2019).

Nothing here needs gradients, and nothing has any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import combinations
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from ..errors import BadInput
from ..networks.reductions import likeliest_class
from .schedules import sigmoid_ramp_up

__all__ = [
    "Disagreement",
    "Estimate",
    "HighestProbability",
    "NormalizedEntropy",
    "PredictiveEntropy",
    "Threshold",
    "UncertaintyEstimator",
    "confidence_mask",
    "kept_fraction",
]

Predict = Callable[[Tensor], Tensor]

PERTURBATIONS = ("dropout", "noise", "flips")
SCHEDULES = ("constant", "linear", "sigmoid")


class Estimate(NamedTuple):
    """What a teacher says and how sure it is.

    Attributes:
        probabilities: (B, K, *spatial), float32, summing to 1 along the classes.
        certainty: (B, 1, *spatial), float32, between 0 and 1, 1 being certain.
    """

    probabilities: Tensor
    certainty: Tensor


class UncertaintyEstimator(Protocol):
    """The interface of the estimators."""

    def __call__(self, predict: Predict, image: Tensor, other: Predict | None = None) -> Estimate:
        """Estimate the teacher's probabilities and certainty.

        Args:
            predict: the teacher, from an image (B, C, *spatial) to logits (B, K, *spatial).
            image: (B, C, *spatial).
            other: a second network of the same kind, for the estimators that compare.
        """
        ...


def _softmax(logits: Tensor) -> Tensor:
    if logits.shape[1] < 2:
        raise BadInput(f"The network gives {logits.shape[1]} class; certainty needs at least 2, background included.")
    return logits.float().softmax(dim=1)


def _one_minus_entropy(probabilities: Tensor) -> Tensor:
    entropy = torch.special.entr(probabilities).sum(dim=1, keepdim=True)
    return (1.0 - entropy / math.log(probabilities.shape[1])).clamp(0.0, 1.0)


class HighestProbability:
    """Certainty is the probability of the most probable class; it lies between 1/K and 1."""

    @torch.no_grad()
    def __call__(self, predict: Predict, image: Tensor, other: Predict | None = None) -> Estimate:
        """See :class:`UncertaintyEstimator`; ``other`` is not used."""
        probabilities = _softmax(predict(image))
        return Estimate(probabilities, probabilities.amax(dim=1, keepdim=True))


class NormalizedEntropy:
    """Certainty is ``1 - H / log K``, with ``H = -sum p log p``: 0 for a uniform distribution, 1 for a one-hot one."""

    @torch.no_grad()
    def __call__(self, predict: Predict, image: Tensor, other: Predict | None = None) -> Estimate:
        """See :class:`UncertaintyEstimator`; ``other`` is not used."""
        probabilities = _softmax(predict(image))
        return Estimate(probabilities, _one_minus_entropy(probabilities))


class PredictiveEntropy:
    """Certainty is ``1 - H / log K`` of the *mean* of the softmax over several perturbed passes.

    The mean is also the estimate's ``probabilities``. The perturbations use PyTorch's global random state.

    Args:
        passes: the number of passes. With flips alone there are 2^dimensions different ones at most, and no more are
            made.
        perturb: ``"dropout"`` (the dropout layers alone are active during the passes), ``"noise"`` (Gaussian, clipped
            to two standard deviations) or ``"flips"`` (of the spatial axes, undone before averaging); or several of
            them, as UA-MT's ``["dropout", "noise"]``.
        noise_std: the noise's standard deviation, in the image's intensities.

    Raises:
        BadInput: when an argument is out of range; on the call, when dropout is asked for and ``predict`` is neither a
            ``torch.nn.Module`` nor has one as its attribute ``module``, or that has no dropout layer.
    """

    def __init__(self, passes: int = 8, perturb: str | Sequence[str] = "dropout", noise_std: float = 0.1) -> None:
        self.perturb = (perturb,) if isinstance(perturb, str) else tuple(perturb)
        unknown = [name for name in self.perturb if name not in PERTURBATIONS]
        if unknown or not self.perturb:
            raise BadInput(f"perturb={perturb!r}: expected one or more of {', '.join(PERTURBATIONS)}.")
        if passes < 1:
            raise BadInput(f"passes={passes!r}: expected at least 1.")
        if not noise_std >= 0:
            raise BadInput(f"noise_std={noise_std!r}: expected a number that is at least 0.")
        self.passes = passes
        self.noise_std = noise_std

    @torch.no_grad()
    def __call__(self, predict: Predict, image: Tensor, other: Predict | None = None) -> Estimate:
        """See :class:`UncertaintyEstimator`; ``other`` is not used."""
        flips: list[tuple[int, ...]] = [()]
        passes = self.passes
        if "flips" in self.perturb:
            axes = range(2, image.ndim)
            flips = [chosen for count in range(len(axes) + 1) for chosen in combinations(axes, count)]
            if self.perturb == ("flips",):
                passes = min(passes, len(flips))
        dropout = _active_dropout(predict) if "dropout" in self.perturb else nullcontext()
        with dropout:
            total = self._pass(predict, image, flips[0])
            for number in range(1, passes):
                total += self._pass(predict, image, flips[number % len(flips)])
        probabilities = total / passes
        return Estimate(probabilities, _one_minus_entropy(probabilities))

    def _pass(self, predict: Predict, image: Tensor, flip: tuple[int, ...]) -> Tensor:
        if "noise" in self.perturb:
            limit = 2.0 * self.noise_std
            image = image + (torch.randn_like(image) * self.noise_std).clamp(-limit, limit)
        probabilities = _softmax(predict(image.flip(flip) if flip else image))
        return probabilities.flip(flip) if flip else probabilities


@contextmanager
def _active_dropout(predict: Predict) -> Iterator[None]:
    """Dropout layers in training mode, every other layer as it was; the modes are restored afterwards."""
    module = predict if isinstance(predict, nn.Module) else getattr(predict, "module", None)
    if not isinstance(module, nn.Module):
        raise BadInput(
            "perturb='dropout' needs the network itself: hand over a torch.nn.Module, or a callable that has it as its "
            "attribute `module`."
        )
    layers = [layer for layer in module.modules() if isinstance(layer, _DropoutNd)]
    if not any(layer.p > 0 for layer in layers):
        raise BadInput(
            "perturb='dropout': the network has no dropout layer with a probability above 0, so all passes would be "
            "alike. Build it with dropout, or use perturb='noise' or 'flips'."
        )
    modes = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.train()
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.train(mode)


class Disagreement:
    """Certainty is one minus the total variation distance of two networks, ``1 - 0.5 sum |p - q|``.

    The probabilities are those of ``predict`` (the teacher); ``other`` is, as a rule, the student's moving average.

    Raises:
        BadInput: on the call, when there is no ``other``.
    """

    @torch.no_grad()
    def __call__(self, predict: Predict, image: Tensor, other: Predict | None = None) -> Estimate:
        """See :class:`UncertaintyEstimator`; ``other`` is required."""
        if other is None:
            raise BadInput("Disagreement compares two networks and got one: switch the student's moving average on.")
        probabilities = _softmax(predict(image))
        distance = 0.5 * (probabilities - _softmax(other(image))).abs().sum(dim=1, keepdim=True)
        return Estimate(probabilities, (1.0 - distance).clamp(0.0, 1.0))


class Threshold:
    """The certainty that a voxel needs, a class, over the course of training.

    With ``schedule="sigmoid"`` the value is ``start + (end - start) R`` with the ramp R of :func:`sigmoid_ramp_up`. So
    UA-MT's ``entropy < (0.75 + 0.25 R) log K`` is :class:`PredictiveEntropy` with ``Threshold(0.25, 0.0, "sigmoid")``.

    Args:
        start: the threshold at the start, between 0 and 1.
        end: the threshold at the end; required by, and only meant for, a schedule other than constant.
        schedule: ``"constant"``, ``"linear"`` or ``"sigmoid"``.
        per_class: own thresholds for some class ids, because rare classes are seldom certain: a number, constant over
            training, or a pair (start, end), which follows the schedule. Ids may be text, as JSON has them.

    Raises:
        BadInput: when the schedule is unknown, ``end`` does not fit it, or a threshold lies outside 0 to 1.
    """

    def __init__(
        self,
        start: float,
        end: float | None = None,
        schedule: str = "constant",
        per_class: Mapping[int | str, float | Sequence[float]] | None = None,
    ) -> None:
        if schedule not in SCHEDULES:
            raise BadInput(f"schedule={schedule!r}: expected one of {', '.join(SCHEDULES)}.")
        if (end is None) != (schedule == "constant"):
            raise BadInput(
                f"Threshold with schedule={schedule!r} and end={end!r}: a constant one has no end, the others need one."
            )
        self.schedule = schedule
        self.start, self.end = _threshold_pair("start, end", start if end is None else (start, end))
        per_class = per_class or {}
        if not all(str(label).isdecimal() for label in per_class):
            raise BadInput(f"per_class has the keys {list(per_class)}; expected class ids, such as 1 or '1'.")
        self.per_class = {
            int(label): _threshold_pair(f"per_class[{label!r}]", value) for label, value in per_class.items()
        }
        if schedule == "constant" and any(first != last for first, last in self.per_class.values()):
            raise BadInput("per_class has a pair (start, end) but schedule='constant'; use 'linear' or 'sigmoid'.")

    def __call__(self, progress: float, num_classes: int) -> Tensor:
        """The thresholds, (K,) and float32.

        Args:
            progress: how far training is, from 0 to 1; beyond that it counts as 0 or 1.
            num_classes: K, background included.

        Raises:
            BadInput: when ``per_class`` names a class that there is not.
        """
        foreign = [label for label in self.per_class if not 0 <= label < num_classes]
        if foreign:
            raise BadInput(f"per_class names the classes {foreign}; expected ids from 0 to {num_classes - 1}.")
        progress = min(max(progress, 0.0), 1.0)
        ramp = sigmoid_ramp_up(progress, 1.0) if self.schedule == "sigmoid" else progress
        pairs = [self.per_class.get(label, (self.start, self.end)) for label in range(num_classes)]
        return torch.tensor([first + (last - first) * ramp for first, last in pairs], dtype=torch.float32)


def _threshold_pair(name: str, value: float | Sequence[float]) -> tuple[float, float]:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(0.0 <= number <= 1.0 for number in pair):
        raise BadInput(f"Threshold {name}: {value!r} found; expected a number from 0 to 1, or a pair of them.")
    return float(pair[0]), float(pair[1])


@torch.no_grad()
def confidence_mask(estimate: Estimate, thresholds: Tensor) -> Tensor:
    """Which voxels are certain enough: those whose certainty reaches the threshold of their most probable class.

    Args:
        estimate: probabilities (B, K, *spatial) and certainty (B, 1, *spatial).
        thresholds: (K,), as :class:`Threshold` gives them.

    Returns:
        (B, 1, *spatial), bool. A voxel whose certainty is NaN is not kept.

    Raises:
        BadInput: when the number of thresholds is not K.
    """
    num_classes = estimate.probabilities.shape[1]
    if thresholds.shape != (num_classes,):
        raise BadInput(
            f"Thresholds of shape {tuple(thresholds.shape)} for {num_classes} classes; expected one a class."
        )
    pseudo_label = likeliest_class(estimate.probabilities)
    return estimate.certainty >= thresholds.to(estimate.certainty)[pseudo_label]


@torch.no_grad()
def kept_fraction(mask: Tensor, probabilities: Tensor) -> Tensor:
    """The fraction of the voxels of each pseudo-class that the mask keeps.

    Args:
        mask: (B, 1, *spatial), bool.
        probabilities: (B, K, *spatial).

    Returns:
        (K,), float32; NaN for a class that no voxel has as its most probable one.
    """
    num_classes = probabilities.shape[1]
    pseudo_label = likeliest_class(probabilities)
    # One count for both: class k not kept at 2k, kept at 2k + 1.
    counts = torch.bincount((2 * pseudo_label + mask.long()).flatten(), minlength=2 * num_classes)
    left_out, kept = counts.view(num_classes, 2).float().unbind(dim=1)
    return kept / (left_out + kept)
