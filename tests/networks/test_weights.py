from __future__ import annotations

import errno
import os

import pytest
import torch

from common.errors import BadInput
from common.networks import (
    DualDecoderNetwork,
    SegmentationNetwork,
    check_finite,
    hand_over,
    read_weights,
    save_weights,
    state_digest,
)

SHAPE = {"spatial_dims": 2, "in_channels": 1, "features": [4, 8], "kernel_sizes": [3, 3], "strides": [1, 2]}
PARTS = ("encoder", "segmentation_decoder")


def segmentation(classes: int = 3, **change) -> SegmentationNetwork:
    return SegmentationNetwork(**{**SHAPE, **change}, out_channels=classes)


def dual() -> DualDecoderNetwork:
    return DualDecoderNetwork(**SHAPE, out_channels=3, targets=[{"name": "thickness"}], attention_stages=[0])


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_digest_sees_names_dtypes_shapes_and_values_and_nothing_else():
    a, b = torch.arange(6.0).reshape(2, 3), torch.tensor(3)
    digest = state_digest({"a": a, "b": b})
    assert len(digest) == 64
    assert digest == state_digest({"b": b, "a": a.t().contiguous().t()})
    different = [
        {"a": a, "c": b},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a, "b": torch.tensor(4)},
        {"a": a, "b": torch.tensor(3, dtype=torch.int32)},
        {"a": a},
    ]
    assert len({digest, *map(state_digest, different)}) == 6
    assert state_digest({"a": a.bfloat16()}) != state_digest({"a": a.half()})


def test_a_student_from_the_teacher_predicts_exactly_the_same(tmp_path):
    teacher, student = segmentation(), segmentation()
    x = torch.randn(1, 1, 8, 8)
    assert not torch.equal(teacher(x), student(x))
    save_weights(teacher, tmp_path / "models" / "model.pt")
    digest = hand_over(student, tmp_path / "models" / "model.pt")
    assert torch.equal(teacher(x), student(x))
    assert digest == state_digest(teacher.state_dict()) == state_digest(student.state_dict())


def test_only_the_parts_asked_for_are_loaded():
    student, network = segmentation(), dual()
    before = {k: v.clone() for k, v in network.state_dict().items() if k.startswith("regression_decoder.")}
    digest = hand_over(network, student.state_dict(), PARTS)
    assert digest == state_digest(student.state_dict())
    assert same(before, {k: v for k, v in network.state_dict().items() if k in before})
    # and back: what else the file holds is left alone
    other = segmentation()
    hand_over(other, network.state_dict(), PARTS)
    assert same(other.state_dict(), student.state_dict())
    with pytest.raises(BadInput, match="in the weights but not in the network"):
        hand_over(other, network.state_dict())
    with pytest.raises(BadInput, match="'regression_decoder' isn't in the network"):
        hand_over(other, network.state_dict(), ("regression_decoder",))


def test_what_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path):
    network = segmentation(3)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    save_weights(segmentation(5), tmp_path / "model.pt")
    with pytest.raises(BadInput) as caught:
        hand_over(network, tmp_path / "model.pt", source="teacher weights")
    message = str(caught.value)
    assert f"teacher weights {tmp_path / 'model.pt'}" in message
    assert "segmentation_decoder.heads.0.weight: (5, 4, 1, 1) in the weights, (3, 4, 1, 1) in the network" in message
    assert "of another shape (2)" in message
    assert "plan and config" in message

    state = segmentation().state_dict()
    removed = [k for k in state if k.startswith("encoder.")]
    for key in removed:
        del state[key]
    state["encoder.extra"] = torch.zeros(1)
    with pytest.raises(BadInput) as caught:
        hand_over(network, state)
    message = str(caught.value)
    assert f"missing from the weights ({len(removed)})" in message
    assert message.count("encoder.stages.") == 10
    assert f"and {len(removed) - 10} more" in message
    assert "in the weights but not in the network (1):\n  encoder.extra" in message
    assert same(before, network.state_dict())


def test_weights_that_are_not_finite_are_refused(tmp_path):
    network = segmentation()
    save_weights(network, tmp_path / "model.pt")
    old = (tmp_path / "model.pt").read_bytes()
    broken = {k: v.clone() for k, v in network.state_dict().items()}
    broken["encoder.stages.1.0.conv.weight"][0, 0, 0, 0] = float("nan")
    broken["segmentation_decoder.heads.0.bias"][0] = float("inf")
    for call in (
        lambda: save_weights(broken, tmp_path / "model.pt"),
        lambda: hand_over(network, broken),
        lambda: check_finite(broken),
    ):
        with pytest.raises(BadInput, match=r"'encoder\.stages\.1\.0\.conv\.weight'"):
            call()
    assert (tmp_path / "model.pt").read_bytes() == old
    check_finite({"count": torch.tensor(3), "mask": torch.tensor(True)})


def test_reads_both_layouts(tmp_path):
    state = segmentation().state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"model": state, "epoch": 3}, tmp_path / "nested.pt")
    assert same(read_weights(tmp_path / "plain.pt"), state)
    assert same(read_weights(str(tmp_path / "nested.pt")), state)


def test_files_that_are_no_weights_are_explained(tmp_path):
    with pytest.raises(BadInput, match=r"absent\.pt: no such weights file"):
        read_weights(tmp_path / "absent.pt")
    save_weights(segmentation(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    contents = {"cut.pt": whole[: len(whole) // 2], "empty.pt": b"", "text.pt": b"these are no weights"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=rf"{name}: can't be read as weights"):
            read_weights(tmp_path / name)
    for content in ({"optimizer": {"lr": 1}}, [1, 2], {"model": {}}):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(BadInput, match=r"other\.pt: found .* expected"):
            read_weights(tmp_path / "other.pt")
    torch.save(segmentation(), tmp_path / "code.pt")  # a whole network would run code when read
    with pytest.raises(BadInput, match=r"code\.pt: can't be read"):
        read_weights(tmp_path / "code.pt")


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("a", torch.eye(3).to_sparse(), "a tensor of another kind"),
        ("a", torch.eye(3).to(torch.complex64), "a tensor of another kind"),
        ("a", torch.eye(3, device="meta"), "a tensor of another kind"),
        ("a", torch.zeros(1).expand(10_000, 10_000, 1000), "a tensor of 100000000000 numbers that stores 4 bytes"),
        (1, torch.eye(3), "no name"),
    ],
)
def test_tensors_that_no_network_has(tmp_path, name, value, found):
    torch.save({"model": {"b": torch.eye(2), name: value}}, tmp_path / "model.pt")
    with pytest.raises(BadInput, match=rf"model\.pt: '{name}' is {found}"):
        read_weights(tmp_path / "model.pt")


def test_saved_weights_are_plain_cpu_tensors_without_what_lies_behind_views(tmp_path):
    save_weights({"w": torch.zeros(100_000, requires_grad=True)[:2]}, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert list(content) == ["model"]
    assert not content["model"]["w"].requires_grad
    assert (tmp_path / "model.pt").stat().st_size < 10_000


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fails):
    path = tmp_path / "model.pt"
    save_weights(segmentation(), path)
    old = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(BadInput, match=rf"{path}.*No space left on device"):
        save_weights(segmentation(), path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_the_file_gets_ordinary_permissions(tmp_path):
    # a group shares its weights; a temporary file's 0600 must not survive
    (tmp_path / "ordinary").touch()
    save_weights(segmentation(), tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
