from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from common.networks import DualDecoderNetwork, RegressionNetwork, SegmentationNetwork, layout
from common.networks.dynamic_convolution import DyBACNetwork
from common.networks.dynamic_head import DynamicHeadNetwork
from common.networks.layout import ChannelsLast, InstanceNorm2d, InstanceNorm3d, channels_side_by_side
from common.networks.vnet import VNet

SHARED = {"spatial_dims": 3, "in_channels": 1, "features": [4, 6, 8]}
STAGES = {"kernel_sizes": [3, 3, 3], "strides": [1, 2, 2]}
TARGETS = [{"name": "thickness", "unit": "mm", "kind": "dense"}]
NETWORKS = {
    "U-Net": (SegmentationNetwork, {**SHARED, **STAGES, "out_channels": 3}),
    "flat U-Net": (SegmentationNetwork, {**SHARED, **STAGES, "spatial_dims": 2, "out_channels": 3}),
    "dual decoder": (
        DualDecoderNetwork,
        {**SHARED, **STAGES, "out_channels": 3, "targets": TARGETS, "attention_stages": [0, 1]},
    ),
    "regression": (RegressionNetwork, {**SHARED, **STAGES, "targets": TARGETS}),
    "DoDNet": (DynamicHeadNetwork, {**SHARED, **STAGES, "out_channels": 3}),
    "DyBAC": (DyBACNetwork, {**SHARED, **STAGES, "out_channels": 3}),
    "V-Net": (VNet, {**SHARED, "out_channels": 2, "convolutions": [1, 1, 1], "dropout": 0.0}),
}


def test_a_copy_of_the_project_keeps_its_norm_to_itself():
    """A packed bundle brings one, which may be another version, and is unloaded after use."""
    specification = importlib.util.spec_from_file_location("scripts_copy_of_layout", layout.__file__)
    assert specification is not None
    assert specification.loader is not None
    copy = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(copy)
    network = SegmentationNetwork(**SHARED, **STAGES, out_channels=2)
    norms = [module for module in network.modules() if "InstanceNorm" in type(module).__name__]
    assert norms
    assert {type(norm) for norm in norms} == {layout.InstanceNorm3d}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("channels", [1, 2])
def test_the_order_in_memory_changes_nothing_but_the_order_of_sums(name, channels):
    torch.manual_seed(0)
    make, settings = NETWORKS[name]
    settings = {**settings, "in_channels": channels}
    side_by_side, default = make(**settings), make(**settings, channels_last=False)
    default.load_state_dict(side_by_side.state_dict())
    x = torch.randn(2, channels, *[8, 12, 8][: settings["spatial_dims"]])
    results = []
    for network in (side_by_side, default):
        output = network(x)
        output.square().mean().backward()
        results.append((output, [parameter.grad for parameter in network.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "DoDNet"])  # whose heads are made from one voxel
def test_every_layer_hands_the_order_on(name):
    """From the image on, of which PyTorch's own conversion leaves a single channel as it is."""
    make, settings = NETWORKS[name]
    for channels_last in (None, False):
        network, kept = make(**settings, channels_last=channels_last).eval(), []
        for part in network.modules():
            if isinstance(part, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                part.register_forward_hook(
                    lambda part, inputs, output, kept=kept: kept.append(inputs[0].stride(1) == 1)
                )
        # In float32 PyTorch takes another kernel where so little is to be done by one thread.
        with torch.autocast("cpu", torch.bfloat16):
            network(torch.randn(2, 1, *[8, 12, 8][: settings["spatial_dims"]]))
        assert len(kept) > 8
        assert kept == [channels_last is None] * len(kept)


@pytest.mark.parametrize("shape", [(2, 1, 4, 6), (2, 3, 4, 6), (2, 1, 4, 6, 5), (2, 3, 4, 6, 5)])
def test_values_stay_where_they_are(shape):
    x = torch.randn(shape)
    moved = channels_side_by_side(x)
    assert moved.stride(1) == 1
    assert torch.equal(moved, x)
    assert torch.equal(channels_side_by_side(x.transpose(2, 3)), x.transpose(2, 3))


@pytest.mark.parametrize(("setting", "cpu", "elsewhere"), [(None, 1, 24), (True, 1, 1), (False, 24, 24)])
def test_by_default_it_is_for_cpus(setting, cpu, elsewhere):
    lay_out = ChannelsLast(setting)
    assert lay_out(torch.zeros(1, 2, 4, 6)).stride(1) == cpu
    assert lay_out(torch.zeros(1, 2, 4, 6, device="meta")).stride(1) == elsewhere


@pytest.mark.parametrize(("norm", "shape"), [(InstanceNorm2d, (3, 4, 5, 6)), (InstanceNorm3d, (3, 4, 5, 6, 7))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instance_norm_is_pytorchs_in_either_order(norm, shape, dtype):
    torch.manual_seed(0)
    ours = norm(4, affine=True)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs = norm.__mro__[1](4, affine=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape).to(dtype)
    expected = theirs(x)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.02}
    assert torch.equal(ours(x), expected)
    found = ours(channels_side_by_side(x))
    torch.testing.assert_close(found, expected, **tolerance)
    assert found.dtype == dtype
    assert found.stride(1) == 1


def test_what_is_exported_stays_in_the_default_order():
    make, settings = NETWORKS["U-Net"]
    network, x = make(**settings).eval(), torch.randn(2, 1, 8, 12, 8)
    assert network.encoder(x)[0].stride(1) == 1
    assert "as_strided" not in str(torch.jit.trace(network, x).inlined_graph)
    assert "as_strided" not in str(torch.export.export(network, (x,)).graph)
