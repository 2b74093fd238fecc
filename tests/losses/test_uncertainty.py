from __future__ import annotations

import itertools
import math

import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from common.errors import BadInput
from common.losses import (
    Disagreement,
    Estimate,
    HighestProbability,
    NormalizedEntropy,
    PredictiveEntropy,
    Threshold,
    confidence_mask,
    kept_fraction,
)

IMAGE = torch.zeros(1, 1, 1, 3)
# Voxel by voxel: uniform, (0.5, 0.25, 0.25), one-hot.
PROBABILITIES = torch.tensor([[1 / 3, 0.5, 1.0], [1 / 3, 0.25, 0.0], [1 / 3, 0.25, 0.0]]).reshape(1, 3, 1, 3)
ENTROPY = torch.tensor([math.log(3), 1.5 * math.log(2), 0.0])


def known(image: Tensor) -> Tensor:
    return PROBABILITIES.log()


def test_highest_probability() -> None:
    estimate = HighestProbability()(known, IMAGE)
    torch.testing.assert_close(estimate.probabilities, PROBABILITIES)
    torch.testing.assert_close(estimate.certainty.flatten(), torch.tensor([1 / 3, 0.5, 1.0]))


@pytest.mark.parametrize("estimator", [NormalizedEntropy(), PredictiveEntropy(passes=2, perturb="noise")])
def test_entropy_of_a_known_distribution(estimator) -> None:
    estimate = estimator(known, IMAGE)
    torch.testing.assert_close(estimate.certainty.flatten(), 1 - ENTROPY / math.log(3), atol=1e-6, rtol=0)
    assert estimate.certainty.shape == (1, 1, 1, 3)


def test_predictive_entropy_is_of_the_mean_not_the_mean_of_entropies() -> None:
    # Two passes, each sure, of opposite classes: each entropy is 0, the mean's is log 2.
    answers = itertools.cycle([torch.tensor([100.0, 0.0]), torch.tensor([0.0, 100.0])])
    estimate = PredictiveEntropy(passes=2, perturb="noise")(lambda image: next(answers).reshape(1, 2, 1, 1), IMAGE)
    assert estimate.certainty.item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(estimate.probabilities.flatten(), torch.tensor([0.5, 0.5]))


