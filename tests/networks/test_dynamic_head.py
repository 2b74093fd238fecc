"""Heads made for a task: the order of their parameters, and what they compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from common.errors import BadInput
from common.networks.dynamic_head import PARAMETERS, DynamicHeadNetwork, apply_heads, split_parameters


def network(tasks=None, spatial_dims: int = 3, classes: int = 4) -> DynamicHeadNetwork:
    torch.manual_seed(0)
    return DynamicHeadNetwork(spatial_dims, 1, classes, [3, 5], [3, 3], [1, 2], 1, tasks=tasks).eval()


def test_162_parameters_weights_first() -> None:
    assert PARAMETERS == 162
    weights, biases = split_parameters(torch.arange(2 * 162.0).reshape(2, 162))
    assert [tuple(weight.shape) for weight in weights] == [(2, 8, 8), (2, 8, 8), (2, 2, 8)]
    assert [tuple(bias.shape) for bias in biases] == [(2, 8, 1), (2, 8, 1), (2, 2, 1)]
    starts = [weight[0].flatten()[0].item() for weight in weights] + [bias[0].flatten()[0].item() for bias in biases]
    assert starts == [0, 64, 128, 144, 152, 160]
    assert weights[0][0, 1, 0] == 8, "a row an output channel, as a convolution's"
    assert biases[2][1].flatten().tolist() == [162 + 160, 162 + 161]


@pytest.mark.parametrize("spatial", [(3, 4, 5), (4, 5)])
def test_heads_are_three_convolutions(spatial: tuple[int, ...]) -> None:
    """Of every image and task, one by one, by ``F.conv3d``."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 8, *spatial, generator=generator)
    parameters = torch.randn(2, 3, 162, generator=generator)
    found = apply_heads(features, parameters)
    assert found.shape == (2, 3, 2, *spatial)
    convolution, ones = (F.conv3d, (1, 1, 1)) if len(spatial) == 3 else (F.conv2d, (1, 1))
    for image in range(2):
        for task in range(3):
            p = parameters[image, task]
            x = features[image : image + 1]
            x = F.relu(convolution(x, p[:64].reshape(8, 8, *ones), p[144:152]))
            x = F.relu(convolution(x, p[64:128].reshape(8, 8, *ones), p[152:160]))
            x = convolution(x, p[128:144].reshape(2, 8, *ones), p[160:162])
            torch.testing.assert_close(found[image, task], x[0], atol=1e-5, rtol=1e-5)


def test_the_head_follows_image_and_task() -> None:
    net = network()
    bottleneck = torch.rand(2, 5, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    made = net.parameters_of_heads(bottleneck)
    weight, bias = net.controller.weight.flatten(1), net.controller.bias
    for image in range(2):
        for task in range(3):
            condition = torch.cat([bottleneck[image].mean((1, 2, 3)), torch.eye(3)[task]])
            torch.testing.assert_close(made[image, task], weight @ condition + bias, atol=1e-5, rtol=1e-5)


def test_all_tasks_take_one_pass() -> None:
    net = network()
    passes = []
    for part in (net.encoder, net.segmentation_decoder):
        part.register_forward_hook(lambda module, inputs, output: passes.append(type(module).__name__))
    assert net(torch.randn(2, 1, 8, 8, 8)).shape == (2, 4, 8, 8, 8)
    assert passes == ["Encoder", "Decoder"]


def test_four_tasks_cost_hardly_more_than_one() -> None:
    costs = []
    for classes in (2, 5):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            DynamicHeadNetwork(3, 1, classes, [16, 32, 64], [3] * 3, [1, 2, 2])(torch.empty(1, 1, 32, 32, 32))
        costs.append(counter.get_total_flops())
    assert 1 < costs[1] / costs[0] < 1.05


def test_the_most_probable_class_follows_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes 1 with its tumour 3, and 2. Each column is a voxel: what its sigmoids' logits are, and whose it is."""
    net = network(tasks=[[1, 3], [2]], spatial_dims=2)
    voxels = [
        ((-1.0, -1.0, -1.0), 0),  # nobody's
        ((1.0, -1.0, -1.0), 1),
        ((1.0, -1.0, 2.0), 2),  # of two organs the more probable one
        ((3.0, -1.0, 2.0), 1),
        ((1.0, 0.5, -1.0), 3),  # a tumour in its organ
        ((1.0, 1.5, 2.0), 3),  # organ and tumour together outdo another organ
        ((1.0, 0.5, 2.0), 2),
        ((-1.0, 0.5, -1.0), 3),
        ((-1.0, -0.5, -1.0), 0),
    ]
    heads = torch.tensor([[[a, t], [b, 9.0]] for (a, t, b), _ in voxels]).permute(1, 2, 0)[None, :, :, None]
    monkeypatch.setattr(net, "forward_tasks", lambda image: heads)
    merged = net(torch.zeros(1, 1, 8, 8))
    assert merged.argmax(1).flatten().tolist() == [whose for _, whose in voxels]
    assert merged[:, 0].abs().max() == 0


def test_of_one_organ_softmax_is_its_sigmoid(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(classes=2)
    image = torch.randn(1, 1, 8, 8, 8)
    torch.testing.assert_close(net(image).softmax(1)[:, 1], net.forward_tasks(image)[:, 0, 0].sigmoid())


def test_it_exports() -> None:
    net, image = network(tasks=[[1, 3], [2]]), torch.randn(2, 1, 8, 8, 8)
    torch.testing.assert_close(torch.jit.script(net)(image), net(image))


@pytest.mark.parametrize("tasks", [[[1], [2]], [[1, 2, 3]], [[1], [2], [2, 3]], [[0, 1], [2], [3]]])
def test_tasks_that_make_no_sense(tasks: list[list[int]]) -> None:
    with pytest.raises(BadInput, match="every class from 1 to 3 once"):
        network(tasks)


def test_an_image_that_does_not_fit() -> None:
    with pytest.raises(BadInput, match="multiple"):
        network()(torch.zeros(1, 1, 7, 8, 8))
