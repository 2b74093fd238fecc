"""Stage 3: a regression decoder beside a segmentation decoder that stays as it is.

The loss is ``segmentation_weight * L_seg + regression_weight * L_reg``. Under knowledge lock-in (see
:class:`~common.handlers.LockIn`) the encoder and the segmentation decoder have no gradients and ``segmentation_weight``
is 0; without it the two weights are fixed, or learnt from the homoscedastic uncertainty of each task (Kendall, Gal &
Cipolla, CVPR 2018).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import BadInput
from ..losses import FeatureAlignment, MaskedRegression, SegmentationLoss, UncertaintyWeighting, target_mask
from ..losses.processes import mean_over_processes
from ..networks import DualDecoderNetwork, RegressionNetwork, SegmentationNetwork, reduce_to_case
from ..networks.dual_decoder import is_locked
from ..targets import is_dense, structure_ids
from .base import Method
from .feature_cache import FeatureCache

__all__ = ["DualDecoder"]


class DualDecoder(Method):
    """Regression of dense and case-level targets above a segmentation network.

    Args:
        network: a :class:`~common.networks.DualDecoderNetwork`, or a :class:`~common.networks.RegressionNetwork` (the
            stand-alone comparison).
        targets: what the regression channels mean, in their order; see the data contract in ``docs/data.md``.
        num_classes: segmentation channels in front of the regression channels of the network's output.
        patch_size: window in which whole volumes are read for case-level targets.
        regression_loss: compares dense targets inside their structure, in units of the target's ``scale``.
        segmentation_loss: for the part of the segmentation decoder, when ``segmentation_weight`` is not 0.
        segmentation_weight: 0 under lock-in.
        regression_weight: weight of the regression.
        learn_weights: learn the two weights instead.
        reference: the student, frozen, when the encoder may move: its features are the ones to stay near.
        alignment: how features are compared with those of ``reference``.
        alignment_weight: weight of that comparison.
        feature_cache: GB of main memory for what locked parts made of whole volumes, which come without augmentation:
            from the second epoch on only the regression decoder is run on them. 0 for none.

    Raises:
        BadInput: when no target is given, ``reference`` without ``alignment``, or a heteroscedastic loss with a target
            of one number a case or with ``learn_weights``.
    """

    frozen = ("reference",)

    def __init__(
        self,
        network: DualDecoderNetwork | RegressionNetwork,
        targets: Sequence[Mapping[str, Any]],
        num_classes: int,
        patch_size: Sequence[int],
        regression_loss: MaskedRegression | None = None,
        segmentation_loss: SegmentationLoss | None = None,
        segmentation_weight: float = 0.0,
        regression_weight: float = 1.0,
        learn_weights: bool = False,
        reference: SegmentationNetwork | None = None,
        alignment: FeatureAlignment | None = None,
        alignment_weight: float = 0.0,
        feature_cache: float = 0.0,
    ) -> None:
        super().__init__()
        if not targets:
            raise BadInput("targets: the list is empty; the dual decoder needs at least one quantity to regress.")
        numbers = [target["name"] for target in targets if not is_dense(target)]
        if numbers and regression_loss is not None and regression_loss.kind == "heteroscedastic":
            raise BadInput(
                f"targets: {numbers} are numbers a case, and the variance of a sum or mean over voxels is not in the "
                "network's map of variances. Use another kind of regression_loss than 'heteroscedastic' with them."
            )
        if learn_weights and regression_loss is not None and regression_loss.kind == "heteroscedastic":
            raise BadInput(
                "learn_weights is on, but a heteroscedastic regression_loss falls below 0, where no weight is best. "
                "Use another kind of loss, or set learn_weights to false and choose regression_weight."
            )
        if reference is not None and alignment is None:
            raise BadInput("reference is given, so alignment must say how features are compared with it.")
        self.network = network
        self.targets = list(targets)
        self.num_classes = num_classes
        self.patch_size = tuple(patch_size)
        self.regression_loss = regression_loss or MaskedRegression()
        self.segmentation_loss = segmentation_loss or SegmentationLoss()
        self.segmentation_weight = segmentation_weight
        self.regression_weight = regression_weight
        self.weighting = UncertaintyWeighting(["segmentation", "regression"]) if learn_weights else None
        self.reference = reference
        self.alignment = alignment
        self.alignment_weight = alignment_weight
        self.feature_cache = FeatureCache(feature_cache)
        # Numbers a case are learnt from whole volumes alone.
        self._reads_crops = (
            any(is_dense(target) for target in targets)
            or learn_weights
            or segmentation_weight > 0
            or reference is not None
        )
        self._reads_structures = num_classes > 0 and any(map(_is_mean_of_structure, targets))
        self.freeze()

    def forward(self, batch: Mapping[str, Mapping[str, Tensor]], optimizer: str = "") -> dict[str, Tensor]:
        labeled = batch["labeled"]
        if self._reads_crops:
            features, logits, regression = self.network.forward_all(labeled["image"])
        if not all(map(is_dense, self.targets)):
            whole = self._read_whole(batch["case"]["image"])
        terms: dict[str, Tensor] = {}
        regressions, masks = [], []
        for index, target in enumerate(self.targets):
            if is_dense(target):
                loss, mask = self._dense(index, target, regression, labeled)
            else:
                loss, mask = self._case(index, target, whole, batch["case"])
            masks.append(mask)
            terms[f"regression/{target['name']}"] = loss
            regressions.append(loss)
        terms["regression"] = torch.stack(regressions).mean()
        loss = self.regression_weight * terms["regression"]
        if self.weighting is not None or self.segmentation_weight > 0:
            terms["segmentation"] = self.supervise(logits, labeled)
            if self.weighting is not None:
                # Without a value in the batch the regression says nothing, and must not move its weight.
                found = mean_over_processes(torch.stack([mask.any() for mask in masks]).float()).any()
                names = ("segmentation", "regression") if found else ("segmentation",)
                loss = self.weighting({name: terms[name] for name in names})
            else:
                loss = loss + self.segmentation_weight * terms["segmentation"]
        if self.reference is not None and self.alignment is not None:
            with torch.no_grad():
                reference_features = self.reference.encoder(labeled["image"])
            terms["alignment"] = self.alignment(features, reference_features)
            loss = loss + self.alignment_weight * terms["alignment"]
        return {"loss": loss, **terms}

    def _dense(
        self, index: int, target: Mapping[str, Any], regression: Tensor, labeled: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The error of a dense target, and where it has one."""
        truth = labeled[target["name"]]
        scale = float(target.get("scale", 1.0))
        mask = target_mask(truth, target.get("missing", 0), labeled["label"], target.get("structure"))
        log_variance = None
        if regression.shape[1] > len(self.targets):
            log_variance = regression[:, len(self.targets) + index].unsqueeze(1) - 2 * math.log(scale)
        loss = self.regression_loss(regression[:, index : index + 1] / scale, truth / scale, mask, log_variance)
        return loss, mask

    def _read_whole(self, image: Tensor) -> tuple[Tensor | None, Tensor]:
        """Segmentation logits, where a target needs them, and regression of whole volumes, read as at inference.

        Activations of one window at a time are kept (the rest is recomputed in the backward pass), so memory does not
        grow with the volume.
        """

        def predict(window: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            network = self.network
            if self.feature_cache.limit and isinstance(network, DualDecoderNetwork) and _says_the_same(network):
                logits, *rest = self.feature_cache(window, self._read)
                stages = len(network.encoder.stages)
                features, decoded, edge = rest[:stages], rest[stages : 2 * stages - 1], rest[2 * stages - 1 :]
                read = (features, decoded, edge[0] if edge else None)
                regression = checkpoint(network.regress, *read, use_reentrant=False)
            else:
                output = checkpoint(network, window, use_reentrant=False)
                logits, regression = output[:, : self.num_classes], output[:, self.num_classes :]
            return (logits, regression) if self._reads_structures else regression

        outputs: Any = sliding_window_inference(image, self.patch_size, 1, predict, overlap=0.0)
        return outputs if self._reads_structures else (None, outputs)

    def _read(self, window: Tensor) -> list[Tensor]:
        """What locked parts make of a window: the logits, and what the regression decoder reads."""
        assert isinstance(self.network, DualDecoderNetwork)
        features, logits, decoded, edge = self.network.read(window)
        features, decoded = self.network.regression_decoder.needed(features, decoded)
        unread = logits[0].new_empty(0)
        return [logits[0] if self._reads_structures else unread, *features, *decoded, *([] if edge is None else [edge])]

    def _case(
        self,
        index: int,
        target: Mapping[str, Any],
        whole: tuple[Tensor | None, Tensor],
        case: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The error of a number a case, and which cases have one, from what whole volumes gave."""
        logits, regression = whole
        truth = case[target["name"]].float().reshape(-1)
        structure = None
        if logits is not None and _is_mean_of_structure(target):
            structure = logits.detach().softmax(1)[:, structure_ids(target)].sum(1, keepdim=True)
        prediction = reduce_to_case(regression[:, index : index + 1], target["kind"], structure)
        scale = float(target.get("scale", 1.0))
        mask = torch.isfinite(truth)
        return self.regression_loss(prediction / scale, truth / scale, mask), mask


def _is_mean_of_structure(target: Mapping[str, Any]) -> bool:
    return target.get("kind") == "mean" and bool(structure_ids(target))


def _says_the_same(network: DualDecoderNetwork) -> bool:
    """Whether encoder and segmentation decoder can't change, and always say the same of the same image."""
    return all(is_locked(part) and not part.training for part in (network.encoder, network.segmentation_decoder))
