"""``torch.compile`` of the networks that a training changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..errors import BadInput

__all__ = ["compiled_networks"]

#: passes of a network that are trained: a whole one, and one above features that were kept
_PASSES = ("forward_all", "regress")


@contextmanager
def compiled_networks(method: nn.Module, backend: str = "inductor") -> Iterator[None]:
    """While open, the passes of a method's networks are compiled where they are part of a training step.

    Only those with gradients are: validation, moving averages and frozen teachers stay as they are, and losses do.
    Afterwards nothing of it is left in the networks.

    Args:
        method: what is trained, holding its networks.
        backend: of :func:`torch.compile`.

    Raises:
        BadInput: the method has no such network, or PyTorch can't compile it on this machine.
    """
    networks = [
        module
        for module in method.modules()
        if hasattr(module, "forward_all") and any(parameter.requires_grad for parameter in module.parameters())
    ]
    if not networks:
        raise BadInput(
            f"compile: found true, but {type(method).__name__} takes its networks' steps part by part, which is not "
            "compiled. Set compile to false."
        )
    passes = [(network, name) for network in networks for name in _PASSES if hasattr(network, name)]
    for network, name in passes:
        setattr(network, name, _compiled(network, name, backend))
    try:
        yield
    # A backward pass is compiled when it is first taken, so this may come from anywhere in a step.
    except torch._dynamo.exc.TorchDynamoException as error:
        cause = getattr(error, "inner_exception", error)  # of the backend, such as a compiler that is missing
        reason = next(iter(str(cause).strip().splitlines()), "") or type(cause).__name__
        raise BadInput(
            f"compile: PyTorch can't compile {type(networks[0]).__name__} here: {reason}. Set compile to false, or "
            "install what is missing, on a CPU usually a C++ compiler."
        ) from error
    finally:
        for network, name in passes:
            delattr(network, name)


def _compiled(network: nn.Module, name: str, backend: str) -> Callable[..., Any]:
    plain = getattr(type(network), name)
    # A step with other numbers of crops is compiled for itself, which is faster than one for all.
    compiled = torch.compile(plain, backend=backend, dynamic=False)

    def take(self: Any, x: Any, *others: Any) -> Any:
        # The one pass may be part of the other, which then is compiled with it.
        if torch.compiler.is_compiling() or not (self.training and torch.is_grad_enabled()):
            return plain(self, x, *others)
        # A compiled network leaves the order in memory to its caller.
        return compiled(self, self.encoder.lay_out(x) if isinstance(x, torch.Tensor) else x, *others)

    return MethodType(take, network)  # so a copy made meanwhile has its own weights
