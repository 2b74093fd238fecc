"""The scores by which images are ordered, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from common.metrics import uncertainty


def logits(*probabilities: float) -> torch.Tensor:
    """Two classes; the probability of the structure at each of some voxels."""
    structure = torch.tensor(probabilities, dtype=torch.float64).reshape(1, -1, 1, 1)
    return torch.cat([1 - structure, structure]).log()


def binary_entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_entropy_a_voxel_of_structure() -> None:
    expected = (binary_entropy(0.5) + binary_entropy(0.25)) / 0.75
    assert uncertainty.entropy(logits(0.5, 0.25)) == pytest.approx(expected)


def test_entropy_does_not_grow_with_size() -> None:
    assert uncertainty.entropy(logits(*[0.9] * 50)) == pytest.approx(uncertainty.entropy(logits(0.9)))


def test_an_image_in_which_nothing_is_found_is_uncertain() -> None:
    assert uncertainty.entropy(logits(*[1e-6] * 10)) > uncertainty.entropy(logits(0.99, *[0.01] * 9))


def test_networks_that_agree() -> None:
    assert uncertainty.disagreement(logits(0.3, 0.9), logits(0.3, 0.9)) == pytest.approx(0, abs=1e-12)


def test_disagreement_a_voxel_of_structure() -> None:
    # H(0.5) - (H(0.1) + H(0.9)) / 2 over an expected half voxel.
    expected = (math.log(2) - binary_entropy(0.1)) / 0.5
    assert uncertainty.disagreement(logits(0.1), logits(0.9)) == pytest.approx(expected)
    assert uncertainty.disagreement(logits(0.9), logits(0.1)) == pytest.approx(expected)


def test_certain_networks_that_contradict_each_other_differ_by_all_they_can() -> None:
    # A Jensen-Shannon divergence is log 2 at most; here of half a voxel of structure.
    assert uncertainty.disagreement(logits(1e-9), logits(1 - 1e-9)) == pytest.approx(2 * math.log(2), rel=1e-6)


def test_entropy_of_what_is_found_has_nothing_of_the_field_of_view() -> None:
    found = logits(0.25, 0.75, 0.9)  # the first is background, if an uncertain one
    expected = (binary_entropy(0.75) + binary_entropy(0.9)) / 2
    assert uncertainty.foreground_entropy(found) == pytest.approx(expected)
    around = torch.cat([found, logits(*[0.4] * 50)], dim=1)
    assert uncertainty.foreground_entropy(around) == pytest.approx(expected)
    assert math.isnan(uncertainty.foreground_entropy(logits(0.1, 0.2)))
    volume = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    inside = volume[:, volume.argmax(0) > 0].double().softmax(0)
    assert uncertainty.foreground_entropy(volume) == pytest.approx(float(torch.special.entr(inside).sum(0).mean()))
