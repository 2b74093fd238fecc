from __future__ import annotations

import math

import pytest
import torch

from common.errors import BadInput
from common.losses import FeatureAlignment


def at_angle(degrees: float, length: float = 1.0) -> torch.Tensor:
    angle = math.radians(degrees)
    return (length * torch.tensor([math.cos(angle), math.sin(angle)])).reshape(1, 2, 1, 1)


@pytest.mark.parametrize("length", [1.0, 30.0])
def test_both_kinds_by_hand(length: float) -> None:
    student, teacher = [at_angle(60, length)], [at_angle(0)]
    assert FeatureAlignment([0], "mse")(student, teacher).item() == pytest.approx(2 - 2 * 0.5, abs=1e-6)
    assert FeatureAlignment([0], "cosine")(student, teacher).item() == pytest.approx(0.5, abs=1e-6)


def test_mean_over_voxels_then_over_the_chosen_stages() -> None:
    first = torch.cat([at_angle(0), at_angle(90)], dim=3)
    teacher_first = torch.cat([at_angle(0), at_angle(0)], dim=3)
    student = [first, at_angle(180), at_angle(90)]
    teacher = [teacher_first, at_angle(0), at_angle(0)]
    # Stage 0: cosines 1 and 0, mean 0.5. Stage 2: 1. Stage 1 is not chosen.
    assert FeatureAlignment([0, 2], "cosine")(student, teacher).item() == pytest.approx(0.75, abs=1e-6)
    assert FeatureAlignment([0, -1], "cosine")(student, teacher).item() == pytest.approx(0.75, abs=1e-6)


def test_the_teacher_is_constant() -> None:
    student = torch.randn(2, 4, 3, 3, 3, requires_grad=True)
    teacher = torch.randn(2, 4, 3, 3, 3, requires_grad=True)
    FeatureAlignment([0])([student], [teacher]).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_projection_learns_where_widths_differ(spatial_dims: int) -> None:
    torch.manual_seed(0)
    alignment = FeatureAlignment([0, 1], "mse", [4, 2], [4, 3], spatial_dims)
    assert [tuple(p.shape) for p in alignment.parameters()] == [(3, 2, *[1] * spatial_dims)]
    size = [5] * spatial_dims
    student = [torch.randn(2, 4, *size), torch.randn(2, 2, *size)]
    weight = torch.randn(3, 2)
    teacher = [student[0], torch.einsum("tc,bc...->bt...", weight, student[1])]
    optimizer = torch.optim.Adam(alignment.parameters(), lr=0.05)
    first = alignment(student, teacher).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = alignment(student, teacher)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 * first


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_empty_features_do_not_blow_the_gradient_up(kind: str) -> None:
    student = torch.zeros(1, 4, 2, 2, requires_grad=True)
    loss = FeatureAlignment([0], kind)([student], [torch.randn(1, 4, 2, 2)])
    loss.backward()
    assert loss.isfinite()
    assert student.grad.abs().max() < 1e4


def test_float32_under_autocast() -> None:
    alignment = FeatureAlignment([0], "mse", [2], [3], 2)
    student, teacher = [torch.randn(1, 2, 4, 4)], [torch.randn(1, 3, 4, 4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = alignment(student, teacher)
    assert loss.dtype == torch.float32
    projected = torch.einsum("tc,bcyx->btyx", alignment.projections["0"].weight[:, :, 0, 0], student[0])
    expected = 2 - 2 * torch.nn.functional.cosine_similarity(projected, teacher[0]).mean()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)


def test_errors_name_the_stage() -> None:
    features = [torch.randn(1, 2, 4, 4)]
    with pytest.raises(BadInput, match="stages has 3"):
        FeatureAlignment([3])(features, features)
    with pytest.raises(BadInput, match="stages has 1"):
        FeatureAlignment([1], "mse", [4], [8])
    with pytest.raises(BadInput, match="2 channels, the teacher 3"):
        FeatureAlignment([0])(features, [torch.randn(1, 3, 4, 4)])
    with pytest.raises(BadInput, match="same batch and grid"):
        FeatureAlignment([0])(features, [torch.randn(1, 2, 8, 8)])
    for arguments in ({"stages": []}, {"stages": [0], "kind": "l1"}, {"stages": [0], "student_channels": [2]}):
        with pytest.raises(BadInput):
            FeatureAlignment(**arguments)
