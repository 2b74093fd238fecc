from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_networks import Pointwise, batch_of, real_batch, small, voxels
from torch import nn

from common.errors import BadInput
from common.losses import (
    ConfidenceMaskedConsistency,
    Disagreement,
    FeatureAlignment,
    SegmentationLoss,
    Threshold,
    ema_decay,
)
from common.methods import Distillation
from common.methods.distillation import random_boxes


def pointwise(student: nn.Module, teacher: nn.Module, **settings) -> Distillation:
    settings = {"mix_probability": 0.0, "ramp_up": 0.0, "consistency": ConfidenceMaskedConsistency("hard"), **settings}
    return Distillation(student, teacher, ["background", "wall"], **settings)


def test_teacher_that_is_certain_everywhere():
    """The student is undecided everywhere, so its cross-entropy with whatever the teacher says is log 2."""
    terms = pointwise(Pointwise(0.0), Pointwise(20.0))(batch_of(voxels(5.0, -5.0, 7.0, -9.0)))
    assert terms["consistency"].item() == pytest.approx(math.log(2))
    assert [terms[f"kept/{name}"].item() for name in ("all", "background", "wall")] == [1.0, 1.0, 1.0]


def test_teacher_that_is_certain_nowhere():
    """Probabilities of 1/2 and 0.88 stay below 0.9: the term is exactly 0, never NaN, and moves nothing."""
    student = Pointwise(0.3, 0.1)
    terms = pointwise(student, Pointwise(2.0))(batch_of(voxels(0.0, 1.0, -1.0, 0.5)))
    assert terms["consistency"].item() == 0.0
    assert terms["loss"].item() == terms["segmentation"].item()
    assert [terms[f"kept/{name}"].item() for name in ("all", "background", "wall")] == [0.0, 0.0, 0.0]
    terms["consistency"].backward()
    assert student.slope.grad.item() == 0.0


def test_only_certain_voxels_count_and_what_is_kept_is_told_a_class():
    """Teacher: wall surely (3), wall with 0.73 (1), background surely (-4, -5). Student: logit of wall is the voxel."""
    terms = pointwise(Pointwise(1.0), Pointwise(1.0), threshold=Threshold(0.9))(batch_of(voxels(3.0, 1.0, -4.0, -5.0)))
    expected = sum(math.log1p(math.exp(-size)) for size in (3, 4, 5)) / 3
    assert terms["consistency"].item() == pytest.approx(expected, rel=1e-5)
    assert terms["kept/all"].item() == 0.75
    assert terms["kept/background"].item() == 1.0
    assert terms["kept/wall"].item() == 0.5


def test_a_class_that_the_teacher_sees_nowhere_has_no_fraction():
    terms = pointwise(Pointwise(1.0), Pointwise(1.0))(batch_of(voxels(-4.0, -5.0)))
    assert terms["kept/background"].item() == 1.0
    assert math.isnan(terms["kept/wall"].item())


def test_teacher_labels_the_weak_view_and_the_student_learns_on_the_strong_one():
    """Weak view: wall for sure. Strong view: the student says background with a logit of -2."""
    terms = pointwise(Pointwise(1.0), Pointwise(9.0))(batch_of(voxels(2.0, 2.0), strong=voxels(-2.0, -2.0)))
    assert terms["consistency"].item() == pytest.approx(math.log1p(math.exp(2.0)), rel=1e-5)


def test_threshold_follows_the_run():
    method = pointwise(Pointwise(0.0), Pointwise(1.0), threshold=Threshold(0.99, 0.8, "linear"))
    kept = []
    for step in (0, 5, 10):  # thresholds 0.99, 0.895 and 0.8; certainties 0.88 and 0.95
        method.progress(step, 10)
        kept.append(method(batch_of(voxels(2.0, 3.0)))["kept/all"].item())
    assert kept == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(("step", "time"), [(0, 0.0), (3, 0.3), (10, 1.0), (15, 1.0)])
