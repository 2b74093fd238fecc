from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from common.errors import BadInput
from common.networks import AnatomyCrossAttention, soft_edges, to_grid
from common.networks.attention import _attend, _from_windows, _to_windows


def attention(dims: int = 2, channels: int = 8, **options) -> AnatomyCrossAttention:
    torch.manual_seed(0)
    block = AnatomyCrossAttention(dims, channels, channels, **options)
    nn.init.normal_(block.output.weight, std=0.3)
    return block


def test_against_a_softmax_by_hand():
    # One head of 4 channels, three keys; the query meets them with 2, 0 and 0, so 1, 0, 0 after / sqrt(4).
    query = torch.tensor([[[[2.0, 0, 0, 0]]]])
    key = torch.tensor([[[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]]])
    value = torch.tensor([[[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]]])
    bias = torch.tensor([[[0.0], [math.log(3)], [-1e4]]])
    e = math.e
    expected = torch.tensor([e / (e + 3), 3 / (e + 3), 0, 0])
    torch.testing.assert_close(_attend(query, key, value, bias).flatten(), expected)
    plain = torch.tensor([e / (e + 2), 1 / (e + 2), 1 / (e + 2), 0])
    torch.testing.assert_close(_attend(query, key, value, None).flatten(), plain)


def test_formed_scores_equal_the_fused_kernel():
    torch.manual_seed(0)
    tensors = [torch.randn(3, 2, 20, 5, dtype=torch.double, requires_grad=True) for _ in range(3)]
    bias = torch.randn(3, 20, 1, dtype=torch.double, requires_grad=True)
    for given in (None, bias):
        formed, fused = _attend(*tensors, given), _attend(*tensors, given, largest_formed=0)
        torch.testing.assert_close(formed, fused)
        inputs = [*tensors, bias] if given is not None else tensors
        for one, other in zip(
            torch.autograd.grad(formed.square().sum(), inputs),
            torch.autograd.grad(fused.square().sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_the_bias_is_an_additive_mask_also_for_gradients():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4, dtype=torch.double, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 5, 1, dtype=torch.double, requires_grad=True)
    tensors = (query, key, value, bias)
    got = _attend(*tensors)
    mask = bias.transpose(1, 2).unsqueeze(1)
    expected = (query @ key.transpose(-1, -2) / 2 + mask).softmax(-1) @ value
    torch.testing.assert_close(got, expected)
    weights = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_starts_as_the_identity_and_learns():
    block = AnatomyCrossAttention(2, 8, 6)
    query, key, edge = torch.randn(1, 8, 4, 4), torch.randn(1, 6, 4, 4), torch.rand(1, 1, 4, 4)
    assert torch.equal(block(query, key, edge), query)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        block(query, key, edge).pow(3).sum().backward()
        optimizer.step()
    assert block.gamma.item() != 1.0
    assert all(p.grad.any() for name, p in block.named_parameters() if name != "key.bias")


@pytest.mark.parametrize("window", [None, 3])
def test_gamma_zero_is_plain_attention(window):
    block = attention(window=window)
    plain = attention(window=window, prior=False)
    assert plain.gamma is None
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if k != "gamma"})
    query, key, edge = torch.randn(2, 8, 5, 4), torch.randn(2, 8, 5, 4), torch.rand(2, 1, 5, 4)
    with torch.no_grad():
        assert not torch.allclose(block(query, key, edge), plain(query, key, edge), atol=1e-4)
        block.gamma.zero_()
        torch.testing.assert_close(block(query, key, edge), plain(query, key, edge), atol=1e-6, rtol=1e-6)
        assert torch.equal(block(query, key, None), plain(query, key))


@pytest.mark.parametrize("window", [(2, 3, 4), (7, 7, 7)])
def test_one_window_is_full_attention(window):
    block, full = attention(3, window=window), attention(3)
    full.load_state_dict(block.state_dict())
    query, key, edge = torch.randn(2, 8, 2, 3, 4), torch.randn(2, 8, 2, 3, 4), torch.rand(2, 1, 2, 3, 4)
    assert torch.equal(block(query, key, edge), full(query, key, edge))


@pytest.mark.parametrize("prior", [True, False])
def test_windows_see_only_themselves_and_no_padding(prior):
    block, full = attention(window=[3, 2], prior=prior), attention(prior=prior)
    full.load_state_dict(block.state_dict())
    query, key, edge = torch.randn(1, 8, 5, 4), torch.randn(1, 8, 5, 4), torch.rand(1, 1, 5, 4)
    got = block(query, key, edge)
    for rows in (slice(0, 3), slice(3, 5)):
        for columns in (slice(0, 2), slice(2, 4)):
            inside = (..., rows, columns)
            torch.testing.assert_close(got[inside], full(query[inside], key[inside], edge[inside]))
    got.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())


