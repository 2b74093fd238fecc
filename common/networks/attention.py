"""Cross-attention from regression features to segmentation features that knows where the anatomy's edge is.

Scaled dot-product attention of Vaswani et al., "Attention is all you need", 2017, in windows as in Liu et al.,
"Swin Transformer", 2021 (not shifted). What is added is a prior on the keys, gamma * log(edge + epsilon): what is
measured, a wall for instance, lies on the structure's edge, so the regression should read the features there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadInput
from .unet import PerAxis, per_axis

__all__ = ["AnatomyCrossAttention", "soft_edges", "to_grid"]


def soft_edges(probabilities: Tensor, classes: Sequence[int], kernel: PerAxis = 3) -> Tensor:
    """How much of an edge each voxel is: dilation minus erosion of a class's probability, the largest over classes.

    Args:
        probabilities: (B, K, *spatial), in [0, 1].
        classes: the classes whose edges count.
        kernel: odd size of the pooling in voxels, an integer or one an axis. 1 along an axis looks for no edge there.

    Returns:
        (B, 1, *spatial), in [0, 1]. The image's border is no edge.

    Raises:
        BadInput: when a kernel is even.
    """
    return _soft_edges(probabilities, list(classes), _check_kernel(kernel, probabilities.dim() - 2))


def _check_kernel(kernel: PerAxis, spatial_dims: int) -> list[int]:
    sizes = per_axis(kernel, spatial_dims, "edge_kernel")
    if any(size % 2 == 0 for size in sizes):
        raise BadInput(f"edge_kernel: found {kernel}, expected odd sizes: 1, 3, 5 ...")
    return sizes


def _soft_edges(probabilities: Tensor, classes: list[int], kernel: list[int]) -> Tensor:
    dilated = probabilities[:, classes]
    eroded = dilated
    # An axis and a neighbour at a time: a tenth of the time that max pooling takes on a CPU.
    for axis, size in enumerate(kernel):
        for _ in range(size // 2):
            dilated = torch.maximum(dilated, torch.maximum(*_neighbours(dilated, 2 + axis)))
            eroded = torch.minimum(eroded, torch.minimum(*_neighbours(eroded, 2 + axis)))
    return (dilated - eroded).amax(dim=1, keepdim=True)


def _neighbours(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The value before and the value after each voxel along an axis; at the border the voxel's own."""
    length = x.shape[axis]
    padded = torch.cat([x.narrow(axis, 0, 1), x, x.narrow(axis, length - 1, 1)], dim=axis)
    return padded.narrow(axis, 0, length), padded.narrow(axis, 2, length)


def to_grid(edge: Tensor, shape: Sequence[int]) -> Tensor:
    """``edge`` (B, 1, *spatial) on a coarser grid; by maxima, so that a thin edge doesn't vanish."""
    return _to_grid(edge, list(shape))


def _to_grid(edge: Tensor, shape: list[int]) -> Tensor:
    if list(edge.shape[2:]) == shape:
        return edge
    if edge.dim() == 5:
        return F.adaptive_max_pool3d(edge, shape)
    return F.adaptive_max_pool2d(edge, shape)


