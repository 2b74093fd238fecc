"""Sliding windows with mixed precision and test-time mirroring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, combinations
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor

from .engines.precision import precision

__all__ = ["SlidingWindow"]


class SlidingWindow(SlidingWindowInferer):
    """MONAI's sliding-window inferer with Gaussian blending, as nnU-Net predicts.

    Args:
        roi_size: window in voxels, the patch size of the training.
        sw_batch_size: windows a forward pass.
        overlap: of neighbouring windows, as a fraction.
        amp: see :func:`common.engines.precision`.
        mirror_axes: spatial axes along which windows are mirrored too; predictions of all combinations are averaged.
            Costs a factor of 2 an axis. Empty for none.
        kwargs: everything else that MONAI's inferer takes.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        sw_batch_size: int = 2,
        overlap: float = 0.5,
        amp: bool | str = "auto",
        mirror_axes: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(roi_size, sw_batch_size, overlap, mode="gaussian", **kwargs)
        self.amp = amp
        self.mirror_axes = tuple(mirror_axes)

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Predict a batch of volumes (B, C, *spatial)."""
        dtype = precision(self.amp, inputs.device)
        flips = chain.from_iterable(combinations(self.mirror_axes, n) for n in range(len(self.mirror_axes) + 1))
        dims = [[axis + 2 for axis in axes] for axes in flips]

        def predict(window: Tensor, *more: Any, **named: Any) -> Tensor:
            total = network(window, *more, **named)
            for axes in dims[1:]:
                total = total + network(window.flip(axes), *more, **named).flip(axes)
            return total / len(dims)

        with torch.autocast(inputs.device.type, dtype, enabled=dtype is not None):
            return super().__call__(inputs, predict, *args, **kwargs)
