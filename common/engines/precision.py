"""Which number format autocast uses on which device."""

from __future__ import annotations

import torch

from ..errors import BadInput

__all__ = ["precision"]

_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _cpu_multiplies_bf16() -> bool:
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check and check())


def precision(amp: bool | str, device: str | torch.device) -> torch.dtype | None:
    """The dtype for autocast, or None for full precision.

    Args:
        amp: ``false``; ``"auto"`` (bf16 where the device multiplies it in hardware, fp16 on older GPUs, full precision
            on older CPUs); ``true`` (like auto, but bf16 on any CPU); ``"bf16"`` or ``"fp16"``.
        device: where the network runs.

    Raises:
        BadInput: another value, or fp16 on a CPU, whose gradients would need a scaler that is made for GPUs.
    """
    kind = torch.device(device).type
    if isinstance(amp, str) and amp.lower() in ("true", "false"):
        amp = amp.lower() == "true"
    if amp is False:
        return None
    if amp is True or amp == "auto":
        if kind == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if amp is True or _cpu_multiplies_bf16() else None
    if amp not in _NAMES:
        raise BadInput(f"amp: found {amp!r}, expected true, false, 'auto', 'bf16' or 'fp16'.")
    if amp == "fp16" and kind == "cpu":
        raise BadInput("amp: 'fp16' needs a GPU; use 'bf16', 'auto' or false on a CPU.")
    return _NAMES[amp]
