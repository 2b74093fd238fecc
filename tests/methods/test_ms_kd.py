"""MS-KD by hand: where each teacher's probabilities go, the regions, and the divergences in them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_networks import real_batch, same, small
from torch import Tensor, nn

from common.errors import BadInput
from common.methods import MultiTeacherDistillation
from common.methods.ms_kd import (
    PlateauLR,
    common_background,
    place_probabilities,
    region_divergence,
    sorted_channel_divergence,
)
from common.networks import SegmentationNetwork


def volume(*rows: list[float]) -> Tensor:
    """One value a voxel and channel: (1, channels, 1, voxels)."""
    return torch.tensor(rows).reshape(1, len(rows), 1, -1)


def mask(*voxels: bool) -> Tensor:
    return torch.tensor(voxels).reshape(1, 1, 1, -1)


def divergence(teacher: list[float], student: list[float]) -> float:
    return sum(t * math.log(t / s) for t, s in zip(teacher, student, strict=True) if t > 0)


class Fixed(nn.Module):
    """Answers with given logits and features, whatever the image."""

    def __init__(self, probabilities: Tensor, features: Tensor) -> None:
        super().__init__()
        self.logits, self.features = nn.Parameter(probabilities.log()), nn.Parameter(features)

    def forward_all(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [image, self.features], [self.logits]


def test_two_probabilities_in_the_students_channels() -> None:
    placed = place_probabilities(volume([0.9, 0.2], [0.1, 0.8]), organ=2, num_classes=4)
    torch.testing.assert_close(placed, volume([0.9, 0.2], [0.0, 0.0], [0.1, 0.8], [0.0, 0.0]))


def test_common_background_is_where_nobody_finds_anything() -> None:
    regions = [mask(True, False, False, True), mask(False, True, False, True)]
    assert common_background(regions).flatten().tolist() == [False, False, True, False]


def test_divergence_in_a_region_is_a_mean_over_all_voxels() -> None:
    """A channel that is none of the teacher's has 0, and 0 log 0 is 0."""
    teacher = volume([0.3, 0.5], [0.7, 0.5], [0.0, 0.0]).requires_grad_()
    student = volume([0.2, 0.3], [0.5, 0.3], [0.3, 0.4])
    by_voxel = [divergence([0.3, 0.7, 0], [0.2, 0.5, 0.3]), divergence([0.5, 0.5, 0], [0.3, 0.3, 0.4])]
    logits = student.log().requires_grad_()
    assert region_divergence(logits, teacher, mask(True, True)).item() == pytest.approx(sum(by_voxel) / 2, rel=1e-5)
    one = region_divergence(logits, teacher, mask(False, True))
    assert one.item() == pytest.approx(by_voxel[1] / 2, rel=1e-5)
    one.backward()
    assert logits.grad[..., 0].abs().max() == 0, "a voxel outside the region teaches nothing"
    expected = (student - teacher.detach())[..., 1] / 2
    torch.testing.assert_close(logits.grad[..., 1], expected, atol=1e-6, rtol=1e-5)
    assert teacher.grad is None


def test_an_empty_region_gives_zero_and_no_gradient() -> None:
    logits = volume([0.2], [0.8]).log().requires_grad_()
    loss = region_divergence(logits, volume([1.0], [0.0]), mask(False))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_channels_are_sorted_at_each_voxel() -> None:
    """Features log(1, 2, 5) and log(3, 1, 4): softmaxes of 5/8, 2/8, 1/8 and 4/8, 3/8, 1/8, whatever their order."""
    teacher = volume([math.log(1), math.log(5)], [math.log(2), math.log(1)], [math.log(5), math.log(2)])
    student = volume([math.log(3), 0.0], [math.log(1), 0.0], [math.log(4), 0.0])
    first = divergence([5 / 8, 2 / 8, 1 / 8], [4 / 8, 3 / 8, 1 / 8])
    second = divergence([5 / 8, 2 / 8, 1 / 8], [1 / 3] * 3)
    loss = sorted_channel_divergence(student, teacher, mask(True, True))
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-5)
    shuffled = teacher[:, [2, 0, 1]]
    assert sorted_channel_divergence(student, shuffled, mask(True, True)).item() == pytest.approx(loss.item())
    assert sorted_channel_divergence(student, student, mask(True, True)).item() == pytest.approx(0, abs=1e-7)


