from __future__ import annotations

import pytest
import torch
from torch import nn

from common.errors import BadInput
from common.methods.moving_average import MovingAverage
from common.methods.supervised import Supervised
from common.networks.vnet import VNet, without_running_statistics

SMALL = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "features": [2, 4, 6], "convolutions": [1, 2, 3]}
FLAT = {**SMALL, "spatial_dims": 2, "in_channels": 3, "out_channels": 4}


def test_it_has_the_literatures_number_of_weights_counted_by_hand():
    def block(before: int, after: int, voxels: int) -> int:
        return before * after * voxels + after + 2 * after  # weights, bias, batch norm's scale and shift

    def blocks(channels: int, count: int) -> int:
        return count * block(channels, channels, 27)

    encoder = block(1, 16, 27) + blocks(32, 2) + blocks(64, 3) + blocks(128, 3) + blocks(256, 3)
    down = sum(block(width, 2 * width, 8) for width in (16, 32, 64, 128))
    up = sum(block(2 * width, width, 8) for width in (16, 32, 64, 128))
    decoder = blocks(128, 3) + blocks(64, 3) + blocks(32, 2) + blocks(16, 1)
    expected = encoder + down + up + decoder + 16 * 2 + 2
    assert expected == 9_448_866  # 9.45 M
    assert sum(p.numel() for p in VNet(3, 1, 2).parameters()) == expected


@pytest.mark.parametrize(("config", "size"), [(SMALL, (8, 12, 8)), (FLAT, (12, 8))])
@pytest.mark.parametrize("training", [True, False])
def test_shapes_and_forward_is_the_only_level_of_all(config, size, training):
    network = VNet(**config, dropout=0.0).train(training)
    assert network.divisor == [4] * config["spatial_dims"]
    x = torch.randn(2, config["in_channels"], *size)
    features, logits = network.forward_all(x)
    assert [tuple(f.shape) for f in features] == [
        (2, width, *(length // 2**stage for length in size)) for stage, width in enumerate(config["features"])
    ]
    assert [tuple(level.shape) for level in logits] == [(2, config["out_channels"], *size)]
    assert torch.equal(network(x), logits[0])


def layers(part: nn.Module) -> list[str]:
    return [type(m).__name__ for m in part.modules() if not list(m.children())]


def test_a_stage_is_convolutions_with_batch_norm_and_relu():
    network = VNet(**SMALL)
    block = ["Conv3d", "BatchNorm3d", "ReLU"]
    assert [layers(stage) for stage in network.encoder.stages] == [block, 3 * block, 4 * block]
    decoder = network.segmentation_decoder
    assert [layers(stage) for stage in decoder.stages] == [2 * block, block]
    assert [layers(up) for up in decoder.upsampling] == 2 * [["ConvTranspose3d", *block[1:]]]
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)]
    assert all(m.bias is not None for m in convolutions)
    sizes = {(type(m).__name__, m.kernel_size[0], m.stride[0], m.padding[0]) for m in convolutions}
    assert sizes == {("Conv3d", 3, 1, 1), ("Conv3d", 2, 2, 0), ("ConvTranspose3d", 2, 2, 0), ("Conv3d", 1, 1, 0)}


def test_skips_are_added():
    """Two stages of 2D by hand, from the network's own layers."""
    network = VNet(2, 1, 2, features=[2, 3], convolutions=[1, 1]).eval()
    first, second = network.encoder.stages
    decoder = network.segmentation_decoder
    x = torch.randn(1, 1, 4, 4)
    high = first(x)
    low = second(high)
    by_hand = decoder.heads[0](decoder.stages[0](decoder.upsampling[0](low) + high))
    torch.testing.assert_close(network(x), by_hand)


