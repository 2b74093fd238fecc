"""Fully supervised segmentation by the recipe of nnU-Net v2 (Isensee et al., Nature Methods 2021)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..losses import SegmentationLoss
from .base import Method, Segmenter

__all__ = ["Supervised"]


class Supervised(Method):
    """Dice and cross-entropy with deep supervision on the labelled stream.

    Args:
        network: a :class:`~common.networks.SegmentationNetwork`.
        segmentation_loss: compares its logits at every scale with the label.
    """

    def __init__(self, network: Segmenter, segmentation_loss: SegmentationLoss | None = None) -> None:
        super().__init__()
        self.network = network
        self.segmentation_loss = segmentation_loss or SegmentationLoss()

    def forward(self, batch: Mapping[str, Mapping[str, Tensor]], optimizer: str = "") -> dict[str, Tensor]:
        labeled = batch["labeled"]
        _, logits = self.network.forward_all(labeled["image"])
        loss = self.supervise(logits, labeled)
        return {"loss": loss, "segmentation": loss}
