"""What a viewer shows of a case's results."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from monai.transforms import Compose, MapTransform

from ..errors import BadInput
from .preprocessing import chain

__all__ = ["DisplayedOutputd", "displayed"]


class DisplayedOutputd(MapTransform):
    """Put one of the results where the network's output was: MONAI Label shows and saves what is there.

    Args:
        output_map: ``segmentation`` for the label map, or the name of a target for its map; of several the first.
        key: where the network's output was.

    Raises:
        BadInput: when called, if there is no such result.
    """

    def __init__(self, output_map: str | Sequence[str] = "segmentation", key: str = "pred") -> None:
        super().__init__(key)
        self.output_map = output_map if isinstance(output_map, str) else output_map[0]
        self.key = key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        found = "segmentation" if self.output_map == "segmentation" else f"{self.output_map}_pred"
        if found not in d:
            maps = [str(key).removesuffix("_pred") for key in d if str(key).endswith("_pred")]
            raise BadInput(f"output_map: found {self.output_map!r}, expected one of {['segmentation', *maps]}.")
        d[self.key] = d[found]
        return d


def displayed(postprocessing: Callable, output_map: str | Sequence[str] = "segmentation") -> Compose:
    """A bundle's postprocessing, and then one of its results for a viewer; see :class:`DisplayedOutputd`."""
    return chain(postprocessing, DisplayedOutputd(output_map))
