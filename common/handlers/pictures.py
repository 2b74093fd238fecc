"""Pictures of a stage, drawn as it is validated or evaluated."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.transforms import ResampleToMatch

from ..data.datalist import case_name
from ..targets import is_dense, structure_ids
from ..transforms.output import voxel_spacing
from .cases import array, case_file, case_meta, cases_of, gather_cases, is_main
from .drawing import in_plane, save_overview

__all__ = ["StagePicture"]


class StagePicture:
    """Save pictures of an evaluator's first cases and, where references exist, of the one with the median Dice.

    A handler for evaluators whose batch and output are decollated lists of dicts; it reads the keys that
    :class:`EvaluationWriter` reads, with the maps of dense targets as ``<target>_pred`` and ``reference_<target>``, and
    ``image`` in the network's grid or the file's own: it is brought to the prediction's grid. Only the slices to
    show are kept. Files: ``<case>_overview.png`` and ``median_overview.png``, with dense targets
    ``<case>_overview_<target>.png``. They are written at the end of each epoch of the evaluator.

    Args:
        output_dir: folder of the pictures.
        targets: the targets' descriptions; each dense one has its own picture.
        cases: how many of the first cases to show.
        median: whether to show the case with the median of the mean Dice too.
        image_key: the image.
        prediction_key: the predicted label map (1, *spatial); absent for a network that only regresses.
        reference_key: the reference label map, on the same grid; may be absent.
        reference_prefix: what a target's name has before it in the key of its reference map, on the same grid.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        targets: Sequence[Mapping[str, Any]] = (),
        cases: int = 1,
        median: bool = False,
        image_key: str = "image",
        prediction_key: str = "segmentation",
        reference_key: str = "reference",
        reference_prefix: str = "reference_",
    ) -> None:
        self.output_dir = Path(output_dir)
        self.targets = [target for target in targets if is_dense(target)]
        self.cases = cases
        self.median = median
        self.image_key = image_key
        self.prediction_key = prediction_key
        self.reference_key = reference_key
        self.reference_prefix = reference_prefix
        self._kept: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Register at the evaluator ``engine``."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Forget the cases of an earlier run."""
        self._kept = []

    def add(self, engine: Engine) -> None:
        """Keep the slices of one iteration's cases."""
        for case in cases_of(engine):
            if self.median or len(self._kept) < self.cases:
                self._kept.append(self._keep(case))

    def _keep(self, case: Mapping[str, Any]) -> dict[str, Any]:
        labels = {
            key: array(case[source]) if case.get(source) is not None else None
            for key, source in (("prediction", self.prediction_key), ("reference", self.reference_key))
        }
        grid = next(
            case[key]
            for key in (self.prediction_key, *[f"{target['name']}_pred" for target in self.targets], self.image_key)
            if case.get(key) is not None
        )
        image = array(self._image_on(grid, case[self.image_key]))
        annotated = case.get("annotated")
        if annotated is not None:
            annotated = np.asarray(annotated, dtype=int).reshape(-1).tolist()
        pictures: dict[str, dict[str, Any]] = {}
        targets: Sequence[Mapping[str, Any] | None] = [*self.targets] or [None]
        for target in targets:
            name = target["name"] if target else None
            maps = {
                "target_prediction": case.get(f"{name}_pred") if target else None,
                "target_reference": case.get(f"{self.reference_prefix}{name}") if target else None,
            }
            arrays = {"image": image, **labels}
            arrays.update({key: None if tensor is None else array(tensor) for key, tensor in maps.items()})
            planes, spacing = in_plane(arrays, voxel_spacing(grid))
            # Copies, or each slice would keep its whole volume in memory.
            copies = {key: None if plane is None else plane.copy() for key, plane in planes.items()}
            options: dict[str, Any] = {"annotated": annotated}
            if target:
                options.update(unit=target.get("unit", ""), missing=target.get("missing", 0))
                options["structures"] = structure_ids(target)
            pictures[f"overview_{name}" if target else "overview"] = {**copies, **options, "spacing": spacing}
        return {
            "case": case_name(case_meta(case)),
            "file": case_file(case),
            "dice": self._mean_dice(**labels, annotated=annotated),
            "pictures": pictures,
        }

    @staticmethod
    def _image_on(grid: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        same_place = not (isinstance(image, MetaTensor) and isinstance(grid, MetaTensor)) or torch.allclose(
            torch.as_tensor(image.affine).double(), torch.as_tensor(grid.affine).double(), atol=1e-3
        )
        if image.shape[1:] == grid.shape[1:] and same_place:
            return image
        return ResampleToMatch(mode="bilinear")(image[:1].detach().cpu(), img_dst=grid.detach().cpu())

    @staticmethod
    def _mean_dice(
        prediction: np.ndarray | None, reference: np.ndarray | None, annotated: Sequence[int] | None
    ) -> float:
        if prediction is None or reference is None:
            return float("nan")
        found = np.union1d(np.unique(prediction), np.unique(reference))
        labels = [label for label in found if label != 0 and (annotated is None or label in annotated)]
        scores = [
            2
            * np.sum((prediction == label) & (reference == label))
            / (np.sum(prediction == label) + np.sum(reference == label))
            for label in labels
        ]
        return float(np.mean(scores)) if scores else float("nan")

    def _save_case(self, kept: Mapping[str, Any], prefix: str) -> None:
        dice = "" if math.isnan(kept["dice"]) else f", Dice {kept['dice']:.3f}"
        for name, picture in kept["pictures"].items():
            save_overview(self.output_dir / f"{prefix}_{name}.png", **picture, title=f"{kept['case']}{dice}")

    def write(self, engine: Engine) -> None:
        """Save the pictures."""
        cases = gather_cases(self._kept)
        if not is_main():
            return
        for kept in cases[: self.cases]:
            self._save_case(kept, kept["case"])
        scored = sorted((kept for kept in cases if not math.isnan(kept["dice"])), key=lambda kept: kept["dice"])
        if self.median and scored:
            self._save_case(scored[(len(scored) - 1) // 2], "median")
