from __future__ import annotations

import io
import math

import pytest
import torch

from common.errors import BadInput
from common.networks import DualDecoderNetwork, RegressionNetwork, SegmentationNetwork, hand_over
from common.networks.dual_decoder import _cell_means

SHAPE = {
    "spatial_dims": 3,
    "in_channels": 1,
    "features": [4, 6, 8],
    "kernel_sizes": [[1, 3, 3], 3, 3],
    "strides": [1, [1, 2, 2], 2],
}
FLAT = {
    "spatial_dims": 2,
    "in_channels": 1,
    "features": [4, 6, 8],
    "kernel_sizes": [3, 3, 3],
    "strides": [1, 2, 2],
}
THICKNESS = {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "scale": 3.0}
VOLUME = {"name": "volume", "unit": "mL", "kind": "sum", "scale": 50.0}
TARGETS = [THICKNESS, VOLUME]
PARTS = ("encoder", "segmentation_decoder")


def dual(shape=SHAPE, **options) -> DualDecoderNetwork:
    torch.manual_seed(1)
    options = {
        "targets": TARGETS,
        "attention_stages": [0, 1],
        "attention_window": [[3] * shape["spatial_dims"], None],
    } | options
    network = DualDecoderNetwork(**shape, out_channels=3, **options)
    for name, parameter in network.named_parameters():
        if name.endswith("output.weight"):  # attention starts as the identity, which would hide it
            torch.nn.init.normal_(parameter)
    return network


def image(shape=SHAPE, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(batch, 1, *([4, 8, 8] if shape["spatial_dims"] == 3 else [8, 8]))


@pytest.mark.parametrize("shape", [SHAPE, FLAT])
@pytest.mark.parametrize(("heteroscedastic", "channels"), [(False, 5), (True, 7)])
def test_one_tensor_of_logits_then_regression(shape, heteroscedastic, channels):
    network = dual(shape, heteroscedastic=heteroscedastic)
    x = image(shape)
    assert [name for name, _ in network.named_children()] == ["encoder", "segmentation_decoder", "regression_decoder"]
    features, logits, regression = network.forward_all(x)
    output = network(x)
    assert output.shape == (2, channels, *x.shape[2:])
    assert torch.equal(output, torch.cat([logits[0], regression], 1))
    assert len(features) == 3
    assert len(logits) == 2


def test_segmentation_equals_the_students_bit_for_bit():
    student = SegmentationNetwork(**SHAPE, out_channels=3)
    network = dual()
    hand_over(network, student.state_dict(), PARTS)
    x = image()
    assert torch.equal(network(x)[:, :3], student(x))
    for parameter in (*network.encoder.parameters(), *network.segmentation_decoder.parameters()):
        parameter.requires_grad_(False)
    assert torch.equal(network(x)[:, :3], student(x))


def test_locked_parts_run_without_autograd():
    network = dual()
    x = image()
    assert network.forward_all(x)[0][0].requires_grad

    network.encoder.requires_grad_(False)
    features, logits, _ = network.forward_all(x)
    assert not any(f.requires_grad for f in features)
    assert all(level.requires_grad for level in logits)

    network.segmentation_decoder.requires_grad_(False)
    features, logits, regression = network.forward_all(x)
    assert not any(t.requires_grad for t in (*features, *logits))
    regression.sum().backward()
    assert all(p.grad is not None for p in network.regression_decoder.parameters())
    assert all(p.grad is None for n, p in network.named_parameters() if not n.startswith("regression_decoder"))

    inputs = image().requires_grad_()
    network(inputs)[:, :3].sum().backward()
    assert inputs.grad.any()
    with torch.no_grad():
        assert not network(x).requires_grad


@pytest.mark.parametrize("reaches", [True, False])
def test_whether_the_regression_moves_the_segmentation_decoder(reaches):
    network = dual(segmentation_gradient=reaches)
    network.forward_all(image())[2].square().mean().backward()
    weight = network.segmentation_decoder.stages[0][0].conv.weight
    assert (weight.grad is not None) == reaches
    assert network.encoder.stages[0][0].conv.weight.grad.any()


def test_regression_reads_the_segmentation_through_attention_and_edges():
    x = image()
    network, without, no_prior = dual(), dual(attention_stages=[], attention_window=None), dual(prior=False)
    for other in (without, no_prior):
        own = other.state_dict()
        other.load_state_dict({k: v for k, v in network.state_dict().items() if k in own})
    assert not torch.allclose(network(x)[:, 3:], without(x)[:, 3:])
    assert not torch.allclose(network(x)[:, 3:], no_prior(x)[:, 3:])
    with torch.no_grad():
        for attention in network.regression_decoder.attention:
            attention.gamma.zero_()
        torch.testing.assert_close(network(x), no_prior(x), atol=1e-5, rtol=1e-4)
        before = without(x)[:, 3:]
        for parameter in without.segmentation_decoder.parameters():
            parameter.add_(1)
        assert torch.equal(without(x)[:, 3:], before)
    assert sum(hasattr(a, "gamma") for a in without.regression_decoder.attention) == 0


def test_edge_classes_choose_whose_edges_count():
    x = image()
    assert dual().edge_classes == [1, 2]
    assert not torch.allclose(dual(edge_classes=[1])(x)[:, 3:], dual(edge_classes=[2])(x)[:, 3:])


def test_attention_stage_zero_is_the_highest_resolution():
    attention = dual(attention_stages=[0], attention_window=None).regression_decoder.attention
    assert [hasattr(a, "gamma") for a in attention] == [False, True]


def test_heads_speak_in_the_targets_units():
    plain = [{"name": "a"}, {"name": "b"}]
    scaled = [{"name": "a", "scale": 4.0, "offset": 10.0}, {"name": "b", "kind": "sum", "scale": 50.0}]
    x = image()
    one, other = dual(targets=plain, heteroscedastic=True), dual(targets=scaled, heteroscedastic=True)
    assert "regression_decoder.scale" not in one.state_dict()
    other.load_state_dict(one.state_dict())
    a, b = one.forward_all(x)[2], other.forward_all(x)[2]
    torch.testing.assert_close(b[:, 0], a[:, 0] * 4 + 10)
    torch.testing.assert_close(b[:, 1], a[:, 1] * 50 * 1e-4)
    # a standard deviation scales as the value does
    torch.testing.assert_close(torch.exp(b[:, 2] / 2), torch.exp(a[:, 2] / 2) * 4)
    torch.testing.assert_close(b[:, 3], a[:, 3] + 2 * math.log(50 * 1e-4))
    chosen = dual(targets=[plain[0], {**scaled[1], "head_scale": 0.5}], heteroscedastic=True)
    chosen.load_state_dict(one.state_dict())
    torch.testing.assert_close(chosen.forward_all(x)[2][:, 1], a[:, 1] * 0.5)


def test_regression_network_alone():
    network = RegressionNetwork(**SHAPE, targets=TARGETS, heteroscedastic=True)
    x = image()
    assert {name.split(".")[0] for name in network.state_dict()} == {"encoder", "regression_decoder"}
    assert not any("attention" in name for name in network.state_dict())
    assert network(x).shape == (2, 4, 4, 8, 8)
    assert network.divisor == [2, 4, 4]
    network(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert torch.equal(torch.jit.script(network)(x), network(x))


@pytest.mark.parametrize("shape", [SHAPE, FLAT])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_stages": [], "attention_window": None},
        {"prior": False},
        {"regression_stage": 1, "attention_stages": [1], "attention_window": 2},
    ],
)
def test_script_gives_equal_outputs_also_from_a_file(shape, options):
    network = dual(shape, heteroscedastic=True, segmentation_gradient=False, **options).eval()
    x = image(shape)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(network), file)
    file.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.jit.load(file)(x), network(x))