class Network(nn.Module):
    def __init__(self, probability: float = 0.5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.dropout = nn.Dropout(probability)
        self.active: list[tuple[bool, bool]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.active.append((self.norm.training, self.dropout.training))
        return torch.cat([self.dropout(self.norm(image)), torch.zeros_like(image)], dim=1)


def test_dropout_passes_differ_and_modes_are_restored() -> None:
    network = Network().eval()
    image = torch.ones(1, 1, 32, 32)
    torch.manual_seed(0)
    estimate = PredictiveEntropy(passes=6, perturb="dropout")(network, image)
    assert network.active == [(False, True)] * 6
    assert not network.dropout.training
    assert not network.norm.training
    # A voxel's mean depends on how many of 6 passes dropped it: more than two values in all.
    assert len(estimate.probabilities[0, 0].unique()) > 2


def test_dropout_modes_are_restored_after_an_error_and_in_a_mixed_state() -> None:
    network = Network().train()
    network.norm.eval()
    with pytest.raises(RuntimeError):
        PredictiveEntropy(perturb="dropout")(network, torch.ones(1, 5, 4, 4))
    assert network.dropout.training
    assert not network.norm.training


def test_dropout_through_a_callable_with_a_module() -> None:
    class Predict:
        def __init__(self) -> None:
            self.module = Network().eval()

        def __call__(self, image: Tensor) -> Tensor:
            return self.module(image)

    predict = Predict()
    PredictiveEntropy(passes=1)(predict, torch.ones(1, 1, 4, 4))
    assert predict.module.active == [(False, True)]


def test_dropout_without_dropout_is_an_error() -> None:
    with pytest.raises(BadInput, match="module"):
        PredictiveEntropy()(known, IMAGE)
    with pytest.raises(BadInput, match="no dropout layer"):
        PredictiveEntropy()(nn.Conv2d(1, 2, 1), IMAGE)
    with pytest.raises(BadInput, match="no dropout layer"):
        PredictiveEntropy()(Network(0.0), IMAGE)


@pytest.mark.parametrize("size", [(4, 6), (2, 4, 6)])
def test_flips_are_undone(size: tuple[int, ...]) -> None:
    image = torch.randn(2, 1, *size)
    seen: list[Tensor] = []

    def voxelwise(image: Tensor) -> Tensor:
        seen.append(image)
        return torch.cat([image, -image], dim=1)

    estimate = PredictiveEntropy(passes=8, perturb="flips")(voxelwise, image)
    # A network that looks at each voxel alone gives the same after flips as without.
    torch.testing.assert_close(estimate, NormalizedEntropy()(voxelwise, image))
    views = seen[:-1]
    assert len(views) == 2 ** len(size)
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(views, 2))


def test_noise_is_clipped_and_combines_with_dropout() -> None:
    seen: list[Tensor] = []

    class Noticing(Network):
        def forward(self, image: Tensor) -> Tensor:
            seen.append(image)
            return super().forward(image)

    image = torch.zeros(1, 1, 40, 40)
    network = Noticing().eval()
    PredictiveEntropy(passes=3, perturb=["dropout", "noise"], noise_std=0.1)(network, image)
    assert network.active == [(False, True)] * 3
    assert all(view.abs().max().item() == pytest.approx(0.2) for view in seen)
    assert all(0.07 < view.std().item() < 0.1 for view in seen)
    assert not torch.equal(seen[0], seen[1])
    assert image.abs().sum() == 0


def test_disagreement() -> None:
    def other(image: Tensor) -> Tensor:
        return torch.tensor([[1 / 3, 0.25, 0.0], [1 / 3, 0.5, 1.0], [1 / 3, 0.25, 0.0]]).reshape(1, 3, 1, 3).log()

    estimate = Disagreement()(known, IMAGE, other)
    torch.testing.assert_close(estimate.certainty.flatten(), torch.tensor([1.0, 0.75, 0.0]))
    torch.testing.assert_close(estimate.probabilities, PROBABILITIES)
    with pytest.raises(BadInput, match="moving average"):
        Disagreement()(known, IMAGE)


@pytest.mark.parametrize(
    "estimator", [HighestProbability(), NormalizedEntropy(), PredictiveEntropy(2, "flips"), Disagreement()]
)
def test_any_estimator_is_bounded_float32_and_without_graph(estimator) -> None:
    network = nn.Conv3d(1, 5, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        estimate = estimator(network, torch.randn(2, 1, 3, 4, 5) * 100, nn.Conv3d(1, 5, 1))
    assert estimate.probabilities.shape == (2, 5, 3, 4, 5)
    assert estimate.certainty.shape == (2, 1, 3, 4, 5)
    assert estimate.probabilities.dtype == estimate.certainty.dtype == torch.float32
    assert not estimate.probabilities.requires_grad
    assert not estimate.certainty.requires_grad
    assert estimate.certainty.min() >= 0
    assert estimate.certainty.max() <= 1


def test_one_class_and_bad_arguments() -> None:
    with pytest.raises(BadInput, match="at least 2"):
        HighestProbability()(nn.Conv2d(1, 1, 1), IMAGE)
    for arguments in ({"perturb": "luck"}, {"perturb": []}, {"passes": 0}, {"noise_std": -1.0}):
        with pytest.raises(BadInput):
            PredictiveEntropy(**arguments)


def test_threshold_schedules() -> None:
    assert Threshold(0.9)(0.3, 2).tolist() == pytest.approx([0.9, 0.9])
    linear = Threshold(0.5, 0.9, "linear")
    assert [linear(progress, 1).item() for progress in (-1, 0, 0.5, 1, 2)] == pytest.approx([0.5, 0.5, 0.7, 0.9, 0.9])
    sigmoid = Threshold(0.25, 0.0, "sigmoid")
    for progress in (0.0, 0.4, 1.0):
        # UA-MT: entropy below (0.75 + 0.25 R) log K.
        limit = 0.75 + 0.25 * math.exp(-5 * (1 - progress) ** 2)
        assert sigmoid(progress, 1).item() == pytest.approx(1 - limit)


def test_threshold_per_class() -> None:
    threshold = Threshold(0.8, 0.9, "linear", per_class={"1": 0.3, 2: [0.2, 0.6]})
    assert threshold(0.5, 4).tolist() == pytest.approx([0.85, 0.3, 0.4, 0.85])
    with pytest.raises(BadInput, match=r"\[2\]"):
        threshold(0.5, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"start": 1.5},
        {"start": 0.5, "end": 0.9},
        {"start": 0.5, "schedule": "linear"},
        {"start": 0.5, "end": 0.9, "schedule": "cubic"},
        {"start": 0.5, "per_class": {"1": 2.0}},
        {"start": 0.5, "per_class": {"1": [0.1, 0.2]}},
        {"start": 0.5, "per_class": {"wall": 0.1}},
    ],
)
def test_threshold_arguments(arguments: dict) -> None:
    with pytest.raises(BadInput):
        Threshold(**arguments)


@pytest.mark.parametrize("wrap", [Tensor.clone, MetaTensor])
def test_confidence_mask_uses_the_threshold_of_the_voxels_class(wrap) -> None:
    probabilities = torch.tensor([[0.9, 0.9, 0.1, 0.1], [0.1, 0.1, 0.9, 0.9]]).reshape(1, 2, 1, 4)
    certainty = torch.tensor([0.5, 0.8, 0.5, float("nan")]).reshape(1, 1, 1, 4)
    mask = confidence_mask(Estimate(wrap(probabilities), wrap(certainty)), torch.tensor([0.8, 0.4]))
    assert mask.dtype == torch.bool
    assert mask.shape == (1, 1, 1, 4)
    assert mask.flatten().tolist() == [False, True, True, False]
    with pytest.raises(BadInput, match="one a class"):
        confidence_mask(Estimate(probabilities, certainty), torch.tensor([0.8]))


def test_kept_fraction() -> None:
    probabilities = torch.eye(4)[[0, 0, 0, 0, 1, 1]].T.reshape(1, 4, 2, 3)[:, :4]
    mask = torch.tensor([1, 0, 0, 0, 1, 1], dtype=torch.bool).reshape(1, 1, 2, 3)
    fraction = kept_fraction(mask, probabilities)
    assert fraction[:2].tolist() == [0.25, 1.0]
    assert fraction[2:].isnan().all()