@pytest.mark.parametrize(("size", "window"), [([4, 6], [2, 3]), ([2, 4, 6], [1, 2, 6])])
def test_windows_come_back(size, window):
    x = torch.arange(2 * 3 * math.prod(size)).reshape(2, 3, *size)
    tokens = _to_windows(x, window)
    assert tokens.shape == (2 * math.prod(size) // math.prod(window), math.prod(window), 3)
    first = x[(0, slice(None), *(slice(w) for w in window))]
    assert torch.equal(tokens[0], first.flatten(1).T)
    assert torch.equal(_from_windows(tokens, size, window), x)


def test_an_edge_pulls_attention():
    block = attention(channels=4, heads=1)
    with torch.no_grad():
        for layer in (block.query, block.key):
            layer.weight.zero_()  # all keys alike, so that only the edge can tell them apart
        block.value.weight.copy_(torch.eye(4))
        block.output.weight.copy_(torch.eye(4))
        block.value.bias.zero_()
    query, key = torch.zeros(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    edge = torch.zeros(1, 1, 4, 4)
    edge[..., 1, 2] = 1
    read = block(query, key, edge)
    at_edge = nn.functional.layer_norm(key[0, :, 1, 2], [4])
    others = sum(nn.functional.layer_norm(key[0, :, i, j], [4]) for i in range(4) for j in range(4)) - at_edge
    # weights: (1 + eps) for the edge, eps for each of the 15 others
    expected = (1.001 * at_edge + 0.001 * others) / (1.001 + 15 * 0.001)
    torch.testing.assert_close(read[0, :, 3, 0], expected, atol=1e-5, rtol=1e-5)


def test_no_edge_anywhere_is_plain_attention():
    block, plain = attention(), attention(prior=False)
    query, key = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(block(query, key, torch.zeros(1, 1, 4, 4)), plain(query, key), atol=1e-5, rtol=1e-5)


def test_soft_edges_by_hand():
    inside = torch.zeros(1, 3, 5, 5)
    inside[0, 1, 1:4, 1:4] = 0.8
    edge = soft_edges(inside, [1])
    assert edge.shape == (1, 1, 5, 5)
    assert edge[0, 0, 2, 2] == 0
    assert (edge[0, 0].flatten()[torch.arange(25) != 12] == 0.8).all()
    assert not soft_edges(inside, [2]).any()
    inside[0, 2, 2, 2] = 1
    assert soft_edges(inside, [1, 2])[0, 0, 2, 2] == 1


def test_soft_edges_kernel_along_one_axis_and_the_border():
    inside = torch.zeros(1, 1, 3, 4, 4)
    inside[:, :, 1] = 1
    assert not soft_edges(inside, [0], [1, 3, 3]).any()
    assert soft_edges(inside, [0], [3, 1, 1]).all()
    assert not soft_edges(torch.ones(1, 1, 4, 4), [0]).any()
    with pytest.raises(BadInput, match="edge_kernel: found 2"):
        soft_edges(inside, [0], 2)


def test_a_thin_edge_survives_a_coarse_grid():
    edge = torch.zeros(1, 1, 8, 8, 8)
    edge[0, 0, 5, 2, 7] = 1
    coarse = to_grid(edge, (2, 4, 2))
    assert coarse.shape == (1, 1, 2, 4, 2)
    assert coarse[0, 0, 1, 1, 1] == 1
    assert coarse.sum() == 1
    assert to_grid(edge, edge.shape[2:]) is edge
    block = attention(3)
    query, key = torch.randn(1, 8, 2, 4, 2), torch.randn(1, 8, 2, 4, 2)
    torch.testing.assert_close(block(query, key, edge), block(query, key, coarse))


def test_channels_that_heads_do_not_divide_and_bad_values():
    assert attention(channels=6, heads=4)(torch.randn(1, 6, 2, 2), torch.randn(1, 6, 2, 2)).shape == (1, 6, 2, 2)
    with pytest.raises(BadInput, match="attention_window"):
        AnatomyCrossAttention(3, 8, 8, window=[2, 2])
    with pytest.raises(BadInput, match="attention_heads"):
        AnatomyCrossAttention(3, 8, 8, heads=0)
