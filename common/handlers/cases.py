"""What the handlers of an evaluation share: the cases of an iteration, and their names."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from ..errors import BadInput
from ..processes import gathered

__all__ = ["array", "case_file", "case_meta", "cases_of", "gather_cases", "is_main", "mean_and_spread", "number"]


def cases_of(engine: Engine) -> list[dict[str, Any]]:
    """The cases of an iteration, batch and output together: MONAI leaves in the batch what the dataset loaded."""
    output: Any = engine.state.output
    batch: Any = engine.state.batch
    outputs = [output] if isinstance(output, dict) else list(output)
    if isinstance(batch, dict) and len(outputs) == 1:
        batch = [batch]
    if not isinstance(batch, (list, tuple)) or len(batch) != len(outputs):
        return outputs
    return [{**loaded, **found} for loaded, found in zip(batch, outputs, strict=True)]


def case_file(case: Mapping[str, Any]) -> str:
    """Path of the case's image, as the loader noted it."""
    return str(case_meta(case)["filename_or_obj"])


def case_meta(case: Mapping[str, Any]) -> dict[str, Any]:
    """Meta data of the case's image, which :func:`common.data.case_name` takes."""
    for key in ("image", "segmentation", "reference"):
        tensor = case.get(key)
        if isinstance(tensor, MetaTensor) and tensor.meta.get("filename_or_obj"):
            return tensor.meta
    raise BadInput(
        "a case does not know its file: none of `image`, `segmentation` and `reference` carries `filename_or_obj`. "
        "Load the images with meta data (LoadImaged, image_only=True)."
    )


def mean_and_spread(values: Iterable[float]) -> dict[str, float | int]:
    """Mean, standard deviation and number of those values that exist; NaN where these are too few."""
    known = [value for value in values if math.isfinite(value)]
    return {
        "mean": statistics.fmean(known) if known else float("nan"),
        "sd": statistics.stdev(known) if len(known) > 1 else float("nan"),
        "n": len(known),
    }


def number(value: Any) -> float:
    """A case-level number from what a data loader makes of it; NaN where there is none."""
    if value is None:
        return float("nan")
    return float(np.asarray(value.cpu() if isinstance(value, torch.Tensor) else value, dtype=float).reshape(-1)[0])


def array(tensor: Any) -> np.ndarray:
    """The first channel as NumPy array: (1, *spatial) to (*spatial)."""
    return tensor[0].detach().cpu().numpy() if isinstance(tensor, torch.Tensor) else np.asarray(tensor)[0]


def gather_cases(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all processes in the cases' order, each case once; all processes have to call this together.

    Args:
        rows: this process's, each with its case's ``file``; of the cases that :class:`~common.data.ProcessShare` gives.
    """
    shares = gathered(rows)
    if len(shares) == 1:
        return rows
    in_turn = (row for turn in zip_longest(*shares) for row in turn if row is not None)
    return list({row["file"]: row for row in in_turn}.values())


def is_main() -> bool:
    """Whether this process is the one that writes files."""
    return idist.get_rank() == 0
