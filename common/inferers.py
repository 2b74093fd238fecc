"""Sliding windows with mixed precision and test-time mirroring, as many at once as pay, and none of air alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, combinations
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from .engines.precision import precision
from .errors import BadInput

__all__ = ["SlidingWindow"]

#: voxels of all windows of a forward pass on a CPU, where more bring nothing but need more memory
VOXELS_ON_CPU = 64**3
#: share of an accelerator's free memory that windows may take
SHARE_OF_MEMORY = 0.6
#: beyond which more windows at once make no accelerator faster, while their results fill main memory
MOST_WINDOWS = 16
#: edge in voxels of the blocks whose mean says whether there is only air, however noisy
BLOCK = 4
#: logit of the background where there is only air
CERTAIN = 20.0


class SlidingWindow(SlidingWindowInferer):
    """MONAI's sliding-window inferer with Gaussian blending, as nnU-Net predicts.

    Windows go to the network's device; they are blended where the image is. An image on the CPU is so predicted on an
    accelerator that holds a few windows and nothing of the volume's size.

    Args:
        roi_size: window in voxels, the patch size of the training.
        sw_batch_size: windows a forward pass. ``"auto"``: as many as make a CPU fast, or as fit an accelerator's free
            memory, judged by one of them. It changes nothing but the order of sums.
        overlap: of neighbouring windows, as a fraction, one for all axes or one an axis.
        amp: see :func:`common.engines.precision`.
        mirror_axes: spatial axes along which windows are mirrored too; predictions of all combinations are averaged.
            Costs a factor of 2 an axis. Empty for none.
        mode: how the windows' predictions are weighted: ``"gaussian"``, or ``"constant"`` for all voxels alike.
        stride: from window to window in voxels, one number an axis; it then decides in place of ``overlap``.
        average: of ``"logits"``, or of ``"probabilities"`` for a network all of whose channels are classes; what comes
            back are the logarithms of the averages, whose softmax is those averages again.
        air: the value up to which a voxel is air, see :func:`common.transforms.air`. What lies outside the box around
            everything else, with half a window round it, is not given to the network. None predicts everywhere.
        classes: the network's first channels that are classes, background first. Outside that box the background is
            certain, and every other channel is 0.
        kwargs: everything else that MONAI's inferer takes.

    Raises:
        BadInput: ``stride`` leaves gaps or does not move, or ``average`` or ``sw_batch_size`` is another one.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        sw_batch_size: int | str = "auto",
        overlap: float | Sequence[float] = 0.5,
        amp: bool | str = "auto",
        mirror_axes: Sequence[int] = (),
        mode: str = "gaussian",
        stride: Sequence[int] | None = None,
        average: str = "logits",
        air: float | None = None,
        classes: int = 0,
        **kwargs: Any,
    ) -> None:
        self.automatic = sw_batch_size == "auto"
        if not self.automatic and not (isinstance(sw_batch_size, int) and sw_batch_size > 0):
            raise BadInput(f"inferer, sw_batch_size: found {sw_batch_size!r}, expected a number of windows or 'auto'.")
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
        super().__init__(roi_size, 1 if self.automatic else int(sw_batch_size), overlap, mode=mode, **kwargs)
        self.window = tuple(roi_size)
        self.amp = amp
        self.mirror_axes = tuple(mirror_axes)
        self.average = average
        self.air = air
        self.classes = classes

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
            return (total / len(dims) if len(dims) > 1 else total).to(home)

        box = self._box(inputs)
        place: tuple[Any, ...] = (..., *(box or ()))
        seen = inputs if box is None else inputs[place]
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            if self.automatic:
                self.sw_batch_size = self._windows_at_once(seen, partial(predict, *args, **kwargs), device)
            output = super().__call__(seen, predict, *args, **kwargs)
        assert isinstance(output, Tensor)  # as `predict` returns
        if self.average == "probabilities":
            # A class that no window sees at all has no logarithm.
            output = output.clamp_min(torch.finfo(output.dtype).tiny).log()
        if box is None:
            return output
        outside = output.new_zeros(output.shape[1])
        if self.classes:
            outside[0] = CERTAIN
        if self.average == "probabilities":
            outside = outside.log_softmax(0)
        whole = outside.reshape(1, -1, *[1] * len(box)).repeat(len(output), 1, *inputs.shape[2:])
        whole[place] = output
        return whole

    def _box(self, inputs: Tensor) -> list[slice] | None:
        """Where there is more than air in one of the volumes, with half a window round it; None is everywhere."""
        if self.air is None:
            return None
        size = inputs.shape[2:]
        axes = len(size)
        pool = F.avg_pool3d if axes == 3 else F.avg_pool2d
        blocks = [min(BLOCK, length) for length in size]
        means = pool(inputs.detach().as_subclass(Tensor).float(), blocks, ceil_mode=True, count_include_pad=False)
        solid = (means > self.air).any(dim=1).any(dim=0)
        if not solid.any():
            return None
        box = []
        for axis, (length, window, edge) in enumerate(zip(size, self.window, blocks, strict=True)):
            filled = solid.movedim(axis, 0).flatten(1).any(dim=1).nonzero()
            window = window if window > 0 else length
            margin = max(window // 2, BLOCK)
            start, stop = int(filled.min()) * edge - margin, (int(filled.max()) + 1) * edge + margin
            box.append(slice(max(0, min(start, length - window)), min(length, max(stop, window))))
        return box if any(part.stop - part.start < length for part, length in zip(box, size, strict=True)) else None

    def _windows_at_once(self, inputs: Tensor, predict: Callable[..., Tensor], device: torch.device) -> int:
        window = [w if w > 0 else length for w, length in zip(self.window, inputs.shape[2:], strict=True)]
        if device.type != "cuda":
            return max(1, VOXELS_ON_CPU // math.prod(window))
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_allocated(device)
        # What the allocator keeps for itself is free, too.
        free += torch.cuda.memory_reserved(device) - held
        torch.cuda.reset_peak_memory_stats(device)
        result = predict(inputs.new_zeros(1, inputs.shape[1], *window))
        needed = max(1, torch.cuda.max_memory_allocated(device) - held)
        if inputs.device.type == "cuda":
            # Blended there, too: the sums and their quotient, in float32.
            free -= 2 * 4 * len(inputs) * result.shape[1] * math.prod(inputs.shape[2:])
        return min(MOST_WINDOWS, max(1, int(SHARE_OF_MEMORY * free / needed)))