def test_mixed_precision_ends_in_float32_and_learns():
    network = dual()
    x = image()
    exact = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = network(x)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, exact, atol=0.5, rtol=0.2)
    output.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"targets": []}, "at least one target"),
        ({"targets": [THICKNESS, THICKNESS]}, "name of its own"),
        ({"targets": [{"name": "a", "kind": "max"}]}, "kind 'max'"),
        ({"targets": [{"name": "a", "scale": 0}]}, "scale 0"),
        ({"attention_stages": [2], "attention_window": None}, r"0 \(highest resolution\) to 1"),
        ({"attention_window": [[3, 3, 3]]}, "1 entries"),
        ({"edge_classes": [3]}, "0 to 2"),
        ({"edge_kernel": 2}, "odd"),
    ],
)
def test_impossible_configurations_are_explained(options, match):
    with pytest.raises(BadInput, match=match):
        dual(**options)


def test_an_impossible_image_is_explained():
    for network in (dual(), RegressionNetwork(**SHAPE, targets=TARGETS)):
        with pytest.raises(BadInput, match=r"multiple of \[2, 4, 4\]"):
            network(torch.zeros(1, 1, 3, 8, 8))


@pytest.mark.parametrize("shape", [SHAPE, FLAT])
def test_a_narrower_regression_decoder_reads_the_same_features(shape):
    """Half of 4 and 6 channels, one block a stage: up, with the encoder's features beside it, and one convolution."""
    network = dual(shape, regression_width=0.5, regression_convolutions=1)
    decoder, size = network.regression_decoder, {3: 27, 2: 9}[shape["spatial_dims"]]
    assert decoder.features == [3, 2]
    assert [len(stage) for stage in decoder.stages] == [1, 1]
    if shape is FLAT:
        assert decoder.upsampling[0].weight.shape == (8, 3, 2, 2)
        assert decoder.stages[0][0].conv.weight.numel() == (3 + 6) * 3 * size
        assert decoder.stages[1][0].conv.weight.numel() == (2 + 4) * 2 * size
    x = image(shape)
    assert network(x).shape == (2, 5, *x.shape[2:])
    network(x).square().mean().backward()
    assert all(p.grad is not None for p in decoder.parameters())
    # What is handed over from the student is as large as ever.
    whole = dual(shape)
    for part in PARTS:
        assert [p.shape for p in getattr(network, part).parameters()] == [
            p.shape for p in getattr(whole, part).parameters()
        ]


