"""Weights that pass from stage to stage by name: reading, checking, handing over, saving and a fingerprint of them."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..files import write_atomically

__all__ = ["check_finite", "hand_over", "load_frozen", "read_record", "read_weights", "save_weights", "state_digest"]

SHOWN = 10


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict's names, dtypes, shapes and bytes, whatever the order, device or memory layout."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_finite(state: Mapping[str, Tensor], source: str = "weights") -> None:
    """Raise :class:`BadInput` that names the first entry of ``state`` with a NaN or an infinity in it."""
    for name, value in state.items():
        if (value.is_floating_point() or value.is_complex()) and not bool(torch.isfinite(value).all()):
            raise BadInput(
                f"{source}: found a NaN or infinite number in {name!r}, expected finite weights: the training that "
                "made them diverged. Use an earlier checkpoint, or train again with a lower learning_rate."
            )


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a weights file, on the CPU.

    Args:
        path: a file with ``{"model": state_dict}`` or a plain state dict.

    Raises:
        BadInput: when the file is missing, unreadable, damaged, or holds something else.
    """
    if path is None or not Path(path).is_file():
        raise BadInput(
            f"{path}: no such weights file. Train the stage that writes it first (models/model.pt of its bundle), or "
            "give the path of another one."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises on a damaged file ranges from EOFError to UnpicklingError
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(
            f"{path}: can't be read as weights ({reason[0][:200]}), expected a file written by torch.save that holds "
            "tensors only. It may be cut short or damaged: copy it again, or train that stage again."
        ) from error
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        found = f"the keys {sorted(map(str, state))[:SHOWN]}" if isinstance(state, Mapping) else type(state).__name__
        raise BadInput(
            f'{path}: found {found}, expected {{"model": state_dict}} or a state dict of tensors. Give the '
            "models/model.pt that a bundle's training wrote."
        )
    for name, value in state.items():
        fault = _fault(name, value)
        if fault:
            raise BadInput(
                f"{path}: {str(name)[:200]!r} is {fault}, expected plain tensors of numbers by name. Give the "
                "models/model.pt that a bundle's training wrote."
            )
    return dict(state)


def _fault(name: object, value: Tensor) -> str | None:
    """What makes an entry none that a network could hold, although torch loads it."""
    if not isinstance(name, str):
        return "no name"
    if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.device.type != "cpu":
        return f"a tensor of another kind ({value.dtype}, {value.layout}, {value.device.type})"
    stored = value.untyped_storage().nbytes()
    if value.numel() * value.element_size() > stored:
        return f"a tensor of {value.numel()} numbers that stores {stored} bytes"
    return None


def _listing(title: str, entries: Sequence[str]) -> str:
    if not entries:
        return ""
    more = [f"... and {len(entries) - SHOWN} more"] if len(entries) > SHOWN else []
    return "\n  ".join([f"\n{title} ({len(entries)}):", *entries[:SHOWN], *more])


def _belongs(name: str, parts: Sequence[str] | None) -> bool:
    return parts is None or any(name.startswith(f"{part}.") for part in parts)


def read_record(model_path: str | Path) -> dict[str, Any]:
    """The record ``model.json`` beside some weights; empty when there is none, or when it is about other weights.

    Raises:
        BadInput: the weights can't be read.
    """
    digest = state_digest(read_weights(model_path))
    try:
        record = json.loads(Path(model_path).with_suffix(".json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    known = isinstance(record, dict) and record.get("weights") == digest
    return record if known and isinstance(record.get("config", {}), dict) else {}


def hand_over(
    network: nn.Module,
    weights: str | os.PathLike[str] | Mapping[str, Tensor],
    parts: Sequence[str] | None = None,
    source: str = "weights",
) -> str:
    """Load weights into a network by name; all of them must fit.

    Args:
        network: is changed in place, or not at all.
        weights: a weights file, or a state dict.
        parts: the submodules to load, for instance ``("encoder", "segmentation_decoder")``; what else the network or
            the weights hold is left alone. None loads everything.
        source: what the weights are called in error messages, for instance "teacher weights".

    Returns:
        The :func:`state_digest` of what was loaded, as the network holds it.

    Raises:
        BadInput: when entries are missing, extra, of another shape or not finite.
    """
    if isinstance(weights, Mapping):
        state, origin = weights, source
    else:
        state, origin = read_weights(weights), f"{source} {os.fspath(weights)}"
    own = network.state_dict()
    for part in parts or ():
        if not any(_belongs(name, (part,)) for name in own):
            names = [name for name, _ in network.named_children()]
            raise BadInput(f"{origin}: the part {part!r} isn't in the network. It has {', '.join(names)}.")
    wanted = {name: value for name, value in own.items() if _belongs(name, parts)}
    given = {name: value for name, value in state.items() if _belongs(name, parts)}
    missing = [name for name in wanted if name not in given]
    extra = [name for name in given if name not in wanted]
    reshaped = [
        f"{name}: {tuple(given[name].shape)} in the weights, {tuple(value.shape)} in the network"
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    ]
    if missing or extra or reshaped:
        raise BadInput(
            f"{origin}: they don't fit this network."
            + _listing("of another shape", reshaped)
            + _listing("missing from the weights", missing)
            + _listing("in the weights but not in the network", extra)
            + "\nThey come from a run with other classes, channels or widths: use the plan and config of that run "
            "here, or train that stage again with this one."
        )
    check_finite(given, origin)
    network.load_state_dict(given, strict=False)
    now = network.state_dict()
    return state_digest({name: now[name] for name in wanted})


def load_frozen(network: nn.Module, weights: str | os.PathLike[str] | Mapping[str, Tensor], source: str) -> nn.Module:
    """A network that only answers: weights loaded by :func:`hand_over`, no gradients, evaluation mode."""
    hand_over(network, weights, source=source)
    return network.requires_grad_(False).eval()


def save_weights(network: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write ``{"model": state_dict}`` with all tensors on the CPU; the old file stays whole until the new one is.

    Args:
        network: a network or a state dict.
        path: the file to write. Its folder is made if need be.

    Raises:
        BadInput: when a weight isn't finite, or the file can't be written (a full disk); an old file is then as it was.
    """
    state = network.state_dict() if isinstance(network, nn.Module) else network
    check_finite(state, f"weights for {path}")
    buffer = io.BytesIO()
    # Clones, because torch.save writes the whole storage behind a view.
    copies = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    torch.save({"model": copies}, buffer)
    write_atomically(path, buffer.getbuffer())
