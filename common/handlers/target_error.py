"""The mean absolute error of the regression during training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce

from ..losses import target_mask
from ..targets import is_dense
from .cases import cases_of, number

__all__ = ["TargetError"]


class TargetError(Metric):
    """Mean absolute error of the targets, each in units of its ``scale``, all targets weighing the same.

    An evaluator's metric for :class:`monai.engines.SupervisedEvaluator` with decollated cases that hold, in the output
    or in what the dataset loaded, ``<target>_pred``, ``<target>`` and ``label`` of a dense target, which counts inside
    its structure, and ``<target>_case`` and ``<target>`` of a number a case. NaN when no case has a target.

    Args:
        targets: the regression targets.
    """

    def __init__(self, targets: Sequence[Mapping[str, Any]]) -> None:
        self.targets = list(targets)
        super().__init__()

    @reinit__is_reduced
    def reset(self) -> None:
        """Forget everything."""
        self._total = torch.zeros(len(self.targets), dtype=torch.float64)
        self._count = torch.zeros(len(self.targets), dtype=torch.float64)

    def iteration_completed(self, engine: Engine) -> None:
        """Take the cases of one iteration; MONAI's output alone does not have the targets."""
        self.update(cases_of(engine))

    @reinit__is_reduced
    def update(self, output: Sequence[Mapping[str, Any]]) -> None:
        """Add cases."""
        for case in output:
            for index, target in enumerate(self.targets):
                if target["name"] in case:
                    error = self._error(case, target) / target.get("scale", 1.0)
                    self._total[index] += error.double().sum().cpu()
                    self._count[index] += error.numel()

    @staticmethod
    def _error(case: Mapping[str, Any], target: Mapping[str, Any]) -> torch.Tensor:
        name = target["name"]
        if not is_dense(target):
            error = number(case[f"{name}_case"]) - number(case[name])
            return torch.tensor([abs(error)] if math.isfinite(error) else [])
        truth = torch.as_tensor(case[name]).float()
        mask = target_mask(truth, target.get("missing", 0), case.get("label"), target.get("structure"))
        return (torch.as_tensor(case[f"{name}_pred"]).float() - truth)[mask].abs()

    @sync_all_reduce("_total", "_count")
    def compute(self) -> float:
        """The mean over the targets of each one's mean over voxels or cases."""
        means = [float(t / n) for t, n in zip(self._total, self._count, strict=True) if n > 0]
        return statistics.fmean(means) if means else float("nan")
