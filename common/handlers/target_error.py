"""The mean absolute error of the regression during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce

from ..losses import target_mask

__all__ = ["TargetError"]


class TargetError(Metric):
    """Mean absolute error of the dense targets inside their structures, each in units of its ``scale``.

    An evaluator's metric for :class:`monai.engines.SupervisedEvaluator` with decollated outputs that hold
    ``<target>_pred``, ``<target>`` and ``label``. NaN when no case has a target.

    Args:
        targets: the regression targets.
    """

    def __init__(self, targets: Sequence[Mapping[str, Any]]) -> None:
        self.targets = [target for target in targets if target.get("kind", "dense") == "dense"]
        super().__init__(output_transform=lambda output: output)

    @reinit__is_reduced
    def reset(self) -> None:
        """Forget everything."""
        self._total = torch.zeros((), dtype=torch.float64)
        self._count = torch.zeros((), dtype=torch.float64)

    @reinit__is_reduced
    def update(self, output: Sequence[Mapping[str, Any]]) -> None:
        """Add the cases of one iteration."""
        for case in output:
            for target in self.targets:
                name = target["name"]
                if name not in case:
                    continue
                truth, label = torch.as_tensor(case[name]).float(), case.get("label")
                mask = target_mask(truth, target.get("missing", 0), label, target.get("structure"))
                error = (torch.as_tensor(case[f"{name}_pred"]).float() - truth)[mask].abs() / target.get("scale", 1.0)
                self._total += error.double().sum().cpu()
                self._count += error.numel()

    @sync_all_reduce("_total", "_count")
    def compute(self) -> float:
        """The mean over all voxels of all targets."""
        return float(self._total / self._count) if self._count > 0 else float("nan")
