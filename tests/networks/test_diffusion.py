from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from common.errors import BadInput
from common.networks import SegmentationNetwork
from common.networks.diffusion import AggregatingDecouplingNetwork, StepEmbedding
from common.networks.dynamic_convolution import DyBAC, DyBACNetwork
from common.networks.vnet import VNet

SMALL = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "features": [2, 4],
    "kernel_sizes": [3, 3],
    "strides": [1, 2],
}
FLAT = {
    "spatial_dims": 2,
    "in_channels": 2,
    "out_channels": 2,
    "features": [2, 4, 4],
    "kernel_sizes": [3, 3, 3],
    "strides": [[2, 1], 2, 2],
    "convolutions_per_stage": 1,
    "dropout": 0.1,
}
SIZES = {"SMALL": (8, 8, 8), "FLAT": (16, 16)}
CASES = [("SMALL", SMALL), ("FLAT", FLAT)]


def make(settings: dict, seed: int = 0, **arguments) -> tuple[SegmentationNetwork, AggregatingDecouplingNetwork]:
    torch.manual_seed(seed)
    plain = SegmentationNetwork(**settings)
    return plain, AggregatingDecouplingNetwork(plain, **arguments)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_without_a_step_it_is_the_plain_network(name, settings):
    plain, network = make(settings)
    plain.eval(), network.eval()
    image = torch.randn(2, settings["in_channels"], *SIZES[name])
    features = network.encode(image)
    for own, expected in zip(features, plain.encoder(image), strict=True):
        assert torch.equal(own, expected)
    assert torch.equal(network(image), plain(image))


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_inference_part_bears_the_plain_network_s_names(name, settings):
    plain, network = make(settings)
    prefixes = ("encoder.", "segmentation_decoder.")
    part = {key: value for key, value in network.state_dict().items() if key.startswith(prefixes)}
    SegmentationNetwork(**settings).load_state_dict(part, strict=True)
    assert all(torch.equal(part[key], value) for key, value in plain.state_dict().items())
    others = {key.split(".")[0] for key in network.state_dict()} - {"encoder", "segmentation_decoder"}
    assert others == {
        *("difficulty_decoder", "diffusion_decoder", "noisy_stem"),
        *("step_embedding", "encoder_shifts", "decoder_shifts"),
    }


def test_decoders_are_alike_but_start_apart_and_share_the_given_encoder():
    plain, network = make(SMALL)
    assert network.encoder is plain.encoder
    assert network.segmentation_decoder is plain.segmentation_decoder
    decoders = [network.segmentation_decoder, network.difficulty_decoder, network.diffusion_decoder]
    states = [decoder.state_dict() for decoder in decoders]
    assert [tuple(value.shape) for value in states[0].values()] == [tuple(value.shape) for value in states[1].values()]
    assert list(states[0]) == list(states[1]) == list(states[2])
    weights = [state["stages.0.0.conv.weight"] for state in states]
    assert not any(torch.equal(weights[one], weights[other]) for one, other in ((0, 1), (0, 2), (1, 2)))
    assert len({parameter.data_ptr() for decoder in decoders for parameter in decoder.parameters()}) == 3 * len(
        states[0]
    )


def test_other_parts_forget_the_given_network_s_training():
    plain = SegmentationNetwork(**SMALL)
    for parameter in plain.parameters():
        nn.init.constant_(parameter, 7.0)
    network = AggregatingDecouplingNetwork(plain)
    for part in (network.difficulty_decoder, network.diffusion_decoder, network.noisy_stem):
        assert not any(torch.all(parameter == 7.0) for parameter in part.parameters())


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_denoising_gives_logits_of_every_class_at_every_level(name, settings):
    _, network = make(settings)
    size, classes = SIZES[name], settings["out_channels"]
    image, noisy = torch.randn(2, settings["in_channels"], *size), torch.randn(2, classes, *size)
    logits = network.denoise(image, noisy, torch.tensor([0, 999]))
    assert logits[0].shape == (2, classes, *size)
    assert len(logits) == len(settings["features"]) - 1


def denoised(network: AggregatingDecouplingNetwork, image: Tensor, noisy: Tensor, step: int) -> Tensor:
    with torch.no_grad():
        return network.eval().denoise(image, noisy, torch.full((image.shape[0],), step))[0]


def test_image_noisy_label_and_step_all_matter():
    """Inside the volume too, not only at its border; and each stage's shift has its share."""
    _, network = make(SMALL)
    image, other, noisy, noise = (torch.randn(1, channels, 16, 16, 16) for channels in (1, 1, 3, 3))
    base = denoised(network, image, noisy, 5)
    inside = (slice(None), slice(None), *[slice(6, 10)] * 3)
    changes = (
        denoised(network, other, noisy, 5),
        denoised(network, image, noise, 5),
        denoised(network, image, noisy, 900),
    )
    for changed in changes:
        assert (changed - base)[inside].abs().max() > 1e-3 * base.abs().max()
    for shifts in (network.encoder_shifts, network.decoder_shifts):
        for shift in shifts:
            before = shift.weight.detach().clone()
            nn.init.zeros_(shift.weight)
            assert not torch.allclose(denoised(network, image, noisy, 5), base)
            with torch.no_grad():
                shift.weight.copy_(before)