def test_loss_is_the_weighted_sum_of_its_parts(step, time):
    """Each part is formed again from the networks, with the ramp exp(-5 (1 - t)^2) over half of the run of 20 steps."""
    network, teacher = small(0), small(1)
    alignment = FeatureAlignment([0, 1], "cosine")
    consistency = ConfidenceMaskedConsistency("soft", temperature=2.0)
    method = Distillation(
        network,
        teacher,
        ["a", "b", "c"],
        threshold=Threshold(0.5),
        consistency=consistency,
        consistency_weight=3.0,
        ramp_up=0.5,
        alignment=alignment,
        alignment_weight=0.7,
        mix_probability=0.0,
    ).train()
    method.progress(step, 20)
    batch = real_batch()
    terms = method(batch)

    labeled, weak, strong = batch["labeled"], batch["unlabeled"]["image"], batch["unlabeled"]["strong"]
    with torch.no_grad():
        probabilities = teacher(weak).softmax(1)
        mask = probabilities.amax(1, keepdim=True) >= 0.5
        kept = [mask[probabilities.argmax(1, keepdim=True) == k].float().mean().item() for k in range(3)]
        supervised = SegmentationLoss()(network.forward_all(labeled["image"])[1], labeled["label"])
        features, logits = network.forward_all(strong)
        consistent = consistency(logits[0], probabilities, mask)
        aligned = alignment(features, teacher.encoder(weak))
        ramp = math.exp(-5 * (1 - time) ** 2)
    assert 0 < mask.float().mean() < 1
    for name, value in {"segmentation": supervised, "consistency": consistent, "alignment": aligned}.items():
        torch.testing.assert_close(terms[name].detach(), value, msg=name)
    torch.testing.assert_close(terms["loss"].detach(), supervised + 3 * ramp * consistent + 0.7 * aligned)
    assert [terms[f"kept/{name}"].item() for name in "abc"] == pytest.approx(kept, nan_ok=True)
    assert terms["kept/all"].item() == pytest.approx(mask.float().mean().item())


def test_alignment_without_weight_is_not_formed():
    method = Distillation(small(0), small(1), "abc", alignment=FeatureAlignment([0]), alignment_weight=0.0)
    assert "alignment" not in method(real_batch())


def test_teacher_of_another_width_is_aligned_by_a_trained_projection():
    alignment = FeatureAlignment([1], "mse", student_channels=[2, 4], teacher_channels=[3, 6], spatial_dims=2)
    method = Distillation(small(0), small(1, (3, 6)), "abc", alignment=alignment)
    method(real_batch())["loss"].backward()
    projection = alignment.projections["1"].weight
    assert projection.grad.abs().max() > 0
    assert any(parameter is projection for parameter in method.trainable_parameters())


def test_teacher_has_no_gradient_does_not_move_and_never_trains():
    network, teacher = small(0, dropout=0.5), small(1, dropout=0.5)
    teacher.register_buffer("statistics", torch.zeros(1))
    method = Distillation(network, teacher, "abc", threshold=Threshold(0.0), alignment=FeatureAlignment([0, 1]))
    before = copy.deepcopy(teacher.state_dict())
    student = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD(method.trainable_parameters(), lr=0.1)
    for _ in range(2):
        method.train()
        assert network.training
        assert not any(module.training for module in teacher.modules())
        optimizer.zero_grad()
        method(real_batch())["loss"].backward()
        optimizer.step()
        method.after_step()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    held = {id(parameter) for parameter in method.trainable_parameters()}
    assert held == {id(parameter) for parameter in network.parameters()}
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(
        network.state_dict()["encoder.stages.0.0.conv.weight"], student["encoder.stages.0.0.conv.weight"]
    )


@pytest.mark.parametrize(
    ("labels_from", "labellers"),
    [("teacher", ["wall"] * 4), ("moving_average", ["wall", "wall", "background", "background"])],
)
def test_who_labels(labels_from, labellers):
    """Teacher and moving average are both sure, of opposite classes; the labels pass over after 0.2 of 10 steps."""
    method = pointwise(
        Pointwise(-9.0), Pointwise(9.0), labels_from=labels_from, warm_up=0.2, alignment=FeatureAlignment([0])
    )
    for step, labeller in zip((0, 1, 2, 9), labellers, strict=True):
        method.progress(step, 10)
        terms = method(batch_of(voxels(1.0, 1.0)))
        assert [name for name in ("background", "wall") if terms[f"kept/{name}"].item() == 1.0] == [labeller], step
        assert ("alignment" in terms) == (labeller == "wall"), "alignment to the teacher ends with its labels"


