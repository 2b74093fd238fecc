from __future__ import annotations

import pytest
import torch
from torch import nn

from common.errors import BadInput
from common.networks import Decoder, Encoder, SegmentationNetwork

SMALL = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "features": [4, 8],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
}
ANISOTROPIC = {
    "spatial_dims": 3,
    "in_channels": 2,
    "out_channels": 3,
    "features": [4, 6, 8],
    "kernel_sizes": [[1, 3, 3], 3, [3, 3, 3]],
    "strides": [1, [1, 2, 2], 2],
}
FLAT = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 2,
    "features": [4, 6, 8],
    "kernel_sizes": [3, 3, 3],
    "strides": [1, 2, [2, 1]],
}


def test_parameters_are_those_of_nnunets_plain_unet_counted_by_hand():
    # a block: weights + bias + affine norm
    first = 1 * 4 * 27 + 4 + 8
    second = 4 * 4 * 27 + 4 + 8
    down = 4 * 8 * 27 + 8 + 16
    bottom = 8 * 8 * 27 + 8 + 16
    up = 8 * 4 * 2**3 + 4
    merge = 8 * 4 * 27 + 4 + 8
    refine = 4 * 4 * 27 + 4 + 8
    head = 4 * 2 + 2
    expected = first + second + down + bottom + up + merge + refine + head
    assert expected == 4794
    assert sum(p.numel() for p in SegmentationNetwork(**SMALL).parameters()) == expected


def test_a_block_is_convolution_norm_and_leaky_relu():
    block = SegmentationNetwork(**SMALL).encoder.stages[0][0]
    x = torch.randn(1, 1, 4, 4, 4)
    convolved = nn.functional.conv3d(x, block.conv.weight, block.conv.bias, padding=1)
    mean, variance = convolved.mean((2, 3, 4), keepdim=True), convolved.var((2, 3, 4), keepdim=True, unbiased=False)
    normed = (convolved - mean) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(block(x), torch.where(normed > 0, normed, 0.01 * normed), atol=1e-5, rtol=1e-5)
    dropped = SegmentationNetwork(**SMALL, dropout=0.5).encoder.stages[0][0]
    kinds = [type(m).__name__ for m in dropped.modules() if not list(m.children())]
    assert kinds == ["Conv3d", "Dropout3d", "InstanceNorm3d", "LeakyReLU"]


def test_he_initialisation():
    torch.manual_seed(0)
    network = SegmentationNetwork(**{**SMALL, "features": [16, 32]})
    weight = network.encoder.stages[1][1].conv.weight
    assert weight.std().item() == pytest.approx((2 / (1.0001 * 32 * 27)) ** 0.5, rel=0.05)
    assert all(not m.bias.any() for m in network.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d))


@pytest.mark.parametrize(
    ("config", "size", "stages"),
    [
        (SMALL, (4, 6, 4), [(4, 6, 4)]),
        (ANISOTROPIC, (4, 8, 12), [(4, 8, 12), (4, 4, 6)]),
        (FLAT, (8, 4), [(8, 4), (4, 2)]),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_shapes_and_forward_is_the_first_of_all(config, size, stages, training):
    network = SegmentationNetwork(**config).train(training)
    x = torch.randn(2, config["in_channels"], *size)
    features, logits = network.forward_all(x)
    assert [f.shape[1] for f in features] == config["features"]
    assert tuple(features[0].shape[2:]) == size
    assert [tuple(level.shape) for level in logits] == [(2, config["out_channels"], *stage) for stage in stages]
    assert torch.equal(network(x), logits[0])


def test_every_parameter_learns_with_deep_supervision():
    network = SegmentationNetwork(**ANISOTROPIC)
    sum(level.square().sum() for level in network.forward_all(torch.randn(1, 2, 4, 8, 8))[1]).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_a_stride_in_the_first_stage_still_ends_at_full_resolution():
    network = SegmentationNetwork(**{**SMALL, "strides": [[1, 2, 2], 2]})
    assert network.divisor == [2, 4, 4]
    assert network(torch.randn(1, 1, 4, 8, 8)).shape == (1, 2, 4, 8, 8)
    assert torch.equal(torch.jit.script(network)(torch.ones(1, 1, 4, 8, 8)), network(torch.ones(1, 1, 4, 8, 8)))


def test_only_the_last_stage_has_a_head_without_deep_supervision():
    encoder = Encoder(2, 1, [2, 4, 6], [3, 3, 3], [1, 2, 2])
    decoder = Decoder(encoder, 5, deep_supervision=False)
    logits = decoder.logits(decoder(encoder(torch.randn(1, 1, 8, 8))))
    assert [tuple(level.shape) for level in logits] == [(1, 5, 8, 8)]
    assert not any("encoder" in name for name in decoder.state_dict())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"strides": [1, 2, 2]}, "2, 2 and 3 entries"),
        ({"kernel_sizes": 3}, "one entry for each of the 2 stages"),
        ({"kernel_sizes": [3, 4]}, r"kernel_sizes\[1\].*odd"),
        ({"strides": [1, [2, 2]]}, r"strides\[1\]: found \[2, 2\]"),
        ({"spatial_dims": 4}, "2 or 3"),
        ({"features": [4], "kernel_sizes": [3], "strides": [1]}, "at least 2"),
        ({"convolutions_per_stage": 0}, "1 or more"),
    ],
)
def test_impossible_configurations_are_explained(change, match):
    with pytest.raises(BadInput, match=match):
        SegmentationNetwork(**{**SMALL, **change})


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((1, 2, 4, 7, 8), r"\[4, 7, 8\], expected a multiple of \[2, 4, 4\]"),
        ((1, 1, 4, 8, 8), r"expected \(batch, 2, 3 spatial axes\)"),
        ((1, 2, 8, 8), "3 spatial axes"),
        ((1, 2, 2, 4, 4), "a single voxel"),
    ],
)
def test_impossible_images_are_explained(shape, match):
    network = SegmentationNetwork(**ANISOTROPIC)
    assert network.divisor == [2, 4, 4]
    with pytest.raises(BadInput, match=match):
        network(torch.zeros(shape))


@pytest.mark.parametrize(("config", "size"), [(ANISOTROPIC, (4, 8, 8)), (FLAT, (8, 4))])
def test_script_gives_equal_outputs(config, size):
    network = SegmentationNetwork(**config).eval()
    x = torch.randn(1, config["in_channels"], *size)
    assert torch.equal(torch.jit.script(network)(x), network(x))


def test_mixed_precision_ends_in_float32():
    network = SegmentationNetwork(**SMALL)
    x = torch.randn(1, 1, 4, 4, 4)
    exact = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = network.forward_all(x)
    assert features[0].dtype == torch.bfloat16
    assert all(level.dtype == torch.float32 for level in logits)
    assert not torch.equal(logits[0], exact)
    torch.testing.assert_close(logits[0], exact, atol=0.2, rtol=0.1)
