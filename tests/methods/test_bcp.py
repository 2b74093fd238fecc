from __future__ import annotations

import copy

import pytest
import torch
from tiny_networks import Pointwise, check_mixed_precision, check_resuming, moved, real_batch, same, small, train
from torch import Tensor, nn

from common.errors import BadInput
from common.losses import SegmentationLoss
from common.methods import BidirectionalCopyPaste
from common.methods.bcp import box_mask

SIDE = 6


@pytest.mark.parametrize(
    ("size", "sides"), [((9, 6), (6, 4)), ((8, 5), (5, 3)), ((7, 9, 4), (4, 6, 2)), ((112, 112, 80), (74, 74, 53))]
)
def test_the_box_is_two_thirds_of_each_side(size, sides):
    mask = box_mask(size, 2 / 3)
    assert mask.shape == (1, 1, *size)
    assert mask.dtype == torch.bool
    where = (~mask[0, 0]).nonzero()
    assert tuple(where.amax(0) - where.amin(0) + 1) == sides
    assert len(where) == torch.tensor(sides).prod(), "one full box"


def test_the_box_lies_anywhere_inside():
    torch.manual_seed(0)
    starts = {tuple((~box_mask((9, 6), 2 / 3)[0, 0]).nonzero()[0].tolist()) for _ in range(300)}
    assert starts == {(row, column) for row in range(4) for column in range(3)}


class Recorder(nn.Module):
    """In place of the loss: keeps what it is given, and answers with the mean of the labels that count."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor | None]] = []

    def forward(
        self, logits: list[Tensor], label: Tensor, mask: Tensor | None = None, annotated: object = None
    ) -> Tensor:
        self.calls.append((label, mask))
        counted = label if mask is None else label[mask]
        return counted.float().mean() + 0.0 * logits[0].sum()


class Watched(Pointwise):
    def forward_all(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        self.seen = image
        return super().forward_all(image)


def telling_batch() -> dict[str, dict[str, Tensor]]:
    """Crops that say by their values who they are, and labels of ten times that: a and b labelled, a and b not."""
    crops = [torch.full((1, 1, SIDE, SIDE), value) for value in (1.0, 2.0, 3.0, 4.0)]
    labeled, unlabeled = torch.cat(crops[:2]), torch.cat(crops[2:])
    return {"labeled": {"image": labeled, "label": (10 * labeled).long()}, "unlabeled": {"image": unlabeled}}


def telling_method(**settings) -> BidirectionalCopyPaste:
    method = BidirectionalCopyPaste(Watched(1.0), Recorder(), **{"pretraining": 0.0, **settings})
    method.pseudo_label = lambda image: (10 * image).long()
    return method


def test_both_mixtures_and_what_supervises_them():
    method = telling_method()
    terms = method(telling_batch())
    inward, outward = method.network.seen
    box = inward == 3
    assert box.sum() == 16, "the unlabelled crop a lies in the box ..."
    assert torch.equal(inward, torch.where(box, 3.0, 1.0)), "... of the labelled crop a"
    assert torch.equal(outward, torch.where(box, 2.0, 4.0)), (
        "and the labelled b, at the same place, in the unlabelled b"
    )
    calls = method.segmentation_loss.calls
    assert len(calls) == 4, "two mixtures, each with a labelled and an unlabelled region of its own"
    mixtures = [inward, outward, inward, outward]
    for (label, mask), image, ids in zip(calls, mixtures, [(1, 2), (1, 2), (3, 4), (3, 4)], strict=True):
        assert torch.equal(label[0], (10 * image).long()), "every voxel goes with its own label"
        assert torch.equal(mask[0], (image == ids[0]) | (image == ids[1]))
    assert terms["segmentation"].item() == 10 + 20
    assert terms["consistency"].item() == 30 + 40
    assert terms["loss"].item() == 30 + 0.5 * 70


def test_loss_is_formed_of_four_regions():
    """Formed again from the networks, with another weight."""
    network = small(0, (2, 4, 4, 4))
    method = BidirectionalCopyPaste(network, unlabeled_weight=0.25, pretraining=0.0)
    batch = real_batch()
    torch.manual_seed(4)
    terms = method(batch)
    torch.manual_seed(4)
    mask = box_mask((16, 16), 2 / 3)
    image, label = batch["labeled"]["image"], batch["labeled"]["label"]
    unlabeled = batch["unlabeled"]["image"]
    pseudo = method.pseudo_label(unlabeled)
    loss = SegmentationLoss()
    inward = network.forward_all(torch.where(mask, image[:1], unlabeled[:1]))[1]
    outward = network.forward_all(torch.where(mask, unlabeled[1:], image[1:]))[1]
    labelled = loss(inward, label[:1], mask) + loss(outward, label[1:], ~mask)
    others = loss(inward, pseudo[:1], ~mask) + loss(outward, pseudo[1:], mask)
    torch.testing.assert_close(terms["loss"], labelled + 0.25 * others)
    assert BidirectionalCopyPaste(small(0)).unlabeled_weight == 0.5


def test_a_region_is_divided_by_its_own_size():
    """An undecided network has a cross-entropy of ln 2 and, where nothing is to be found, a Dice loss of 1."""
    method = BidirectionalCopyPaste(Pointwise(0.0), pretraining=0.0)
    batch = telling_batch()
    batch["labeled"]["label"] = torch.zeros_like(batch["labeled"]["label"])
    terms = method(batch)
    for name in ("segmentation", "consistency"):
        assert terms[name].item() == pytest.approx(2 * (torch.tensor(2.0).log().item() + 1), rel=1e-4)


class ByValue(nn.Module):
    """Three classes; the most probable one is the voxel's value."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([-self.scale * (image - value).abs() for value in range(3)], dim=1)