def test_labels_are_those_of_the_average_not_of_the_student():
    student = Pointwise(9.0)
    method = pointwise(student, Pointwise(9.0), labels_from="moving_average", warm_up=0.0)
    with torch.no_grad():
        student.slope.fill_(-9.0)
    terms = method(batch_of(voxels(1.0, 1.0)))
    assert terms["kept/wall"].item() == 1.0
    assert terms["consistency"].item() == pytest.approx(9.0, rel=1e-3)


def test_disagreement_is_measured_between_teacher_and_moving_average():
    agreed = pointwise(Pointwise(9.0), Pointwise(9.0), estimator=Disagreement())(batch_of(voxels(1.0, -1.0)))
    opposed = pointwise(Pointwise(-9.0), Pointwise(9.0), estimator=Disagreement())(batch_of(voxels(1.0, -1.0)))
    assert agreed["kept/all"].item() == 1.0
    assert opposed["kept/all"].item() == 0.0
    with pytest.raises(BadInput, match="moving average"):
        pointwise(Pointwise(9.0), Pointwise(9.0), estimator=Disagreement(), decay=None, deploy="network")(
            batch_of(voxels(1.0))
        )


def test_moving_average_follows_the_student_by_its_decay():
    student = Pointwise(0.0)
    method = pointwise(student, Pointwise(1.0), decay=0.9)
    expected = 0.0
    for update in range(15):
        with torch.no_grad():
            student.slope.fill_(float(update + 1))
        method.after_step()
        decay = ema_decay(update, 0.9)
        expected = decay * expected + (1 - decay) * (update + 1)
    assert method.average.module.slope.item() == pytest.approx(expected, rel=1e-5)


def test_which_network_is_deployed():
    student = Pointwise(1.0)
    assert pointwise(student, Pointwise(1.0), deploy="network").deployed is student
    method = pointwise(student, Pointwise(1.0), deploy="moving_average")
    assert method.deployed is method.average.module
    assert sorted(method.deployed.state_dict()) == sorted(student.state_dict()), "names as in the network"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels_from": "student"}, "labels_from: found 'student'"),
        ({"deploy": "teacher"}, "deploy: found 'teacher'"),
        ({"decay": None}, "deploy is 'moving_average'"),
        ({"decay": None, "deploy": "network", "labels_from": "moving_average"}, "labels_from is 'moving_average'"),
    ],
)
def test_settings_that_contradict_one_another(settings, message):
    with pytest.raises(BadInput, match=message):
        pointwise(Pointwise(1.0), Pointwise(1.0), **settings)


def test_state_holds_student_and_average_but_not_the_teacher():
    names = list(Distillation(small(0), small(1), "abc").state_dict())
    assert not [name for name in names if name.startswith("teacher.")]
    assert {name.split(".")[0] for name in names} == {"network", "average"}


def test_state_read_back_continues_the_run():
    """A second method with other weights, given the first one's state, steps exactly as the first one goes on."""

    def make(seed: int) -> tuple[Distillation, torch.optim.SGD]:
        method = Distillation(small(seed), small(9), "abc", threshold=Threshold(0.4), ramp_up=0.0)
        return method, torch.optim.SGD(method.trainable_parameters(), lr=0.1, momentum=0.9)

    def train(method: Distillation, optimizer: torch.optim.SGD, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            method.train()
            method.progress(step, 4)
            optimizer.zero_grad()
            method(real_batch(step))["loss"].backward()
            optimizer.step()
            method.after_step()

    whole, resumed = make(0), make(5)
    train(*whole, range(2))
    for item, saved in zip(resumed, copy.deepcopy([item.state_dict() for item in whole]), strict=True):
        item.load_state_dict(saved)
    train(*whole, range(2, 4))
    train(*resumed, range(2, 4))
    other = resumed[0].state_dict()
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, other[name]), name