def _to_windows(x: Tensor, window: list[int]) -> Tensor:
    """(B, C, *spatial) to (B * windows, tokens of a window, C)."""
    axes = len(window)
    shape = [x.shape[0], x.shape[1]]
    for axis in range(axes):
        shape.extend([x.shape[2 + axis] // window[axis], window[axis]])
    counts = [2 + 2 * axis for axis in range(axes)]
    inside = [3 + 2 * axis for axis in range(axes)]
    x = x.reshape(shape).permute([0] + counts + inside + [1])  # noqa: RUF005 (TorchScript)
    return x.flatten(1 + axes, 2 * axes).flatten(0, axes)


def _from_windows(tokens: Tensor, size: list[int], window: list[int]) -> Tensor:
    """The reverse of :func:`_to_windows`, to (B, C, *size)."""
    axes = len(window)
    counts = [size[axis] // window[axis] for axis in range(axes)]
    x = tokens.reshape([-1] + counts + window + [tokens.shape[-1]])  # noqa: RUF005 (TorchScript)
    order = [0, 1 + 2 * axes]
    for axis in range(axes):
        order.extend([1 + axis, 1 + axes + axis])
    return x.permute(order).reshape([x.shape[0], tokens.shape[-1]] + size)  # noqa: RUF005 (TorchScript)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, largest_formed: int = 256) -> Tensor:
    """softmax(Q K^T / sqrt(d) + bias of the keys) V.

    Args:
        query, key, value: (B, heads, tokens, d).
        bias: (B, tokens, 1), the same for all queries and heads.
        largest_formed: on a CPU, the number of tokens up to which the scores are formed: for many small windows the
            backward pass of its fused kernel takes several times as long.
    """
    channels = query.shape[-1]
    query = query / math.sqrt(channels)
    if bias is not None:
        # As one more channel: a mask that needs a gradient would keep the fused kernels out, at ten times the time and
        # all of the tokens x tokens memory, and where the scores are formed it would be one more pass over them.
        of_heads = bias.unsqueeze(1).to(key.dtype).expand(-1, key.shape[1], -1, -1)
        query = torch.cat([query, torch.ones_like(query[..., :1])], dim=-1)
        key = torch.cat([key, of_heads], dim=-1)
    if query.device.type == "cpu" and query.shape[-2] <= largest_formed:
        scores = torch.matmul(query, key.transpose(-1, -2))
        return torch.matmul(torch.softmax(scores, dim=-1).to(value.dtype), value)
    # The kernels on GPUs want a multiple of 8 channels, the same of all three.
    width = query.shape[-1] + -query.shape[-1] % 8
    return F.scaled_dot_product_attention(
        F.pad(query, [0, width - query.shape[-1]]),
        F.pad(key, [0, width - key.shape[-1]]),
        F.pad(value, [0, width - channels]),
        scale=1.0,
    )[..., :channels]


class AnatomyCrossAttention(nn.Module):
    """Regression features that read segmentation features on the same grid, drawn to the anatomy's edge.

    x + output(softmax(Q K^T / sqrt(d) + gamma * log(edge + epsilon)) V), with Q from the regression features and K, V
    from the segmentation features, both normalised over channels. The projections act on each voxel (1x1 convolutions).
    The output projection starts at zero, so the block starts as the identity; gamma and the other projections
    therefore get their first gradient in the second step.

    Args:
        spatial_dims: 2 or 3.
        query_channels: channels of the regression features.
        key_channels: channels of the segmentation features.
        heads: attention heads. Each has ``ceil(query_channels / heads)`` channels.
        window: None attends to the whole grid. A size in voxels, an integer or one an axis, attends inside windows
            that don't overlap, so that memory grows linearly with the volume; clipped to the grid.
        prior: whether the edge counts. Its strength ``gamma`` is learnt, from 1; 0 is attention without a prior. False
            leaves it out.
        epsilon: how much attention stays where there is no edge.

    Raises:
        BadInput: when ``window`` or ``heads`` is impossible.
    """

    def __init__(
        self,
        spatial_dims: int,
        query_channels: int,
        key_channels: int,
        heads: int = 4,
        window: PerAxis | None = None,
        prior: bool = True,
        epsilon: float = 1e-3,
    ) -> None:
        super().__init__()
        if heads < 1:
            raise BadInput(f"attention_heads: found {heads}, expected 1 or more.")
        # TorchScript needs one type; 0 stands for the whole axis.
        self.window = [0] * spatial_dims if window is None else per_axis(window, spatial_dims, "attention_window")
        self.heads = heads
        self.epsilon = epsilon
        # Finite, because an infinite one turns gradients into NaN.
        self.logit_of_padding = -1e4
        inner = heads * math.ceil(query_channels / heads)
        self.query_norm = nn.LayerNorm(query_channels)
        self.key_norm = nn.LayerNorm(key_channels)
        self.query = nn.Linear(query_channels, inner)
        self.key = nn.Linear(key_channels, inner)
        self.value = nn.Linear(key_channels, inner)
        self.output = nn.Linear(inner, query_channels)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        # Annotated here and not in the class, where TorchScript would read it.
        self.gamma: nn.Parameter | None
        self.register_parameter("gamma", nn.Parameter(torch.tensor(1.0)) if prior else None)

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, [self.heads, -1]).transpose(1, 2)

    def forward(self, query: Tensor, key: Tensor, edge: Tensor | None = None) -> Tensor:
        """The regression features after reading.

        Args:
            query: regression features (B, query_channels, *spatial).
            key: segmentation features (B, key_channels, *spatial).
            edge: (B, 1, *spatial) in [0, 1], on this grid or a finer one. Without it there is no prior.
        """
        size = query.shape[2:]
        axes = len(size)
        window = list(size)
        padded_size = list(size)
        padding: list[int] = []
        for axis in range(axes):
            if self.window[axis] > 0:
                window[axis] = min(self.window[axis], size[axis])
            excess = -size[axis] % window[axis]
            padded_size[axis] = size[axis] + excess
            padding = [0, excess] + padding  # noqa: RUF005 (TorchScript); F.pad counts axes from the last

        bias: Tensor | None = None
        gamma = self.gamma
        if gamma is not None and edge is not None:
            bias = gamma * torch.log(_to_grid(edge, list(size)).float() + self.epsilon)
        padded_query, padded_key = query, key
        if max(padding) > 0:
            if bias is None:
                bias = torch.zeros_like(query[:, :1])
            bias = F.pad(bias, padding, value=self.logit_of_padding)
            padded_query, padded_key = F.pad(query, padding), F.pad(key, padding)
        if bias is not None:
            bias = _to_windows(bias, window)

        queries = self.query_norm(_to_windows(padded_query, window))
        keys = self.key_norm(_to_windows(padded_key, window))
        read = _attend(
            self._heads(self.query(queries)), self._heads(self.key(keys)), self._heads(self.value(keys)), bias
        )
        read = _from_windows(self.output(read.transpose(1, 2).flatten(2)), padded_size, window)
        for axis in range(axes):
            read = read.narrow(2 + axis, 0, size[axis])
        return query + read.to(query.dtype)
