"""A network that segments and measures: one encoder, a segmentation decoder, and a regression decoder that reads it.

The regression decoder has the segmentation decoder's topology and reads its features through cross-attention drawn to
the anatomy's edge. Encoder and segmentation decoder bear the names they have in the segmentation network, so they can
be handed over from it and locked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..switches import is_on
from .attention import AnatomyCrossAttention, _check_kernel, _soft_edges
from .unet import Decoder, Encoder, PerAxis

__all__ = ["DualDecoderNetwork", "RegressionDecoder", "RegressionNetwork"]

KINDS = ("dense", "sum", "mean")
# A sum collects its value from many voxels, so one voxel's share starts this much smaller than the whole.
SHARE_OF_SUM = 1e-4


def _check_targets(targets: Sequence[Mapping[str, Any]]) -> None:
    names = [target.get("name") for target in targets]
    if not targets or not all(names) or len(set(names)) != len(names):
        raise BadInput(f"targets: found names {names}, expected at least one target, each with a name of its own.")
    for target in targets:
        kind, scale = target.get("kind", "dense"), target.get("scale", 1.0)
        if kind not in KINDS:
            raise BadInput(f"targets, {target['name']!r}: found kind {kind!r}, expected one of {', '.join(KINDS)}.")
        for key, size in (("scale", scale), ("head_scale", target.get("head_scale", 1.0))):
            if not isinstance(size, int | float) or not (math.isfinite(size) and size > 0):
                raise BadInput(
                    f"targets, {target['name']!r}: found {key} {size!r}, expected a positive number, a typical value "
                    "in the target's unit."
                )


def _head_scale(target: Mapping[str, Any]) -> float:
    share = SHARE_OF_SUM if target.get("kind", "dense") == "sum" else 1.0
    return float(target.get("head_scale", share * target.get("scale", 1.0)))


def _windows(window: PerAxis | Sequence[PerAxis | None] | None, stages: Sequence[int]) -> list[PerAxis | None]:
    """One window an attention stage; a list that holds a list or None is one already."""
    if isinstance(window, Sequence) and any(entry is None or isinstance(entry, Sequence) for entry in window):
        if len(window) != len(stages):
            raise BadInput(
                f"attention_window: found {len(window)} entries, expected one for each of the attention_stages "
                f"{list(stages)}, or a single window for all of them."
            )
        return list(window)
    return [cast("PerAxis | None", window)] * len(stages)


class _NoAttention(nn.Module):
    """Stands where a stage has no attention."""

    def forward(self, query: Tensor, key: Tensor, edge: Tensor | None = None) -> Tensor:
        return query


class RegressionDecoder(Decoder):
    """A :class:`Decoder` for regression: cross-attention after chosen stages, outputs in the targets' units.

    Args:
        encoder: gives the channels, kernel sizes and strides. It is only read, not kept.
        targets: descriptions of the targets, in the order of the output channels. ``scale`` (default 1) is a typical
            value, by which the head is multiplied; ``offset`` (default 0) is added; ``head_scale`` says what the head
            is multiplied by where that differs: for a target of kind ``sum`` it is a voxel's typical share of the sum
            (default ``scale`` / 10 000).
        heteroscedastic: whether each target also gets a log-variance channel, of the variance in the unit squared.
        attention_stages: stages followed by cross-attention, 0 the highest resolution.
        attention_heads: heads of the attention.
        attention_window: None for full attention, a window for all stages, or a list with one of these a stage.
        prior: whether attention is drawn to the edge.
        convolutions_per_stage: convolution blocks in a stage.
        dropout: probability of dropping a channel after a convolution.
        width: channels of a stage as a share of the encoder's.
        last_stage: the stage to end at; outputs of a coarser one than 0 are interpolated to the full resolution.

    Raises:
        BadInput: when a target, a stage or the width is impossible.
    """

    def __init__(
        self,
        encoder: Encoder,
        targets: Sequence[Mapping[str, Any]],
        heteroscedastic: bool = False,
        attention_stages: Sequence[int] = (),
        attention_heads: int = 4,
        attention_window: PerAxis | Sequence[PerAxis | None] | None = None,
        prior: bool = True,
        convolutions_per_stage: int = 2,
        dropout: float = 0.0,
        width: float = 1.0,
        last_stage: int = 0,
    ) -> None:
        _check_targets(targets)
        outputs = len(targets) * (2 if heteroscedastic else 1)
        super().__init__(encoder, outputs, convolutions_per_stage, dropout, False, width, last_stage)
        stages = last_stage + len(self.stages)
        possible = set(range(last_stage, stages))
        if len(set(attention_stages)) != len(attention_stages) or not set(attention_stages) <= possible:
            raise BadInput(
                f"attention_stages: found {list(attention_stages)}, expected different decoder stages out of "
                f"{last_stage} (highest resolution) to {stages - 1}. Change the list to the network's depth."
            )
        window_of = dict(zip(attention_stages, _windows(attention_window, attention_stages), strict=True))
        self.attention = nn.ModuleList(
            AnatomyCrossAttention(
                encoder.spatial_dims, channels, read, attention_heads, window_of[stages - 1 - index], prior
            )
            if stages - 1 - index in window_of
            else _NoAttention()
            for index, (channels, read) in enumerate(zip(self.features, encoder.features[-2::-1], strict=False))
        )
        scales = [_head_scale(target) for target in targets]
        shifts = [float(target.get("offset", 0.0)) for target in targets]
        if heteroscedastic:
            shifts += [2 * math.log(scale) for scale in scales]
            scales += [1.0] * len(targets)
        shape = [1, outputs] + [1] * encoder.spatial_dims
        # Decisions of the config, not weights: a state dict that carried them would overrule the config.
        # Annotated here and not in the class, where TorchScript would read it.
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", torch.tensor(scales).reshape(shape), persistent=False)
        self.register_buffer("shift", torch.tensor(shifts).reshape(shape), persistent=False)

    def forward(
        self, features: list[Tensor], segmentation: list[Tensor] | None = None, edge: Tensor | None = None
    ) -> list[Tensor]:
        """Decoded features, low to high resolution.

        Args:
            features: the encoder's features, high to low resolution.
            segmentation: the segmentation decoder's decoded features, low to high resolution, which attention reads.
            edge: (B, 1, *spatial) in [0, 1] at the image's resolution, or at a coarser one that no stage with attention
                exceeds.
        """
        x = features[-1]
        decoded: list[Tensor] = []
        for index, (upsample, stage, attention) in enumerate(
            zip(self.upsampling, self.stages, self.attention)  # noqa: B905 (TorchScript)
        ):
            x = stage(torch.cat([upsample(x), features[-2 - index]], dim=1))
            if segmentation is not None:
                x = attention(x, segmentation[index], edge)
            decoded.append(x)
        return decoded

    @torch.jit.unused
    def needed(self, features: list[Tensor], segmentation: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The first two arguments of :meth:`forward`, with empty tensors in place of those that it doesn't read."""
        nothing = features[-1].new_empty(0)
        unread = len(features) - 1 - len(self.stages)
        attending = [not isinstance(attention, _NoAttention) for attention in self.attention]
        attending += [False] * (len(segmentation) - len(attending))
        return [nothing] * unread + features[unread:], [
            stage if attends else nothing for stage, attends in zip(segmentation, attending, strict=True)
        ]

    def measure(self, decoded: list[Tensor]) -> Tensor:
        """The outputs in the targets' units, (B, R or 2R, *spatial): values, then log-variances."""
        return self.full_resolution(decoded) * self.scale + self.shift


