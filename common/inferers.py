"""Sliding windows with mixed precision and test-time mirroring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, combinations
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from .engines.precision import precision
from .errors import BadInput

__all__ = ["SlidingWindow"]


class SlidingWindow(SlidingWindowInferer):
    """MONAI's sliding-window inferer with Gaussian blending, as nnU-Net predicts.

    Windows go to the network's device; they are blended where the image is. An image on the CPU is so predicted on an
    accelerator that holds a few windows and nothing of the volume's size.

    Args:
        roi_size: window in voxels, the patch size of the training.
        sw_batch_size: windows a forward pass.
        overlap: of neighbouring windows, as a fraction, one for all axes or one an axis.
        amp: see :func:`common.engines.precision`.
        mirror_axes: spatial axes along which windows are mirrored too; predictions of all combinations are averaged.
            Costs a factor of 2 an axis. Empty for none.
        mode: how the windows' predictions are weighted: ``"gaussian"``, or ``"constant"`` for all voxels alike.
        stride: from window to window in voxels, one number an axis; it then decides in place of ``overlap``.
        average: of ``"logits"``, or of ``"probabilities"`` for a network all of whose channels are classes; what comes
            back are the logarithms of the averages, whose softmax is those averages again.
        kwargs: everything else that MONAI's inferer takes.

    Raises:
        BadInput: ``stride`` leaves gaps or does not move, or ``average`` is another one.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        sw_batch_size: int = 2,
        overlap: float | Sequence[float] = 0.5,
        amp: bool | str = "auto",
        mirror_axes: Sequence[int] = (),
        mode: str = "gaussian",
        stride: Sequence[int] | None = None,
        average: str = "logits",
        **kwargs: Any,
    ) -> None:
        if average not in ("logits", "probabilities"):
            raise BadInput(f"inferer, average: found {average!r}, expected 'logits' or 'probabilities'.")
        if stride is not None:
            if len(stride) != len(roi_size) or not all(1 <= s <= r for s, r in zip(stride, roi_size, strict=False)):
                raise BadInput(
                    f"inferer, stride: found {list(stride)}, expected a number of voxels an axis from 1 to the "
                    f"window's size {list(roi_size)}."
                )
            # MONAI cuts window * (1 - overlap) off to whole voxels; half a voxel more keeps rounding from losing one.
            overlap = [max(0.0, 1 - (s + 0.5) / r) for s, r in zip(stride, roi_size, strict=True)]
        super().__init__(roi_size, sw_batch_size, overlap, mode=mode, **kwargs)
        self.amp = amp
        self.mirror_axes = tuple(mirror_axes)
        self.average = average

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Predict a batch of volumes (B, C, *spatial); the result is on their device."""
        weight = next(network.parameters(), inputs) if isinstance(network, nn.Module) else inputs
        device = weight.device
        dtype = precision(self.amp, device)
        flips = chain.from_iterable(combinations(self.mirror_axes, n) for n in range(len(self.mirror_axes) + 1))
        dims = [[axis + 2 for axis in axes] for axes in flips]

        def once(window: Tensor, *more: Any, **named: Any) -> Tensor:
            output = network(window, *more, **named)
            return output.float().softmax(1) if self.average == "probabilities" else output

        def predict(window: Tensor, *more: Any, **named: Any) -> Tensor:
            home, window = window.device, window.to(device)
            total = once(window, *more, **named)
            for axes in dims[1:]:
                total = total + once(window.flip(axes), *more, **named).flip(axes)
            return (total / len(dims)).to(home)

        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            output = super().__call__(inputs, predict, *args, **kwargs)
        assert isinstance(output, Tensor)  # as `predict` returns
        # A class that no window sees at all has no logarithm.
        return output.clamp_min(torch.finfo(output.dtype).tiny).log() if self.average == "probabilities" else output