def test_the_region_comes_down_to_the_features() -> None:
    features = [torch.randn(1, 3, 1, 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    fine = mask(True, True, False, False)
    assert torch.equal(
        sorted_channel_divergence(*features, fine), sorted_channel_divergence(*features, mask(True, False))
    )


def test_features_of_another_width() -> None:
    with pytest.raises(BadInput, match="feature_weight"):
        sorted_channel_divergence(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 2, 2), torch.ones(1, 1, 2, 2).bool())


def test_loss_by_hand() -> None:
    """Teacher 1 finds its organ in voxel 0, teacher 2 in voxels 0 and 1; voxel 2 is nobody's."""
    student_probabilities = volume([0.4, 0.4, 0.6], [0.5, 0.1, 0.1], [0.1, 0.5, 0.3])
    features = [volume([a, 0.0, 0.0], [0.0, 1.0, 2.0]) for a in (1.0, 2.0, 3.0)]
    teachers = [
        Fixed(volume([0.2, 0.6, 0.9], [0.8, 0.4, 0.1]), features[1]),
        Fixed(volume([0.3, 0.1, 0.8], [0.7, 0.9, 0.2]), features[2]),
    ]
    method = MultiTeacherDistillation(Fixed(student_probabilities, features[0]), teachers, 2.0, 10.0, [1])
    terms = method({"labeled": {"image": torch.zeros(1, 1, 1, 3)}})
    organs = (
        divergence([0.2, 0.8, 0], [0.4, 0.5, 0.1])
        + divergence([0.3, 0, 0.7], [0.4, 0.5, 0.1])
        + divergence([0.1, 0, 0.9], [0.4, 0.1, 0.5])
    ) / 3
    background = divergence([(0.9 + 0.8) / 2, 0.1 / 2, 0.2 / 2], [0.6, 0.1, 0.3]) / 3

    def softmax(first: float, second: float) -> list[float]:
        exponentials = [math.exp(max(first, second)), math.exp(min(first, second))]
        return [value / sum(exponentials) for value in exponentials]

    feature_loss = sum(
        divergence(softmax(*teacher), softmax(*student)) / 3
        for teacher, student in (((2, 0), (1, 0)), ((3, 0), (1, 0)), ((0, 1), (0, 1)))
    )
    assert terms["organs"].item() == pytest.approx(organs, rel=1e-5)
    assert terms["background"].item() == pytest.approx(background, rel=1e-5)
    assert terms["features"].item() == pytest.approx(feature_loss, rel=1e-5)
    assert terms["loss"].item() == pytest.approx(organs + 2 * background + 10 * feature_loss, rel=1e-5)


def binary(seed: int) -> SegmentationNetwork:
    torch.manual_seed(seed)
    return SegmentationNetwork(2, 1, 2, [2, 4], [3, 3], [1, 2], 1)


def method(seed: int = 0) -> MultiTeacherDistillation:
    return MultiTeacherDistillation(small(seed), [binary(10), binary(11)])


def test_no_label_is_read() -> None:
    batch = real_batch()
    del batch["labeled"]["label"], batch["unlabeled"]
    assert torch.isfinite(method()(batch)["loss"])


def test_only_the_student_learns_and_is_kept() -> None:
    trained = method()
    teachers = copy.deepcopy(trained.teachers.state_dict())
    start = copy.deepcopy(trained.network.state_dict())
    optimizer = torch.optim.Adam(trained.trainable_parameters(), 0.01)
    trained(real_batch())["loss"].backward()
    optimizer.step()
    assert same(trained.teachers.state_dict(), teachers)
    assert not same(trained.network.state_dict(), start)
    assert trained.deployed is trained.network
    assert not any(name.startswith("teachers") for name in trained.state_dict())


def test_one_teacher_a_class() -> None:
    with pytest.raises(BadInput, match="3 classes for 1 teachers"):
        MultiTeacherDistillation(small(0), [binary(0)])(real_batch())


def run(trained: MultiTeacherDistillation, optimizer, scheduler, steps: range) -> list[float]:
    losses = []
    for step in steps:
        trained.train()
        optimizer.zero_grad()
        loss = trained(real_batch(step))["loss"]
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def test_state_read_back_continues_the_run() -> None:
    """With its optimiser and its schedule, stopped in the middle of an interval."""
    parts = []
    for seed in (0, 5):
        trained = method(seed)
        optimizer = torch.optim.Adam(trained.trainable_parameters(), 0.05)
        parts.append((trained, optimizer, PlateauLR(optimizer, trained, interval=2, patience=0)))
    whole, resumed = parts
    run(*whole, range(3))
    for one, other in zip(resumed, whole, strict=True):
        one.load_state_dict(copy.deepcopy(other.state_dict()))
    assert run(*resumed, range(3, 8)) == run(*whole, range(3, 8))
    assert resumed[1].param_groups[0]["lr"] == whole[1].param_groups[0]["lr"]


def test_the_rate_falls_where_the_loss_does_not() -> None:
    class Loss(nn.Module):
        def forward(self, value: float) -> dict[str, Tensor]:
            return {"loss": torch.tensor(value)}

    weight, trained = nn.Parameter(torch.zeros(1)), Loss()
    optimizer = torch.optim.SGD([weight], 1.0)
    scheduler = PlateauLR(optimizer, trained, interval=2, patience=1)
    rates = []
    for value in (4.0, 2.0, 3.0, 1.0, 2.0, 2.0, 1.0, 4.0, 0.0, 0.0):
        trained(value)
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    # Means of pairs: 3, 2, 2, 2.5, 0: the third and the fourth are no better, one more than the patience.
    assert rates == pytest.approx([1.0] * 7 + [0.8] * 3)
    trained.eval()
    trained(100.0)
    assert scheduler.count == 0, "a validation is no step"