def test_dropout_lies_behind_the_lowest_stage_and_before_the_head():
    network = VNet(**SMALL)
    assert [name for name, m in network.named_modules() if isinstance(m, nn.Dropout3d)] == [
        "encoder.dropout",
        "segmentation_decoder.dropout",
    ]
    assert network.encoder.dropout.p == network.segmentation_decoder.dropout.p == 0.5
    seen = []
    for module in (network.segmentation_decoder.upsampling[0], network.segmentation_decoder.heads[0]):
        module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    x = torch.randn(16, 1, 8, 8, 8)
    features, _ = network.forward_all(x)
    lowest, last = seen
    assert torch.equal(lowest, features[-1])
    for tensor in (lowest, last):
        assert 0.3 < (tensor == 0).flatten(2).all(2).float().mean() < 0.7, "whole channels"
    assert not (features[0] == 0).flatten(2).all(2).any(), "a skip is not dropped"
    network.eval()
    assert torch.equal(network(x), network(x))
    assert not any(isinstance(m, nn.Dropout3d) for m in VNet(**SMALL, dropout=0.0).modules())


def test_it_learns_and_its_average_follows_the_norm_statistics():
    torch.manual_seed(0)
    method = Supervised(VNet(**SMALL))
    average = MovingAverage(method.network, 0.5)
    batch = {"labeled": {"image": torch.randn(2, 1, 8, 8, 8), "label": torch.randint(2, (2, 1, 8, 8, 8))}}
    method(batch)["loss"].backward()
    assert all(p.grad is not None for p in method.parameters())
    average.update_parameters(method.network)  # the first copies
    state = average.module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in method.network.state_dict().items())
    assert state["encoder.stages.0.0.adn.N.running_mean"].any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"features": [2, 4]}, "2 and 3 entries"),
        ({"features": [2], "convolutions": [1]}, "at least 2"),
        ({"convolutions": [1, 0, 3]}, "1 or more"),
        ({"spatial_dims": 1}, "2 or 3"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_configurations_are_explained(change, match):
    with pytest.raises(BadInput, match=match):
        VNet(**{**SMALL, **change})


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((1, 1, 6, 8, 8), r"\[6, 8, 8\], expected a multiple of \[4, 4, 4\]"),
        ((1, 2, 8, 8, 8), r"expected \(batch, 1, 3 spatial axes\)"),
        ((1, 1, 8, 8), "3 spatial axes"),
        ((1, 1, 4, 4, 4), "a single voxel"),
    ],
)
def test_impossible_images_are_explained(shape, match):
    with pytest.raises(BadInput, match=match):
        VNet(**SMALL)(torch.zeros(shape))


@pytest.mark.parametrize(("config", "size"), [(SMALL, (8, 8, 8)), (FLAT, (8, 12))])
def test_script_gives_equal_outputs(config, size):
    network = VNet(**config).eval()
    x = torch.randn(1, config["in_channels"], *size)
    assert torch.equal(torch.jit.script(network)(x), network(x))


def test_mixed_precision_ends_in_float32():
    network = VNet(**SMALL, dropout=0.0)
    x = torch.randn(2, 1, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = network.forward_all(x)
    assert features[0].dtype == torch.bfloat16
    assert [level.dtype for level in logits] == [torch.float32]


def test_a_batch_that_overflows_leaves_the_statistics_alone_where_nothing_is_to_be_learnt():
    network = VNet(**SMALL)
    before = {name: value.clone() for name, value in network.state_dict().items() if "running" in name or "num" in name}
    with torch.no_grad(), without_running_statistics(network):
        assert not network(torch.full((2, 1, 8, 8, 8), torch.inf)).isfinite().any()
        one = network(torch.randn(2, 1, 8, 8, 8))
    assert one.isfinite().all(), "normalised by the batch"
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    network(torch.randn(2, 1, 8, 8, 8))
    assert not torch.equal(network.state_dict()[name := next(iter(before))], before[name]), "and learns again after"
    network.eval()
    with without_running_statistics(network):
        assert torch.equal(network(x := torch.randn(1, 1, 8, 8, 8)), network(x))
    assert all(module.track_running_stats for module in network.modules() if isinstance(module, nn.BatchNorm3d))
