from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.blocks import Convolution
from torch import Tensor, nn

from common.networks import SegmentationNetwork
from common.networks.convolution import Conv2d, Conv3d, ConvolutionBlock
from common.networks.discriminator import Discriminator
from common.networks.dynamic_convolution import DyBAC, DyBACNetwork
from common.networks.vnet import VNet

ROOT = Path(__file__).resolve().parents[2]
# Kernel, stride, and a size of which an axis is too short for them.
SHORT = [
    ((3, 3, 3), (1, 1, 1), (2, 8, 8)),
    ((3, 3, 3), (1, 1, 1), (1, 4, 4)),
    ((3, 3, 3), (2, 2, 2), (8, 1, 4)),
    ((3, 3, 3), (1, 2, 2), (6, 6, 2)),
    ((1, 3, 3), (1, 2, 2), (5, 2, 8)),
    ((5, 5, 5), (1, 1, 1), (8, 4, 8)),
    ((2, 2, 2), (2, 2, 2), (4, 4, 2)),
    ((3, 3), (2, 2), (8, 1)),
]
LONG = [
    ((3, 3, 3), (1, 1, 1), (3, 3, 3)),
    ((3, 3, 3), (2, 2, 2), (3, 4, 5)),
    ((1, 3, 3), (1, 2, 2), (1, 4, 4)),
    ((2, 2, 2), (2, 2, 2), (4, 4, 4)),
    ((1, 1, 1), (1, 1, 1), (1, 1, 1)),
    ((3, 3), (1, 2), (3, 3)),
]


def convolution(kernel: tuple[int, ...], stride: tuple[int, ...]) -> Conv2d | Conv3d:
    torch.manual_seed(0)
    made = Conv3d if len(kernel) == 3 else Conv2d
    return made(4, 8, kernel, stride, tuple(k // 2 for k in kernel) if kernel[-1] % 2 else 0)  # type: ignore[arg-type]


def learn(module: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output, and the gradients of input and parameters for a gradient of the output."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    output = module(x)
    output.backward(upstream.to(output.dtype))
    assert x.grad is not None
    return [output.detach(), x.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("kernel", "stride", "size"), SHORT)
def test_an_axis_shorter_than_the_kernel_is_convolved_in_float32(
    kernel: tuple[int, ...], stride: tuple[int, ...], size: tuple[int, ...]
) -> None:
    module, x = convolution(kernel, stride), torch.randn(2, 4, *size)
    upstream = torch.randn_like(module(x)).bfloat16()
    exact = learn(module, x, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        found = learn(module, x, upstream)
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found[0], exact[0].bfloat16(), atol=0, rtol=0)
    for value, expected in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(value, expected, atol=0, rtol=0)
    # Weights of half precision, too.
    halved = copy.deepcopy(module).bfloat16()
    output = halved(x.bfloat16())
    expected = halved.float()(x.bfloat16().float())
    torch.testing.assert_close(output, expected.bfloat16(), atol=0, rtol=0)


def test_dynamic_kernels_too() -> None:
    torch.manual_seed(0)
    block, x, kernels = DyBAC(3, 4, 8, 3, stride=2), torch.randn(2, 4, 4, 4, 1), torch.randn(2, 4, 1, 3, 3, 3)
    exact = block._depthwise(x, kernels)
    with torch.autocast("cpu", torch.bfloat16):
        found = block._depthwise(x, kernels)
    torch.testing.assert_close(found, exact.bfloat16(), atol=0, rtol=0)


@pytest.mark.parametrize(("kernel", "stride", "size"), LONG)
def test_others_are_convolved_as_autocast_says(
    kernel: tuple[int, ...], stride: tuple[int, ...], size: tuple[int, ...]
) -> None:
    module, x = convolution(kernel, stride), torch.randn(2, 4, *size)
    plain = nn.Conv3d if len(kernel) == 3 else nn.Conv2d
    with torch.autocast("cpu", torch.bfloat16):
        found = module(x)
        expected = plain.forward(module, x)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert not torch.equal(found, module(x).bfloat16())


def test_full_precision_stays_as_it_is() -> None:
    module, x = convolution((3, 3, 3), (1, 1, 1)), torch.randn(2, 4, 1, 2, 3)
    torch.testing.assert_close(module(x), nn.Conv3d.forward(module, x), atol=0, rtol=0)
    assert module.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("dims", [2, 3])
def test_a_block_has_the_weights_of_monais(dims: int) -> None:
    """As its names, so that weights fit that were trained before, and a seed gives the same ones."""
    torch.manual_seed(0)
    expected = Convolution(dims, 3, 5, strides=2).state_dict()
    torch.manual_seed(0)
    block = ConvolutionBlock(dims, 3, 5, strides=2)
    assert type(block.conv) is (Conv3d if dims == 3 else Conv2d)
    assert block.state_dict().keys() == expected.keys()
    assert all(torch.equal(block.state_dict()[name], value) for name, value in expected.items())


def test_every_network_is_made_of_them() -> None:
    plan: dict[str, Any] = {"features": [4, 8], "kernel_sizes": [3, 3], "strides": [1, 2]}
    for network in (
        SegmentationNetwork(3, 1, 2, **plan),
        DyBACNetwork(3, 1, 2, **plan),
        VNet(3, 1, 2, features=[4, 8], convolutions=[1, 2]),
        Discriminator(3, 2, 1, **plan),
    ):
        for name, module in network.named_modules():
            if type(module) in (nn.Conv2d, nn.Conv3d):
                assert set(module.kernel_size) == {1}, f"{type(network).__name__}.{name}"


def train_on_thin_stacks() -> None:
    """Gradients of networks whose stages get down to a slice, in bf16 and in float32."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plan: dict[str, Any] = {"features": [8, 16, 32], "kernel_sizes": [3, 3, 3], "strides": [1, 2, [1, 2, 2]]}
    image = torch.randn(2, 1, 4, 8, 8)
    networks = {
        "plain": SegmentationNetwork(3, 1, 2, **plan),
        "dynamic": DyBACNetwork(3, 1, 2, **plan),
        "vnet": VNet(3, 1, 2, features=[8, 16, 32], convolutions=[1, 2, 2], dropout=0.0),
        "discriminator": Discriminator(3, 2, 1, dropout=0.0, **plan),
        "dynamic discriminator": Discriminator(3, 2, 1, dropout=0.0, dynamic=True, **plan),
    }
    for name, network in networks.items():
        inputs = (image.expand(-1, 2, -1, -1, -1), image) if isinstance(network, Discriminator) else (image,)
        gradients = []
        for enabled in (False, True):
            network.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                output = network(*inputs)
            output.float().square().mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
        exact, found = gradients
        error = float((found - exact).norm() / exact.norm())
        assert error < 0.5, f"{name}: the gradient in bf16 is off by {error:.3g} of its norm"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc fills fresh memory on demand")
def test_no_gradient_is_made_of_memory_that_nobody_wrote() -> None:
    """With huge numbers in every fresh piece of memory, which by chance are there otherwise."""
    environment = {**os.environ, "MALLOC_PERTURB_": "128", "MALLOC_MMAP_MAX_": "0", "PYTHONPATH": str(ROOT)}
    environment.pop("LD_PRELOAD", None)  # an allocator of its own would not do so
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    train_on_thin_stacks()