def test_denoising_on_the_v_net():
    """Skips are added, as in the network itself, and the running statistics stay those of images."""
    torch.manual_seed(0)
    plain = VNet(3, 1, 3, features=[2, 4, 4], convolutions=[1, 2, 2], dropout=0.0)
    network = AggregatingDecouplingNetwork(plain)
    image, noisy = torch.randn(2, 1, 8, 8, 8), torch.randn(2, 3, 8, 8, 8)
    with torch.no_grad():  # a stem that sees the image alone, shifts of nothing, and the same decoder
        stem = network.noisy_stem.get_submodule("conv")
        stem.weight.zero_()
        stem.weight[:, :1] = plain.encoder.stages[0][0].conv.weight
        stem.bias.copy_(plain.encoder.stages[0][0].conv.bias)
        for shift in [*network.encoder_shifts, *network.decoder_shifts]:
            shift.weight.zero_(), shift.bias.zero_()
        network.diffusion_decoder.load_state_dict(plain.segmentation_decoder.state_dict())
    before = {key: value.clone() for key, value in network.state_dict().items() if "running" in key}
    (denoised,) = network.denoise(image, noisy, torch.tensor([3, 400]))
    state = network.state_dict()
    assert before
    assert all(torch.equal(state[key], value) for key, value in before.items())
    torch.testing.assert_close(denoised, plain(image))
    assert any(not torch.equal(state[key], value) for key, value in before.items()), "an image moves them"


@pytest.mark.parametrize(("probability", "same"), [(0.0, True), (0.5, False)])
def test_denoising_on_the_v_net_has_its_dropout(probability, same):
    torch.manual_seed(0)
    network = AggregatingDecouplingNetwork(VNet(3, 1, 2, features=[4, 8], convolutions=[1, 1], dropout=probability))
    network.diffusion_decoder.dropout = nn.Identity()
    image, noisy = torch.randn(1, 1, 8, 8, 8), torch.randn(1, 2, 8, 8, 8)
    first, second = (network.denoise(image, noisy, torch.tensor([5]))[0] for _ in range(2))
    assert torch.equal(first, second) == same


def test_a_shift_of_nothing_leaves_the_plain_stages():
    """With shifts of 0 the denoising branch is the plain network on the wider stem."""
    _, network = make(SMALL)
    for shift in (*network.encoder_shifts, *network.decoder_shifts):
        nn.init.zeros_(shift.weight), nn.init.zeros_(shift.bias)
    image, noisy = torch.randn(1, 1, 8, 8, 8), torch.randn(1, 3, 8, 8, 8)
    first = network.encoder.stages[0][1](network.noisy_stem(torch.cat([image, noisy], 1)))
    second = network.encoder.stages[1](first)
    decoder = network.diffusion_decoder
    expected = decoder.logits(decoder([first, second]))[0]
    torch.testing.assert_close(network.denoise(image, noisy, torch.tensor([3]))[0], expected)


def test_a_shift_stands_between_norm_and_activation():
    _, network = make({**SMALL, "convolutions_per_stage": 1})
    image, noisy = torch.randn(1, 1, 8, 8, 8), torch.randn(1, 3, 8, 8, 8)
    embedding = network.step_embedding(torch.tensor([40]))
    x = network.noisy_stem.conv(torch.cat([image, noisy], 1))
    x = (x - x.mean((2, 3, 4), keepdim=True)) / (x.var((2, 3, 4), keepdim=True, unbiased=False) + 1e-5).sqrt()
    x = nn.functional.leaky_relu(x + network.encoder_shifts[0](embedding).reshape(1, 2, 1, 1, 1), 0.01)
    seen = []
    network.encoder.stages[1][0].conv.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    network.denoise(image, noisy, torch.tensor([40]))
    torch.testing.assert_close(seen[0], x, atol=1e-5, rtol=1e-5)


def test_step_embedding():
    """Two sinusoids of a step t have the frequencies 1 and 1/100: cos t, cos t/100, sin t, sin t/100."""
    embedding = StepEmbedding(sinusoids=4, channels=4)
    with torch.no_grad():
        for layer in (embedding.layers[0], embedding.layers[2]):
            layer.weight.copy_(torch.eye(4)), layer.bias.zero_()
    expected = torch.tensor([[math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)]])
    silu = nn.functional.silu
    torch.testing.assert_close(embedding(torch.tensor([3])), silu(silu(expected)))
    defaults = StepEmbedding()
    assert [layer.weight.shape for layer in (defaults.layers[0], defaults.layers[2])] == [(512, 128), (512, 512)]


def test_without_diffusion_there_is_no_denoising_branch():
    _, network = make(SMALL, diffusion=False)
    assert {key.split(".")[0] for key in network.state_dict()} == {
        *("encoder", "segmentation_decoder", "difficulty_decoder"),
    }


def test_sizes_that_do_not_fit():
    _, network = make(SMALL)
    with pytest.raises(BadInput, match="multiple of"):
        network.encode(torch.zeros(1, 1, 7, 8, 8))
    with pytest.raises(BadInput, match="network input"):
        network.denoise(torch.zeros(1, 2, 8, 8, 8), torch.zeros(1, 3, 8, 8, 8), torch.tensor([0]))


def test_decoders_of_dynamic_convolutions_start_apart():
    torch.manual_seed(0)
    plain = DyBACNetwork(2, 1, 3, [2, 4], [3, 3], [1, 2])
    network = AggregatingDecouplingNetwork(plain)
    kernels = [
        [block.kernels for block in decoder.modules() if isinstance(block, DyBAC)]
        for decoder in (network.segmentation_decoder, network.difficulty_decoder, network.diffusion_decoder)
    ]
    assert kernels[0]
    for one, second, third in zip(*kernels, strict=True):
        assert not torch.equal(one, second)
        assert not torch.equal(second, third)