def test_pseudo_labels_keep_the_largest_component_of_each_structure():
    image = torch.tensor(
        [
            [[1, 1, 0, 0, 1], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0], [2, 0, 2, 2, 2], [2, 0, 0, 0, 0]],
            [[0, 0, 0, 0, 2], [0, 0, 0, 0, 0], [2, 2, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
        ]
    )
    expected = image.clone()
    expected[0, :2, 4] = 0  # two voxels, where three hang together, one of them by its corner
    expected[0, 3:, 0] = 0
    expected[1, 0, 4] = 0
    method = BidirectionalCopyPaste(ByValue())
    found = method.pseudo_label(image[:, None].float())
    assert type(found) is torch.Tensor
    assert found.dtype == torch.int64
    assert torch.equal(found[:, 0], expected)
    nothing = torch.zeros(2, 1, 4, 4)
    assert torch.equal(method.pseudo_label(nothing), nothing.long())
    method = BidirectionalCopyPaste(ByValue(), largest_component=False)
    assert torch.equal(method.pseudo_label(image[:, None].float())[:, 0], image)


def test_pseudo_labels_are_those_of_the_average():
    method = BidirectionalCopyPaste(Pointwise(1.0))
    method.network.become(-1.0)
    assert method.pseudo_label(torch.ones(1, 1, 2, 2)).all()


def test_pretraining_mixes_labelled_crops_alone():
    method = telling_method(pretraining=0.5)
    batch = telling_batch()
    del batch["unlabeled"]
    for step in (0, 4):
        method.progress(step, 10)
        terms = method(batch)
        (image,) = method.network.seen
        assert (image == 2).sum() == 16
        assert (image == 1).sum() == SIDE * SIDE - 16
        label, mask = method.segmentation_loss.calls.pop()
        assert torch.equal(label[0], (10 * image).long())
        assert mask is None, "every voxel counts"
        assert sorted(terms) == ["loss", "segmentation"]
    method.progress(5, 10)
    assert "consistency" in method(telling_batch())


def test_the_average_starts_from_the_pretrained_network_and_has_its_full_decay():
    """As in the paper, where the pre-training is long before: 0.99 of the past from the first step on."""
    method = BidirectionalCopyPaste(Pointwise(0.0), pretraining=0.5)
    for step in range(200):
        method.progress(step, 400)
        method.network.become(float(step))
        method.after_step()
    assert method.average.module.slope.item() == 199.0
    method.progress(200, 400)
    method.network.become(299.0)
    method.after_step()
    assert method.average.module.slope.item() == pytest.approx(0.99 * 199 + 0.01 * 299)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("stream", ["labeled", "unlabeled"])
def test_an_odd_batch_is_refused(count, stream):
    method = BidirectionalCopyPaste(Pointwise(1.0), pretraining=0.0)
    batch = telling_batch()
    batch[stream] = {key: value[[0] * count] for key, value in batch[stream].items()}
    with pytest.raises(BadInput, match=f"batch_size: found {count}, expected an even number"):
        method(batch)


@pytest.mark.parametrize("pretraining", [0.0, 1.0])
def test_a_step_trains_the_network_alone(pretraining):
    network = small(0)
    method = BidirectionalCopyPaste(network, pretraining=pretraining)
    start = copy.deepcopy(network.state_dict())
    after_step, method.after_step = method.after_step, lambda: None
    train(method, torch.optim.SGD(method.trainable_parameters(), lr=0.1), [0])
    assert {id(p) for p in method.trainable_parameters()} == {id(p) for p in network.parameters()}
    assert moved(network, start)
    assert not moved(method.average.module, start)
    after_step()
    assert same(method.average.module.state_dict(), network.state_dict())
    assert method.deployed is network


@pytest.mark.parametrize("interrupted", [1, 2, 3])
def test_state_read_back_continues_the_run(interrupted):
    """In the pre-training, at its end and after it."""
    check_resuming(lambda seed: BidirectionalCopyPaste(small(seed, dropout=0.2), pretraining=0.5), interrupted)


@pytest.mark.parametrize("pretraining", [0.0, 1.0])
def test_mixed_precision(pretraining):
    check_mixed_precision(BidirectionalCopyPaste(small(0), pretraining=pretraining))