@pytest.mark.parametrize("shape", [SHAPE, FLAT])
def test_a_coarser_regression_decoder_is_interpolated(shape):
    """It ends at stage 1, whose stride is 2 in the plane; inside an area of equal values the value stays."""
    network = dual(shape, regression_stage=1, attention_stages=[1], attention_window=None)
    decoder, axes = network.regression_decoder, shape["spatial_dims"]
    assert decoder.features == [6]
    x = image(shape)
    features = network.encoder(x)
    coarse = decoder(features)[-1]
    assert list(coarse.shape[2:]) == {3: [4, 4, 4], 2: [4, 4]}[axes]
    values = decoder.measure([torch.full_like(coarse, 0.5)])
    assert values.shape == (2, 2, *x.shape[2:])
    assert torch.allclose(values, values[..., :1, :1].expand_as(values))
    heads = decoder.heads[0](coarse) * decoder.scale + decoder.shift
    measured = decoder.measure([coarse])
    pooled = torch.nn.functional.avg_pool2d(measured.flatten(0, -4) if axes == 3 else measured, 2).reshape(heads.shape)
    # Of linear interpolation's four (or two) fine voxels in a coarse one, 9/16 of the mean is that voxel's own value.
    assert torch.corrcoef(torch.stack([pooled[:, 0].flatten(), heads[:, 0].flatten()]))[0, 1] > 0.8
    network(x).square().mean().backward()
    assert all(p.grad is not None for p in decoder.parameters())


DEEP = {**FLAT, "features": [4, 6, 8, 8], "kernel_sizes": [3] * 4, "strides": [1, 2, 2, 2]}


def test_edges_are_found_at_twice_the_resolution_of_the_attention(monkeypatch):
    """A wall that is one fine voxel thick is half of a voxel of half the resolution."""
    seen = []
    monkeypatch.setattr(
        "common.networks.dual_decoder._soft_edges", lambda *given: seen.append(given) or torch.zeros(1, 1, 8, 8)
    )
    network = dual(DEEP, attention_stages=[2], attention_window=None)
    scores = torch.full((1, 3, 16, 16), -20.0)
    scores[:, 0] = 20
    scores[:, :, 3] = torch.tensor([-20.0, -20.0, 20.0])[:, None]
    monkeypatch.setattr(network.segmentation_decoder, "full_resolution", lambda decoded: scores)
    network(torch.randn(1, 1, 16, 16))
    [(probabilities, classes, kernel)] = seen
    assert classes == [1, 2]
    assert kernel == [3, 3]
    assert probabilities.shape == (1, 3, 8, 8)
    expected = torch.zeros(8)
    expected[1] = 0.5
    assert torch.allclose(probabilities[0, 2], expected[:, None].expand(8, 8))


@pytest.mark.parametrize(("shape", "cell"), [((8, 6), [2, 3]), ((8, 6, 4), [4, 1, 2]), ((8, 6, 4), [1, 1, 1])])
def test_means_of_cells_are_average_pooling(shape, cell):
    x = torch.rand(2, 3, *shape)
    pool = torch.nn.functional.avg_pool2d if len(shape) == 2 else torch.nn.functional.avg_pool3d
    assert torch.allclose(_cell_means(x, cell), pool(x, cell))


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize(("stages", "cell"), [([], 1), ([0], 1), ([1, 2], 1), ([2], 2)])
def test_the_voxels_of_edges_are_those_of_the_stage_above_the_finest_attention(first, stages, cell):
    network = dual({**DEEP, "strides": [first, 2, 2, 2]}, attention_stages=stages, attention_window=None)
    assert network.edge_cell == [cell, cell]
    x = torch.randn(1, 1, 32, 32)
    assert network(x).shape == (1, 5, 32, 32)
    assert torch.equal(torch.jit.script(network)(x), network(x))


def test_attention_above_a_coarser_decoder_is_explained():
    with pytest.raises(BadInput, match=r"attention_stages: found \[0, 1\].*1 \(highest resolution\) to 1"):
        dual(regression_stage=1)
    with pytest.raises(BadInput, match=r"last stage of a decoder: found 2, expected 0 .* to 1"):
        dual(regression_stage=2, attention_stages=[])


@pytest.mark.parametrize("width", [0.0, -1.0, 1.5])
def test_impossible_widths_are_explained(width):
    with pytest.raises(BadInput, match=r"width.*above 0"):
        dual(regression_width=width)


def test_a_decoder_without_convolutions_is_explained():
    with pytest.raises(BadInput, match="convolutions of a decoder's stage: found 0"):
        dual(regression_convolutions=0)
