"""Labels of many structures as labels of one organ."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.transforms import MapTransform

from ..data.partial import organ_id

__all__ = ["SelectOrgand"]


class SelectOrgand(MapTransform):
    """Label maps (1, *spatial) as 0 background and 1 organ, of the file's own type.

    Such a map knows all of its two classes, so the case's ``annotated`` is taken away.

    Args:
        labels: label ids and names.
        organ: name of the organ.
        keys: the label maps; a case may lack any.

    Raises:
        BadInput: ``labels`` has no such organ.
    """

    def __init__(self, labels: Mapping[str, str], organ: str, keys: tuple[str, ...] = ("label", "reference")) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.organ = organ_id(labels, organ)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Reduce the label maps of a case."""
        case = {key: value for key, value in data.items() if key != "annotated"}
        for key in self.key_iterator(case):
            if isinstance(case[key], torch.Tensor):
                case[key] = (case[key] == self.organ).to(case[key].dtype)
        return case
