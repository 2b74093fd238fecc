"""Which image to label next, and the scores that say so."""

from __future__ import annotations

import json
import logging
import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests
from monailabel.config import settings
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.utils.others.generic import name_to_device
from torch import Tensor

from common.errors import BadInput, find_bad_input
from common.metrics.uncertainty import disagreement, entropy

if TYPE_CHECKING:
    from main import FewLabelsApp

__all__ = ["RandomImage", "Uncertain", "UncertaintyScoring"]

logger = logging.getLogger(__name__)

KEY = "uncertainty"


class UncertaintyScoring(ScoringMethod):
    """Scores every image without a label: by the student's entropy, and by how far teacher and student disagree.

    The scores are kept in the images' information under ``uncertainty``: ``entropy``, ``disagreement``, the time, and
    what they were formed with. An image is scored again when the weights are others, or its file is.

    Args:
        app: whose teacher and student are asked.
    """

    def __init__(self, app: FewLabelsApp) -> None:
        super().__init__("Uncertainty of the images without a label, by entropy and by disagreement")
        self.app = app

    def _weights(self) -> dict[str, int]:
        paths = {name: self.app.bundles[name] / "models" / "model.pt" for name in ("teacher", "student")}
        return {name: path.stat().st_mtime_ns for name, path in paths.items() if path.exists()}

    @staticmethod
    def _made_with(weights: dict[str, int], datastore: Datastore, name: str) -> dict[str, int | None]:
        """The weights, and when an image was written; None of images elsewhere, which would have to be fetched."""
        path = Path(datastore.get_image_uri(name)) if isinstance(datastore, LocalDatastore) else None
        return {**weights, "image": path.stat().st_mtime_ns if path is not None and path.exists() else None}

    def pending(self, datastore: Datastore) -> list[str]:
        """The images without a label that the present weights have not scored; none while there are no weights."""
        weights = self._weights()
        return [
            name
            for name in (datastore.get_unlabeled_images() if weights else [])
            if datastore.get_image_info(name).get(KEY, {}).get("made_with") != self._made_with(weights, datastore, name)
        ]

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Score what is pending; an image that fails does not stop the others, and its reason is kept as ``error``."""
        if not self.app._server_mode:
            os.nice(10)  # whoever waits for a prediction comes first
        weights, device = self._weights(), name_to_device(request.get("device"))
        try:
            for stage in weights:
                self.app._infers[stage].check_weights()
        except BadInput as error:
            logger.warning("no image is scored: %s", error)  # which is no fault of the images
            return {"scored": 0}
        names = self.pending(datastore)
        found: dict[str, Any]
        for name in names:
            try:
                found = self._score(list(weights), datastore.get_image_uri(name), device)
            except Exception as error:
                found = {"error": find_bad_input(error) or f"{type(error).__name__}: {error}"}
                logger.warning("%s is not scored: %s", name, found["error"])
            made_with = self._made_with(weights, datastore, name)
            self._keep(datastore, name, {**found, "made_with": made_with, "ts": int(time.time())})
        return {"scored": len(names)}

    def _score(self, stages: list[str], path: str, device: str) -> dict[str, float]:
        logits = [self._logits(stage, path, device) for stage in stages]
        scores = {"entropy": entropy(logits[-1])}
        return scores if len(logits) < 2 else {**scores, "disagreement": disagreement(*logits)}

    def _logits(self, stage: str, path: str, device: str) -> Tensor:
        task = self.app._infers[stage]
        data = {**task.config(), "image": path, "device": device}
        data = task.run_pre_transforms(data, task.pre_transforms(data))
        return task.run_inferer(data, device=device)[task.output_label_key].as_tensor()

    def _keep(self, datastore: Datastore, name: str, scores: dict[str, Any]) -> None:
        if self.app._server_mode:
            datastore.update_image_info(name, {KEY: scores})
            return
        # By way of the server, which holds the datastore in memory: two writers would undo each other's entries.
        requests.put(
            f"http://127.0.0.1:{settings.MONAI_LABEL_SERVER_PORT}/datastore/image/info",
            params={"image": name},
            data={"info": json.dumps({KEY: scores})},
            timeout=60,
        ).raise_for_status()


def _candidates(datastore: Datastore) -> dict[str, dict[str, Any]]:
    """What is known of each image without a label; without those of which the scoring found that they can't be read."""
    infos = {name: datastore.get_image_info(name) for name in datastore.get_unlabeled_images()}
    return {name: info for name, info in infos.items() if "error" not in info.get(KEY, {})}


class Uncertain(Strategy):
    """The image with the highest score.

    Images that were handed out since they were scored come after the others, so that asking again gives another one;
    images without a score come last, in any order.

    Args:
        key: ``entropy`` or ``disagreement``.
        description: what a viewer shows.
    """

    def __init__(self, key: str, description: str) -> None:
        super().__init__(description)
        self.key = key

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        infos = _candidates(datastore)
        names = random.sample(list(infos), len(infos))
        if not names:
            return None

        def rank(name: str) -> tuple[bool, bool, float]:
            scores, handed_out = infos[name].get(KEY, {}), infos[name].get("strategy", {})
            seen = any(use.get("ts", 0) >= scores.get("ts", 0) for use in handed_out.values())
            return self.key not in scores, seen, -scores.get(self.key, 0.0)

        name = min(names, key=rank)
        return {"id": name, "score": infos[name].get(KEY, {}).get(self.key)}


class RandomImage(Strategy):
    """Any image without a label, each as likely: what uncertainty has to beat."""

    def __init__(self) -> None:
        super().__init__("Any image without a label")

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        names = list(_candidates(datastore))
        return {"id": random.choice(names)} if names else None
