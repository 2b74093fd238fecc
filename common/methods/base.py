"""What the engine asks of a method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import BadInput
from ..losses import unknown_classes
from ..networks import SegmentationNetwork
from ..networks.dynamic_convolution import anneal
from ..networks.vnet import VNet

__all__ = ["Method", "Segmenter", "refuse_partial_labels"]

#: networks whose ``forward_all`` gives the features and the logits of all levels
Segmenter = SegmentationNetwork | VNet


def refuse_partial_labels(labeled: Mapping[str, Any], num_classes: int, what: str) -> None:
    """Raise :class:`BadInput` when a labelled batch has cases that label only some of the structures."""
    unknown = unknown_classes(labeled.get("annotated"), len(labeled["label"]), num_classes)
    if unknown is not None and unknown.any():
        raise BadInput(
            f"annotated: cases that label only some of the structures can't be used with {what}. Leave them out of "
            "`training`, or choose another method."
        )


class Method(nn.Module):
    """A training method: the networks it holds, what it asks of a batch, its losses and its update rule.

    A method is a module, so that moving to a device, checkpoints and DistributedDataParallel need nothing special:
    whatever it must remember when a run is resumed is a submodule, a parameter or a buffer.

    Subclasses write :meth:`forward`, and :meth:`after_step` where weights move by other means than an optimiser
    (moving averages). Modules named in :attr:`frozen` never train: no gradients, always in eval mode.
    """

    #: fraction of the run in which dynamic convolutions, if a network has any, reach the temperature 1. ASE-Net's paper
    #: gives no length; a tenth is that of Chen et al., CVPR 2020.
    annealing: float = 0.1
    #: names of submodules that are never trained
    frozen: tuple[str, ...] = ()
    segmentation_loss: Callable[..., Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.total_steps = 1

    def progress(self, step: int, total_steps: int) -> None:
        """Called by the engine before every step: lowers the temperature of dynamic convolutions, where there are any.

        Args:
            step: number of steps done, counted over the whole run.
            total_steps: number of steps of the whole run.
        """
        self.step, self.total_steps = step, max(total_steps, 1)
        end = self.annealing * self.total_steps
        anneal(self, self.step / end if end > 0 else 1.0, self._frozen_modules())

    @property
    def deployed(self) -> nn.Module:
        """The network to validate and to write: a method's ``network``, unless it says otherwise."""
        return self.get_submodule("network")

    def forward(self, batch: Mapping[str, Mapping[str, Any]], optimizer: str = "") -> dict[str, Tensor]:
        """The losses of one batch.

        Args:
            batch: batches by stream: ``labeled`` and, where the method learns from them, ``unlabeled`` and ``case``.
            optimizer: which optimiser will take the step, for methods that have several.

        Returns:
            ``loss``, the scalar to minimise, and every other number worth logging: each term unweighted, the fraction
            of voxels kept as ``kept/<class>``.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what its losses are.")

    def supervise(self, logits: Sequence[Tensor], labeled: Mapping[str, Any]) -> Tensor:
        """``segmentation_loss`` of the labelled crops, which know only the structures that they are annotated for.

        Args:
            logits: (B, K, *spatial) each, high to low resolution; the labelled crops come first in the batch.
            labeled: the labelled stream's batch.
        """
        label = labeled["label"]
        outputs = [level[: label.shape[0]] for level in logits]
        # Only where it matters, so that a config may name any other loss of logits and label.
        annotated = {"annotated": labeled["annotated"]} if labeled.get("annotated") else {}
        return self.segmentation_loss(outputs, label, **annotated)

    def after_step(self) -> None:
        """Called by the engine after every step."""

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters for the optimiser: those that want gradients."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _frozen_modules(self) -> Iterator[nn.Module]:
        for name in self.frozen:
            module = getattr(self, name)
            if module is not None:
                yield module

    def train(self, mode: bool = True) -> Method:
        """Switch to training or evaluation mode; frozen networks stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def freeze(self) -> None:
        """Take gradients away from the networks named in :attr:`frozen`."""
        for module in self._frozen_modules():
            module.requires_grad_(False).eval()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # without overloads
        """All weights but the frozen ones, which never change and are read again from their own file."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for name in [n for n in state if n.startswith(tuple(f"{prefix}{frozen}." for frozen in self.frozen))]:
            del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Read back what :meth:`state_dict` gave; frozen networks keep their weights."""
        own = {**super().state_dict(), **state_dict} if self.frozen else state_dict
        return super().load_state_dict(own, strict=strict, assign=assign)
