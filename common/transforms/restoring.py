"""From the network's grid back to the input's own, class by class."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.transforms import Invertd, InvertibleTransform, MapTransform

from ..targets import is_dense, structure_ids

__all__ = ["RestoreGridd"]


class RestoreGridd(MapTransform):
    """Bring logits, as a label map, and target maps to the input's own grid, undoing its preprocessing.

    Probabilities are interpolated, not labels, which keeps borders smooth, and one class after another, so that memory
    doesn't grow with their number.

    Outside its structure a target's map means nothing, and what it says there must not leak into a thin wall when the
    map is resampled: each voxel becomes the mean of its neighbours weighted by the probability that they belong to the
    structure. The weights have a small floor, so that far from the structure the map is resampled as it is; where
    nothing is resampled nothing changes.

    Args:
        preprocessing: what was done to the image.
        targets: the targets' descriptions; of dense ones ``<target>_pred`` and ``<target>_std`` are brought back.
        segmentation_key: logits (num_classes, *spatial) that become labels (1, *input's spatial), uint8, or int16 for
            more than 256 classes; absent for a network that only regresses.
        image_key: the preprocessed image.
    """

    FLOOR = 1e-3

    def __init__(
        self,
        preprocessing: InvertibleTransform,
        targets: Sequence[Mapping[str, Any]] = (),
        segmentation_key: str = "segmentation",
        image_key: str = "image",
    ) -> None:
        super().__init__(segmentation_key, allow_missing_keys=True)
        self.targets = [target for target in targets if is_dense(target)]
        self.segmentation_key = segmentation_key
        self.image_key = image_key
        self.invert = Invertd("map", preprocessing, image_key, nearest_interp=False, to_tensor=True)

    def _restored(self, values: torch.Tensor, data: Mapping[Hashable, Any]) -> MetaTensor:
        """One map (1, *spatial) on the input's own grid."""
        image = data[self.image_key]
        source = values if isinstance(values, MetaTensor) else image
        traced = MetaTensor(values, meta=dict(source.meta), applied_operations=list(source.applied_operations))
        return self.invert({self.image_key: image, "map": traced})["map"]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return ``data`` with labels and maps on the input's grid."""
        d = dict(data)
        before: dict[str, torch.Tensor] = {}
        after: dict[str, torch.Tensor] = {}
        logits = d.get(self.segmentation_key)
        if logits is not None:
            plain = logits.as_tensor() if isinstance(logits, MetaTensor) else logits
            total = torch.logsumexp(plain.float(), dim=0)
            highest: torch.Tensor | None = None
            labels: MetaTensor | None = None
            for index in range(len(plain)):
                probability = (plain[index].float() - total).exp()[None]
                restored = self._restored(probability, d)
                values = restored.as_tensor()
                if highest is None or labels is None:
                    dtype = torch.uint8 if len(plain) <= 256 else torch.int16
                    highest, labels = (
                        values.clone(),
                        MetaTensor(torch.zeros_like(values, dtype=dtype), meta=restored.meta),
                    )
                else:
                    labels[values > highest] = index
                    highest = torch.maximum(highest, values)
                for target in self.targets:
                    if index in structure_ids(target):
                        name = target["name"]
                        before[name] = before.get(name, self.FLOOR) + probability
                        after[name] = after.get(name, self.FLOOR) + values
            d[self.segmentation_key] = labels
        for target in self.targets:
            name = target["name"]
            for key in (f"{name}_pred", f"{name}_std"):
                if key in d:
                    restored = self._restored(d[key] * before.get(name, 1.0), d)
                    d[key] = restored / after[name] if name in after else restored
        return d