def _cell_means(x: Tensor, cell: list[int]) -> Tensor:
    """Means of (B, C, *spatial) over cells of so many voxels an axis, of which the size is a multiple."""
    # An axis at a time: a fifth of the time that average pooling takes on a CPU.
    for axis, length in enumerate(cell):
        if length > 1:
            parts = x.unflatten(2 + axis, [-1, length]).unbind(3 + axis)
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            x = total / length
    return x


def is_locked(part: nn.Module) -> bool:
    """Whether no parameter of a part is trained."""
    return not any(parameter.requires_grad for parameter in part.parameters())


class DualDecoderNetwork(nn.Module):
    """``encoder``, ``segmentation_decoder`` and ``regression_decoder`` in one network with one output tensor.

    Where all parameters of the encoder, or of the encoder and the segmentation decoder, are frozen, these run without
    autograd, which saves their activations.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: number of classes K, background included.
        features: channels of each stage, highest resolution first.
        kernel_sizes: odd kernel size of each stage, an integer or one an axis.
        strides: stride of each stage's first convolution, an integer or one an axis.
        targets: descriptions of the R regression targets; see :class:`RegressionDecoder`.
        attention_stages: decoder stages followed by cross-attention, 0 the highest resolution. Empty leaves it out.
        attention_heads: heads of the attention.
        attention_window: None for full attention, a window (an integer or one an axis) for all stages, or a list that
            holds one of these a stage, such as ``[[4, 4, 4], None]``.
        prior: whether attention is drawn to the structures' edges.
        edge_classes: classes whose edges count. None is all but the background.
        edge_kernel: odd size of the pooling that finds edges, an integer or one an axis, in voxels of the stage above
            the finest one with attention.
        heteroscedastic: whether each target also gets a log-variance channel.
        convolutions_per_stage: convolution blocks in a stage.
        dropout: probability of dropping a channel after a convolution.
        regression_width: channels of the regression decoder's stages as a share of the others'.
        regression_convolutions: convolution blocks in a stage of the regression decoder; None is as many as elsewhere.
        regression_stage: the decoder stage that the regression decoder ends at, 0 the full resolution; from a coarser
            one its values are interpolated. Attention is at this stage or coarser ones.
        segmentation_gradient: whether the regression's gradient reaches the segmentation decoder through attention. It
            always reaches an encoder that isn't frozen.
        channels_last: the order of features in memory, see :class:`.layout.ChannelsLast`.

    Raises:
        BadInput: when arguments are impossible or disagree; in use, when the image's size isn't a multiple of
            ``divisor``.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int],
        kernel_sizes: Sequence[PerAxis],
        strides: Sequence[PerAxis],
        targets: Sequence[Mapping[str, Any]],
        attention_stages: Sequence[int] = (2,),
        attention_heads: int = 4,
        attention_window: PerAxis | Sequence[PerAxis | None] | None = None,
        prior: bool = True,
        edge_classes: Sequence[int] | None = None,
        edge_kernel: PerAxis = 3,
        heteroscedastic: bool = False,
        convolutions_per_stage: int = 2,
        dropout: float = 0.0,
        regression_width: float = 1.0,
        regression_convolutions: int | None = None,
        regression_stage: int = 0,
        segmentation_gradient: bool = True,
        channels_last: bool | None = None,
    ) -> None:
        super().__init__()
        prior = is_on(prior, "prior")
        self.encoder = Encoder(
            spatial_dims, in_channels, features, kernel_sizes, strides, convolutions_per_stage, dropout, channels_last
        )
        self.divisor = self.encoder.divisor
        self.segmentation_decoder = Decoder(self.encoder, out_channels, convolutions_per_stage, dropout)
        self.regression_decoder = RegressionDecoder(
            self.encoder,
            targets,
            heteroscedastic,
            attention_stages,
            attention_heads,
            attention_window,
            prior,
            convolutions_per_stage if regression_convolutions is None else regression_convolutions,
            dropout,
            regression_width,
            regression_stage,
        )
        self.edge_classes = list(range(1, out_channels)) if edge_classes is None else list(edge_classes)
        self.edge_kernel = _check_kernel(edge_kernel, spatial_dims)
        # Edges are found at twice the resolution of the finest stage that attends: fine enough for its grid.
        above = self.encoder.strides[1 : min(attention_stages, default=0)]
        self.edge_cell = [math.prod(stride[axis] for stride in above) for axis in range(spatial_dims)]
        self.needs_edge = prior and len(attention_stages) > 0
        self.segmentation_gradient = segmentation_gradient
        if self.needs_edge and not (self.edge_classes and set(self.edge_classes) <= set(range(out_channels))):
            raise BadInput(
                f"edge_classes: found {self.edge_classes}, expected at least one class out of 0 to "
                f"{out_channels - 1}. Name the classes whose edges matter, or set prior to false."
            )
        # TorchScript can't type an empty list.
        self.edge_classes = self.edge_classes or [0]

    def _encode(self, x: Tensor) -> list[Tensor]:
        if torch.jit.is_scripting():
            return self.encoder(x)
        else:
            self.encoder.check_size(x)
            # An image that needs a gradient itself (a saliency map) keeps the graph.
            needed = x.requires_grad or not is_locked(self.encoder)
            with torch.set_grad_enabled(torch.is_grad_enabled() and needed):
                return self.encoder(x)

    def _segment(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if torch.jit.is_scripting():
            decoded = self.segmentation_decoder(features)
            return decoded, self.segmentation_decoder.logits(decoded)
        else:
            needed = features[-1].requires_grad or not is_locked(self.segmentation_decoder)
            with torch.set_grad_enabled(torch.is_grad_enabled() and needed):
                decoded = self.segmentation_decoder(features)
                return decoded, self.segmentation_decoder.logits(decoded)

    def read(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor | None]:
        """What encoder and segmentation decoder make of an image (B, C, *spatial).

        Returns:
            The encoder's features (high to low resolution), the segmentation logits of all decoder stages (high to low
            resolution), and for :meth:`regress` the decoded features (low to high resolution) and the edges.
        """
        features = self._encode(x)
        decoded, logits = self._segment(features)
        scores = logits[0]
        if not self.segmentation_gradient:
            decoded, scores = [stage.detach() for stage in decoded], scores.detach()
        edge: Tensor | None = None
        if self.needs_edge:
            probabilities = _cell_means(torch.softmax(scores, dim=1), self.edge_cell)
            edge = _soft_edges(probabilities, self.edge_classes, self.edge_kernel)
        return features, logits, decoded, edge

    def regress(self, features: list[Tensor], decoded: list[Tensor], edge: Tensor | None) -> Tensor:
        """The regression (B, R or 2R, *spatial) in the targets' units, from what :meth:`read` gave."""
        return self.regression_decoder.measure(self.regression_decoder(features, decoded, edge))

    def forward_all(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """For training: what the parts return.

        Returns:
            The encoder's features (high to low resolution), the segmentation logits of all decoder stages (high to low
            resolution), and the regression (B, R or 2R, *spatial) in the targets' units.
        """
        features, logits, decoded, edge = self.read(x)
        return features, logits, self.regress(features, decoded, edge)

    def forward(self, x: Tensor) -> Tensor:
        """K segmentation logits, R regression channels, then R log-variances if heteroscedastic, in one tensor.

        Args:
            x: image (B, C, *spatial).

        Returns:
            (B, K + R or K + 2R, *spatial).
        """
        _, logits, regression = self.forward_all(x)
        return torch.cat([logits[0], regression], dim=1)


class RegressionNetwork(nn.Module):
    """Regression on its own, to compare with: ``encoder`` and ``regression_decoder``, no segmentation, no attention.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        features: channels of each stage, highest resolution first.
        kernel_sizes: odd kernel size of each stage, an integer or one an axis.
        strides: stride of each stage's first convolution, an integer or one an axis.
        targets: descriptions of the R regression targets; see :class:`RegressionDecoder`.
        heteroscedastic: whether each target also gets a log-variance channel.
        convolutions_per_stage: convolution blocks in a stage.
        dropout: probability of dropping a channel after a convolution.
        channels_last: the order of features in memory, see :class:`.layout.ChannelsLast`.

    Raises:
        BadInput: as :class:`DualDecoderNetwork`.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        features: Sequence[int],
        kernel_sizes: Sequence[PerAxis],
        strides: Sequence[PerAxis],
        targets: Sequence[Mapping[str, Any]],
        heteroscedastic: bool = False,
        convolutions_per_stage: int = 2,
        dropout: float = 0.0,
        channels_last: bool | None = None,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(
            spatial_dims, in_channels, features, kernel_sizes, strides, convolutions_per_stage, dropout, channels_last
        )
        self.divisor = self.encoder.divisor
        self.regression_decoder = RegressionDecoder(
            self.encoder,
            targets,
            heteroscedastic,
            convolutions_per_stage=convolutions_per_stage,
            dropout=dropout,
        )

    def forward_all(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """As that of :class:`DualDecoderNetwork`, with an empty list of segmentation logits."""
        if not torch.jit.is_scripting():
            self.encoder.check_size(x)
        features = self.encoder(x)
        logits: list[Tensor] = []
        return features, logits, self.regression_decoder.measure(self.regression_decoder(features))

    def forward(self, x: Tensor) -> Tensor:
        """Regression (B, R or 2R, *spatial) in the targets' units, of an image (B, C, *spatial)."""
        return self.forward_all(x)[2]
