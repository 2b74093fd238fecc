from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor, nn

from common.errors import BadInput
from common.inferers import SlidingWindow
from common.networks import SegmentationNetwork
from common.networks.dynamic_convolution import DyBAC, DyBACNetwork, DyBACVNet, anneal
from common.networks.vnet import VNet

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
SIZES = {2: (8, 12), 3: (4, 8, 12)}


def by_hand(block: DyBAC, sample: Tensor) -> Tensor:
    """One sample (C, *spatial), each step written out, and each channel's kernel a sum in a loop."""
    convolve = F.conv2d if sample.dim() == 3 else F.conv3d
    first, second = block.spatial_excitation[0].weight.flatten(1), block.spatial_excitation[1].weight.flatten(1)
    score = torch.einsum("oc,c...->o...", second @ first, sample)[0]
    score = (score - score.mean()) / (score.var(unbiased=False) + 1e-5).sqrt()
    score = score * block.spatial_scale + block.spatial_shift
    attended = sample / (1 + (-score).exp())
    hidden = (block.kernel_excitation[0].weight @ attended.flatten(1).mean(1)).clamp(min=0)
    raw = (block.kernel_excitation[2].weight @ hidden / block.temperature).exp()
    weights = raw / raw.sum()
    channels = []
    for channel, plane in enumerate(attended):
        kernel = sum(weight * kernels[channel] for weight, kernels in zip(weights, block.kernels, strict=True))
        channels.append(convolve(plane[None, None], kernel[None, None], stride=block.stride, padding=block.padding)[0])
    return torch.einsum("oc,c...->o...", block.output.weight.flatten(1), torch.cat(channels)) + block.output.bias.view(
        -1, *[1] * (sample.dim() - 1)
    )


@pytest.mark.parametrize(
    ("dims", "kernel", "stride"), [(2, 3, 1), (2, [1, 5], [2, 1]), (3, 3, 2), (3, [1, 3, 3], [1, 2, 2]), (3, 1, 1)]
)
def test_a_batch_is_each_sample_by_its_own_sum_of_kernels(dims, kernel, stride):
    torch.manual_seed(0)
    block = DyBAC(dims, 5, 7, kernel, stride, temperature=1.5)
    nn.init.normal_(block.output.bias)
    nn.init.normal_(block.spatial_scale)
    nn.init.normal_(block.spatial_shift)
    nn.init.uniform_(block.kernel_excitation[0].weight, -0.1, 1.0)
    nn.init.normal_(block.kernel_excitation[2].weight, std=0.5)
    x = (torch.randn(3, 5, *SIZES[dims]) + 2) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, *[1] * dims)
    attention = block.kernel_attention(x)
    assert (attention[0] - attention[1]).abs().max() > 0.05, "otherwise all samples have one kernel"
    expected = torch.stack([by_hand(block, sample) for sample in x])
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5, [1, 3, 3]])
@pytest.mark.parametrize("stride", [1, 2, [1, 2, 2]])
@pytest.mark.parametrize("size", [(5, 6, 8), (1, 1, 1)])
def test_drop_in_shape(dims, kernel, stride, size):
    kernel, stride = [value[-dims:] if isinstance(value, list) else value for value in (kernel, stride)]
    padding = [k // 2 for k in kernel] if isinstance(kernel, list) else kernel // 2
    plain = (nn.Conv2d if dims == 2 else nn.Conv3d)(3, 4, kernel, stride, padding)
    x = torch.randn(1, 3, *size[-dims:])
    output = DyBAC(dims, 3, 4, kernel, stride).train()(x)
    assert output.shape == plain(x).shape
    assert torch.isfinite(output).all()


def test_attention_over_kernels_by_hand():
    """Means 2 and -1; hidden max(2, 0) and max(-1, 0); scores 2, 0 and -2 at temperature 2: e^1, e^0 and e^-1."""
    block = DyBAC(2, 2, 1, kernels=3, temperature=2.0)
    block.kernel_excitation = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        block.kernel_excitation[0].weight.copy_(torch.eye(2))
        block.kernel_excitation[2].weight.copy_(torch.tensor([[1.0, 5.0], [0.0, 5.0], [-1.0, 5.0]]))
    x = torch.tensor([[1.0, 3.0], [-3.0, 1.0]]).reshape(1, 2, 1, 2)
    total = 2.718282 + 1 + 0.367879
    assert block.kernel_attention(x).tolist()[0] == pytest.approx([2.718282 / total, 1 / total, 0.367879 / total], 1e-5)


def test_temperature_flattens_the_attention_and_falls_to_one():
    torch.manual_seed(0)
    block = DyBAC(2, 4, 4)
    nn.init.normal_(block.kernel_excitation[2].weight, std=5.0)
    x = torch.randn(2, 4, 6, 6) + 3
    seen = []
    for fraction, expected in ((0.0, 34.0), (0.5, 17.5), (1.0, 1.0), (3.0, 1.0)):
        block.set_progress(fraction)
        assert block.temperature.item() == pytest.approx(expected)
        seen.append(block.kernel_attention(x).amax().item())
    assert seen[0] < seen[1] < seen[2] == seen[3]
    assert seen[0] < 0.35, "nearly a quarter each"


def test_temperature_is_remembered():
    block = DyBAC(2, 4, 4)
    block.set_progress(0.75)
    other = DyBAC(2, 4, 4)
    other.load_state_dict(block.state_dict())
    assert other.temperature.item() == pytest.approx(9.25)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(other(x), block(x))
    other.set_progress(0.0)
    assert other.temperature.item() == pytest.approx(9.25), "it never rises"


def test_all_kernels_learn():
    torch.manual_seed(0)
    block = DyBAC(3, 4, 4)
    block(torch.randn(2, 4, 4, 4, 4)).square().mean().backward()
    assert all(kernel.abs().max() > 0 for kernel in block.kernels.grad)
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_attention_stays_in_full_precision_under_autocast():
    torch.manual_seed(0)
    block = DyBAC(3, 4, 8)
    x = torch.randn(2, 4, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert block.kernel_attention(x).dtype == torch.float32
        output = block(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), block(x), atol=0.05, rtol=0.05)


def test_parameters_counted_by_hand():
    """C = 32: 32 x 2 + 2, scale and shift, 32 x 9 + 9 x 4, 4 x 32 x 27, 32 x 64 + 64."""
    expected = 66 + 2 + 324 + 3456 + 2112
    assert sum(parameter.numel() for parameter in DyBAC(3, 32, 64).parameters()) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spatial_dims": 1}, "spatial_dims: found 1"),
        ({"kernel_size": 2}, "kernel_size: found .2, 2., expected odd"),
        ({"kernel_size": [3]}, "kernel_size: found .3."),
        ({"stride": 0}, "stride: found 0"),
        ({"kernels": 0}, "kernels: found 0"),
        ({"temperature": 0.5}, "temperature: found 0.5"),
    ],
)
def test_impossible_values(settings, message):
    with pytest.raises(BadInput, match=message):
        DyBAC(**{"spatial_dims": 2, "in_channels": 2, "out_channels": 2, **settings})