def test_swapped_boxes_take_their_labels_along():
    """Every voxel says by its value what its label is, and a network that reads the value errs nowhere: labels or
    pseudo-labels left behind would not fit."""
    method = pointwise(
        Pointwise(40.0),
        Pointwise(40.0),
        mix_probability=1.0,
        threshold=Threshold(0.0),
        consistency=ConfidenceMaskedConsistency("hard", dice_weight=1.0),
    )
    torch.manual_seed(0)
    values = torch.where(torch.rand(2, 3, 1, 8, 8) < 0.5, -1.0, 1.0)
    batch = {
        "labeled": {"image": values[0], "label": (values[0] > 0).long()},
        "unlabeled": {"image": values[1], "strong": values[1]},
    }
    terms = method(batch)
    assert terms["consistency"].item() == pytest.approx(0.0, abs=1e-5)
    assert terms["segmentation"].item() == pytest.approx(0.0, abs=1e-5)


def test_labelled_and_unlabelled_crops_swap_a_box():
    seen = {}

    class Watched(Pointwise):
        def forward_all(self, image):
            seen["image"] = image
            return super().forward_all(image)

    method = pointwise(Watched(1.0), Pointwise(1.0), mix_probability=1.0, threshold=Threshold(0.9))
    method.segmentation_loss.register_forward_pre_hook(lambda module, inputs: seen.update(supervised=inputs[2]))
    method.consistency.register_forward_pre_hook(lambda module, inputs: seen.update(certain=inputs[2]))
    torch.manual_seed(0)
    # The first unlabelled crop is surely wall, of the second nothing is certain; labelled crops are 0.
    unlabeled = torch.cat([torch.full((1, 1, 8, 8), 9.0), torch.full((1, 1, 8, 8), 0.5)])
    method(batch_of(unlabeled))
    for index, value in enumerate((9.0, 0.5)):
        labeled, other = seen["image"][index], seen["image"][2 + index]
        assert 2 * 2 <= (labeled == value).sum() <= 6 * 6
        assert torch.equal(labeled == value, other == 0), "the box is the same in both"
    assert torch.equal(seen["supervised"], seen["image"] == 0), "labels count where the voxel is a labelled crop's"
    assert torch.equal(seen["certain"], seen["image"] == 9), "pseudo-labels count where they are certain"


@pytest.mark.parametrize(("labeled", "unlabeled"), [(1, 3), (3, 1)])
def test_streams_of_different_batch_sizes(labeled, unlabeled):
    method = pointwise(Pointwise(1.0), Pointwise(9.0), mix_probability=1.0)
    batch = batch_of(torch.ones(3, 1, 8, 8))
    batch["labeled"] = {key: value[:labeled] for key, value in batch["labeled"].items()}
    batch["unlabeled"] = {key: value[:unlabeled] for key, value in batch["unlabeled"].items()}
    assert math.isfinite(method(batch)["loss"].item())


@pytest.mark.parametrize("size", [(8, 8), (8, 12, 4), (1, 5)])
def test_boxes(size):
    torch.manual_seed(0)
    batch = torch.zeros(40, 2, *size)
    assert not random_boxes(batch, 0.0).any()
    masks = random_boxes(batch, 1.0)
    assert masks.shape == (40, 1, *size)
    assert masks.dtype == torch.bool
    for mask in masks[:, 0]:
        where = mask.nonzero()
        sides = where.amax(0) - where.amin(0) + 1
        assert mask.sum() == sides.prod(), "one full box"
        for side, length in zip(sides.tolist(), size, strict=True):
            assert max(1, round(length / 4)) <= side <= max(1, round(length * 3 / 4))
    some = random_boxes(batch, 0.5).flatten(1).any(1).float().mean()
    assert 0.2 < some < 0.8


@pytest.mark.parametrize(("labeled", "unlabeled"), [(2, 2), (3, 1), (1, 3)])
def test_annotated_structures_go_with_the_crops_whose_labels_they_are(labeled, unlabeled):
    method = pointwise(Pointwise(1.0), Pointwise(9.0), mix_probability=1.0)
    seen = []
    method.segmentation_loss.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[3]))
    batch = batch_of(torch.ones(3, 1, 8, 8))
    batch["labeled"] = {key: value[:labeled] for key, value in batch["labeled"].items()}
    batch["unlabeled"] = {key: value[:unlabeled] for key, value in batch["unlabeled"].items()}
    known = [[0, 1], None, [0]][:labeled]
    method({**batch, "labeled": {**batch["labeled"], "annotated": known}})
    assert seen == [known + (known + [None] * 3)[:unlabeled]]
