from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import BadInput
from common.networks.discriminator import Discriminator
from common.networks.dynamic_convolution import DyBAC

SMALL = {"features": [4, 6, 8], "kernel_sizes": [3, 3, 3], "strides": [2, 2, 2]}
THICK = {"features": [4, 6, 8], "kernel_sizes": [[1, 3, 3], 3, 3], "strides": [[1, 2, 2], [1, 2, 2], 2]}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_crops_of_any_size_even_one_in_a_batch(dims, dynamic, size):
    torch.manual_seed(0)
    discriminator = Discriminator(dims, 3, 2, **SMALL, dynamic=dynamic).train()
    verdict = discriminator(torch.rand(1, 3, *[size] * dims), torch.randn(1, 2, *[size] * dims))
    assert verdict.shape == (1, 2)
    assert torch.isfinite(verdict).all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_thick_axis_is_strided_as_told(dynamic):
    discriminator = Discriminator(3, 2, 1, **THICK, dynamic=dynamic)
    sizes = []
    for block in discriminator.blocks:
        block.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    discriminator(torch.rand(2, 2, 5, 16, 12), torch.randn(2, 1, 5, 16, 12))
    assert discriminator.map_stem.kernel_size == discriminator.image_stem.kernel_size == (1, 3, 3)
    assert sizes == [(6, 5, 4, 3), (8, 3, 2, 2)]


def test_two_stems_are_summed_and_the_verdict_is_of_the_mean():
    torch.manual_seed(0)
    discriminator = Discriminator(2, 3, 2, features=[4], kernel_sizes=[3], strides=[2], dropout=0.0)
    probabilities, image = torch.rand(2, 3, 7, 8), torch.randn(2, 2, 7, 8)
    map_stem, image_stem = discriminator.map_stem, discriminator.image_stem
    x = F.conv2d(probabilities, map_stem.weight, map_stem.bias, 2, 1)
    x = x + F.conv2d(image, image_stem.weight, image_stem.bias, 2, 1)
    x = torch.where(x > 0, x, 0.2 * x).mean((2, 3))
    expected = x @ discriminator.verdict.weight.T + discriminator.verdict.bias
    torch.testing.assert_close(discriminator(probabilities, image), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_blocks(dynamic):
    discriminator = Discriminator(3, 2, 1, **SMALL, dynamic=dynamic)
    assert [isinstance(block.conv, DyBAC) for block in discriminator.blocks] == [dynamic] * 2
    assert isinstance(discriminator.map_stem, nn.Conv3d)
    for block in discriminator.blocks:
        assert [type(layer).__name__ for layer in block.adn] == ["GroupNorm", "LeakyReLU", "Dropout3d"]
    drops = [layer.p for layer in discriminator.modules() if isinstance(layer, nn.Dropout3d)]
    assert drops == [0.5] * 3, "whole channels"


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_verdict_does_not_depend_on_the_rest_of_the_batch(dynamic):
    torch.manual_seed(0)
    discriminator = Discriminator(2, 2, 1, **SMALL, dynamic=dynamic, dropout=0.0).train()
    probabilities, image = torch.rand(3, 2, 9, 9), torch.randn(3, 1, 9, 9)
    alone = torch.cat([discriminator(probabilities[i : i + 1], image[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(discriminator(probabilities, image), alone, atol=1e-5, rtol=1e-5)


def test_learns_to_tell_maps_apart():
    torch.manual_seed(0)
    discriminator = Discriminator(2, 2, 1, **SMALL, dropout=0.0)
    image = torch.randn(8, 1, 16, 16)
    edge = torch.zeros(8, 1, 16, 16)
    edge[:4, :, 4:12, 4:12] = 1.0
    edge[4:] = 0.25
    maps, target = torch.cat([1 - edge, edge], 1), torch.tensor([1] * 4 + [0] * 4)
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.05, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(discriminator(maps, image), target).backward()
        optimizer.step()
    assert (discriminator.eval()(maps, image).argmax(1) == target).all()


def test_logits_are_float32_under_autocast():
    discriminator = Discriminator(2, 2, 1, **SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        assert discriminator(torch.rand(1, 2, 8, 8), torch.rand(1, 1, 8, 8)).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strides": [2, 2]}, "found 3, 3 and 2 entries"),
        ({"features": [], "kernel_sizes": [], "strides": []}, "found 0, 0 and 0 entries"),
        ({"kernel_sizes": [3, 4, 3]}, r"kernel_sizes\[1\]: found \[4, 4\], expected odd"),
        ({"strides": [2, [2, 2, 2], 2]}, r"strides\[1\]: found"),
    ],
)
def test_impossible_values(settings, message):
    with pytest.raises(BadInput, match=message):
        Discriminator(2, 2, 1, **{**SMALL, **settings})


def test_map_and_image_must_fit():
    with pytest.raises(BadInput, match="the same batch and spatial size"):
        Discriminator(2, 2, 1, **SMALL)(torch.rand(1, 2, 8, 8), torch.rand(1, 1, 8, 9))
    with pytest.raises(BadInput, match="the same batch and spatial size"):
        Discriminator(2, 2, 1, **SMALL)(torch.rand(1, 2, 8, 8), torch.rand(2, 1, 8, 8))