@pytest.mark.parametrize("config", [ANISOTROPIC, FLAT], ids=["anisotropic", "2D"])
def test_network_is_the_plain_one_with_all_but_its_first_stage_convolution_replaced(config):
    plain, network = SegmentationNetwork(**config), DyBACNetwork(**config)
    assert isinstance(network, SegmentationNetwork)
    assert network.divisor == plain.divisor
    assert {name.split(".")[0] for name in network.state_dict()} == {"encoder", "segmentation_decoder"}
    modules = dict(network.named_modules())
    replaced = {name for name, module in modules.items() if isinstance(module, DyBAC)}
    convolutions = {name for name, module in plain.named_modules() if ".stages." in name and name.endswith(".conv")}
    assert convolutions - replaced == {"encoder.stages.0.0.conv"}
    assert replaced < convolutions
    for name, module in plain.named_modules():
        if name in replaced:
            block = modules[name]
            assert (block.kernels.shape[1], block.output.out_channels) == (module.in_channels, module.out_channels)
            assert tuple(block.kernels.shape[2:]) == module.kernel_size
            assert tuple(block.stride) == module.stride
            assert tuple(block.padding) == module.padding
    x = torch.randn(2, config["in_channels"], *SIZES[config["spatial_dims"]])
    for network_output, plain_output in zip(network.forward_all(x)[1], plain.forward_all(x)[1], strict=True):
        assert network_output.shape == plain_output.shape


def test_v_net_is_the_plain_one_with_its_convolutions_of_three_voxels_replaced():
    config = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "features": [4, 6, 8], "convolutions": [1, 2, 2]}
    plain, network = VNet(**config), DyBACVNet(**config)
    replaced = {name for name, module in network.named_modules() if isinstance(module, DyBAC)}
    wanted = {n for n, m in plain.named_modules() if isinstance(m, nn.Conv3d) and m.kernel_size == (3, 3, 3)}
    assert replaced == wanted - {"encoder.stages.0.0.conv"}
    assert len(replaced) == 7
    x = torch.randn(2, 1, 8, 8, 8)
    assert network(x).shape == plain(x).shape == (2, 2, 8, 8, 8)
    network(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_network_trains_and_anneals():
    torch.manual_seed(0)
    network = DyBACNetwork(**FLAT, dropout=0.1)
    sum(level.square().mean() for level in network.forward_all(torch.randn(2, 1, 8, 8))[1]).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    anneal(network, 1.0)
    temperatures = [value.item() for name, value in network.state_dict().items() if name.endswith("temperature")]
    assert temperatures == [1.0] * 9
    anneal(SegmentationNetwork(**FLAT), 1.0)  # nothing to anneal


def test_network_in_inference():
    """A window's prediction does not depend on the windows it is batched with, and keeps the type of the volume."""
    torch.manual_seed(0)
    network = DyBACNetwork(**FLAT).eval()
    volume = MetaTensor(torch.randn(1, 1, 16, 20))
    with torch.no_grad():
        one = SlidingWindow((8, 8), sw_batch_size=1, amp=False)(volume, network)
        many = SlidingWindow((8, 8), sw_batch_size=5, amp=False)(volume, network)
    assert one.shape == (1, 2, 16, 20)
    torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [ANISOTROPIC, FLAT], ids=["anisotropic", "2D"])
def test_network_as_torchscript(config):
    torch.manual_seed(0)
    network = DyBACNetwork(**config).eval()
    x = torch.randn(2, config["in_channels"], *SIZES[config["spatial_dims"]])
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(network))(x), network(x), atol=1e-5, rtol=1e-5)
    traced = torch.jit.trace(network, x, check_trace=False)
    torch.jit.save(traced, buffer := io.BytesIO())
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x), network(x), atol=1e-5, rtol=1e-5)
