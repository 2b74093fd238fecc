"""BCP: bidirectional copy-paste (Bai et al., "Bidirectional copy-paste for semi-supervised medical image segmentation",
CVPR 2023).

A box of a labelled crop is pasted into an unlabelled crop and the other way round, and the network learns both
mixtures: the labelled voxels with their label, the others with the pseudo-label of its own moving average. So labelled
and unlabelled anatomy lie in one image and are learnt alike. Before that, labelled crops are pasted into one another.

Both are one run with one schedule of the learning rate, and the network goes on as it is; the paper has two trainings
and starts the second from the best weights of the first. A loss is the sum of Dice and cross-entropy, in the paper half
of that; the Dice is of the structures, over the batch, in its code of the background, too, and of each crop. A batch is
halved, so 2 + 2 crops are one labelled and one unlabelled pair's worth of voxels; the paper has 4 + 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.transforms import KeepLargestConnectedComponent
from monai.utils import convert_to_tensor
from torch import Tensor

from ..errors import BadInput
from ..losses import SegmentationLoss
from ..losses.partial_labels import Annotated
from ..networks.reductions import likeliest_class
from .base import Method, Segmenter
from .moving_average import MovingAverage

__all__ = ["BidirectionalCopyPaste", "box_mask"]


def box_mask(size: Sequence[int], fraction: float, device: torch.device | None = None) -> Tensor:
    """The mask M: (1, 1, *size), bool, False in a box and True around it.

    The box is anywhere, as in the paper's code; the paper's text calls the mask "zero-centered".

    Args:
        size: voxels a spatial axis.
        fraction: sides of the box as a share of ``size``; 2/3 in the paper.
        device: where the mask lies.
    """
    mask = torch.ones((1, 1, *size), dtype=torch.bool, device=device)
    sides = [int(length * fraction) for length in size]
    starts = [int(torch.randint(length - side + 1, ())) for length, side in zip(size, sides, strict=True)]
    box = tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))
    mask[0, 0][box] = False
    return mask


class BidirectionalCopyPaste(Method):
    """Bidirectional copy-paste with a moving average as the teacher.

    Each batch is halved, a and b. With M the mask (1 around the box, 0 in it), the network learns
    ``a_l M + a_u (1 - M)`` and ``b_u M + b_l (1 - M)``, from labels where the voxel is a labelled crop's, with
    ``unlabeled_weight`` from pseudo-labels where it is an unlabelled one's. Both are Dice and cross-entropy over their
    own region.

    The pseudo-label is the moving average's most probable class, of which each structure keeps its largest component,
    unless ``largest_component`` is off, as it should be where a structure has several: lungs, kidneys, bullae.

    Args:
        network: a :class:`~common.networks.SegmentationNetwork`.
        segmentation_loss: takes a mask of the voxels that count.
        box: sides of the box as a share of the crop's.
        unlabeled_weight: weight of the pseudo-labelled regions.
        decay: of the moving average.
        pretraining: share of the run that pastes labelled crops into each other. At its end the moving average
            starts from the network's weights. In the paper 2000 of 17000 steps.
        largest_component: of each structure in the pseudo-labels.

    Raises:
        BadInput: in use, when a batch can't be halved.
    """

    def __init__(
        self,
        network: Segmenter,
        segmentation_loss: SegmentationLoss | None = None,
        box: float = 2 / 3,
        unlabeled_weight: float = 0.5,
        decay: float = 0.99,
        pretraining: float = 2 / 17,
        largest_component: bool = True,
    ) -> None:
        super().__init__()
        self.network = network
        self.segmentation_loss = segmentation_loss or SegmentationLoss()
        self.box = box
        self.unlabeled_weight = unlabeled_weight
        self.average = MovingAverage(network, decay)
        self.pretraining = pretraining
        self.largest_component = largest_component

    @property
    def pretrains(self) -> bool:
        """Whether this step is one of the pre-training."""
        return self.step < self.pretraining * self.total_steps

    def forward(self, batch: Mapping[str, Mapping[str, Any]], optimizer: str = "") -> dict[str, Tensor]:
        image_a, image_b = _halves(batch["labeled"]["image"])
        label_a, label_b = _halves(batch["labeled"]["label"])
        mask = box_mask(image_a.shape[2:], self.box, image_a.device)
        if self.pretrains:
            _, logits = self.network.forward_all(torch.where(mask, image_a, image_b))
            target, annotated = torch.where(mask, label_a, label_b), batch["labeled"].get("annotated")
            if annotated:  # the halves may know different structures, so each region has a loss of its own
                half, inside = len(label_a), mask.expand_as(label_a)
                known = ((inside, annotated[:half]), (~inside, annotated[half:]))
                loss = torch.stack([self.segmentation_loss(logits, target, *region) for region in known]).mean()
            else:
                loss = self.segmentation_loss(logits, target)
            return {"loss": loss, "segmentation": loss}

        unlabeled = batch["unlabeled"]["image"]
        unlabeled_a, unlabeled_b = _halves(unlabeled)
        pseudo_a, pseudo_b = _halves(self.pseudo_label(unlabeled))
        mixed = torch.cat([torch.where(mask, image_a, unlabeled_a), torch.where(mask, unlabeled_b, image_b)])
        target = torch.cat([torch.where(mask, label_a, pseudo_a), torch.where(mask, pseudo_b, label_b)])
        outside = mask.expand_as(label_a)
        is_labeled = torch.cat([outside, ~outside])
        _, logits = self.network.forward_all(mixed)
        labeled_loss = self._regions(logits, target, is_labeled, batch["labeled"].get("annotated"))
        unlabeled_loss = self._regions(logits, target, ~is_labeled)
        loss = labeled_loss + self.unlabeled_weight * unlabeled_loss
        return {"loss": loss, "segmentation": labeled_loss, "consistency": unlabeled_loss}

    def _regions(self, logits: Sequence[Tensor], target: Tensor, mask: Tensor, annotated: Annotated = None) -> Tensor:
        """The sum of both mixtures' losses: each over its own region, whose sizes differ."""
        half = target.shape[0] // 2
        losses = [
            self.segmentation_loss(
                [level[part] for level in logits], target[part], mask[part], annotated and annotated[part]
            )
            for part in (slice(half), slice(half, None))
        ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def pseudo_label(self, image: Tensor) -> Tensor:
        """The moving average's classes of images (B, C, *spatial), as (B, 1, *spatial)."""
        classes = likeliest_class(self.average(image))
        if not self.largest_component:
            return classes
        keep = KeepLargestConnectedComponent()
        return torch.stack([convert_to_tensor(keep(item), track_meta=False) for item in classes])

    def after_step(self) -> None:
        self.average.update_parameters(self.network)
        if self.pretrains:
            # The updates count on, so that the average has its full decay from the first step after the pre-training.
            self.average.module.load_state_dict(self.network.state_dict())


def _halves(batch: Tensor) -> tuple[Tensor, Tensor]:
    if batch.shape[0] < 2 or batch.shape[0] % 2:
        raise BadInput(
            f"batch_size: found {batch.shape[0]}, expected an even number, since copy-paste mixes pairs of crops. "
            "Choose 2 or 4."
        )
    first, second = batch.chunk(2)
    return first, second
