"""``torch.compile`` of the networks that a training changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput

__all__ = ["compiled_networks"]


@contextmanager
def compiled_networks(method: nn.Module, backend: str = "inductor") -> Iterator[None]:
    """While open, ``forward_all`` of a method's networks is compiled where it is part of a training step.

    Only passes with gradients are: validation, moving averages and frozen teachers stay as they are, and losses do.
    Afterwards nothing of it is left in the networks, which can be copied and exported as before.

    Args:
        method: what is trained, holding its networks.
        backend: of :func:`torch.compile`.

    Raises:
        BadInput: the method has no such network; in use, when PyTorch can't compile it on this machine.
    """
    networks: list[Any] = [
        module
        for module in method.modules()
        if hasattr(module, "forward_all") and any(parameter.requires_grad for parameter in module.parameters())
    ]
    if not networks:
        raise BadInput(
            f"compile: found true, but {type(method).__name__} takes its networks' steps part by part, which is not "
            "compiled. Set compile to false."
        )
    for network in networks:
        network.forward_all = _compiled(network, backend)
    try:
        yield
    finally:
        for network in networks:
            del network.forward_all


def _compiled(network: Any, backend: str) -> Callable[[Tensor], Any]:
    plain = network.forward_all
    # A step with other numbers of crops is compiled for itself, which is faster than one for all.
    compiled = torch.compile(plain, backend=backend, dynamic=False)

    def forward_all(x: Tensor) -> Any:
        if not (network.training and torch.is_grad_enabled()):
            return plain(x)
        try:
            return compiled(network.encoder.lay_out(x))  # which a compiled network leaves to its caller
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = getattr(error, "inner_exception", error)  # of the backend, such as a compiler that is missing
            reason = next(iter(str(cause).strip().splitlines()), "") or type(cause).__name__
            raise BadInput(
                f"compile: PyTorch can't compile {type(network).__name__} here: {reason}. Set compile to false, or "
                "install what is missing, on a CPU usually a C++ compiler."
            ) from error

    return forward_all
