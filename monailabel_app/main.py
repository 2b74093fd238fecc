"""A MONAI Label app that serves the three bundles: teacher, student and dual decoder.

MONAI Label's own app for bundles serves them as well. This one needs no weights to begin with, trains all stages as one
request, takes a plan, keeps regression maps beside the labels, offers the image that the networks are least certain of,
and refuses what would only fail later. See ``docs/monai-label.md``.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import requests
from fastapi import HTTPException
from lib.datastore import CheckedDatastore
from lib.stages import AllStages, StageInference, StageTraining, label_ids
from lib.strategies import RandomImage, Uncertain, UncertaintyScoring
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask

from common import __version__
from common.errors import find_bad_input, report_plainly

logger = logging.getLogger(__name__)

STAGES = ("teacher", "student", "dual_decoder")
ALL_STAGES = "all_stages"
BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
VOLUMES = ["*.nii.gz", "*.nii", "*.nrrd", "*.mha", "*.mhd"]


class FewLabelsApp(MONAILabelApp):
    """Serves and trains the bundles.

    Args:
        app_dir: folder of this file.
        studies: folder of the images, or the address of a DICOMweb server.
        conf: ``--conf KEY VALUE`` of the command line: ``bundles``, a folder with the three bundles instead of this
            checkout's, and ``plan``, a plan that is laid over their configs.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.bundles = {name: Path(conf.get("bundles") or BUNDLES).resolve() / name for name in STAGES}
        self.plan = str(Path(conf["plan"]).resolve()) if conf.get("plan") else None
        self.label_ids = label_ids(str(self.bundles["student"]), self.plan)
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="Few labels",
            description="Segments and measures; learns from labelled and unlabelled images.",
            version=__version__,
            labels=list(self.label_ids),
        )

    def init_datastore(self) -> Datastore:
        if self.studies.startswith(("http://", "https://")):
            return super().init_datastore()
        return CheckedDatastore(
            self.studies,
            labels=self.label_ids,
            extensions=VOLUMES,
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def init_infers(self) -> dict[str, InferTask]:
        self._infers: dict[str, InferTask] = {}
        self._serve_trained()
        return self._infers

    def _serve_trained(self) -> None:
        """Serve the stages that have weights by now: a first training makes some while the server runs."""
        for name, path in self.bundles.items():
            if name not in self._infers and (path / "models" / "model.pt").exists():
                self._infers[name] = StageInference(str(path), self.conf, self.plan)

    def init_trainers(self) -> dict[str, TrainTask]:
        stages = {name: StageTraining(str(path), self.conf, self.plan) for name, path in self.bundles.items()}
        return {**stages, ALL_STAGES: AllStages(stages)}

    def init_strategies(self) -> dict[str, Strategy]:
        return {
            "entropy": Uncertain("entropy", "The image whose segmentation is least certain"),
            "disagreement": Uncertain("disagreement", "The image that teacher and student disagree about most"),
            "random": RandomImage(),
        }

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        return {"uncertainty": UncertaintyScoring(self)}

    def info(self) -> dict[str, Any]:
        self._serve_trained()
        return super().info()

    def infer(self, request: Mapping[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Predict; with ``save_label`` the regression maps are kept beside the label, under ``<target>_original``."""
        self._serve_trained()
        datastore = datastore or self.datastore()
        model, image = request.get("model"), request.get("image")
        self._know_model(model)
        if model not in self._infers:
            raise HTTPException(404, f"{model} has no weights yet: train it, or all_stages, with some labels.")
        if isinstance(image, str) and not os.path.exists(image) and not datastore.get_image_uri(image):
            raise HTTPException(404, f"There is no image {image!r} in {self.studies}.")
        shown = request.get("output_map", "segmentation")
        if shown != "segmentation":
            request = {**request, "label_tag": f"{shown}_original"}
        with TemporaryDirectory() as folder:
            try:
                result = super().infer({**request, "map_folder": folder}, datastore)
            except Exception as error:
                message = find_bad_input(error)
                if message is None:
                    raise
                raise HTTPException(400, message) from error
            for path in sorted(Path(folder).iterdir()):
                tag = f"{path.name.split('.')[0]}_original"
                datastore.save_label(image, str(path), tag, {"model": model, "params": result["params"]})
        return result

    def train(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Train a stage or all; in a process of its own, it ends with the server that began it."""
        self._know_model(request.get("model"))
        if not self._server_mode:
            report_plainly()
            _end_with_parent()
        return super().train(request)

    def bundle_path(self, model: str | None) -> str | None:
        """MONAI Label asks for it when a training is requested, and this is where it can still be refused."""
        if model is not None:
            self._know_model(model)
        return super().bundle_path(model)

    def _know_model(self, model: str | None) -> None:
        if model not in self._trainers:
            raise HTTPException(404, f"There is no model {model!r}; expected one of {list(self._trainers)}.")

    def next_sample(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request.get("strategy") not in self._strategies:
            raise HTTPException(
                404, f"There is no strategy {request.get('strategy')!r}; expected one of {list(self._strategies)}."
            )
        return super().next_sample(request)

    def async_scoring(self, method: str | None, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """MONAI Label scores at its start, after a training and after each image that is handed out: when need be."""
        if self._server_mode and not self._scoring_methods["uncertainty"].pending(self.datastore()):
            return {}
        try:
            return super().async_scoring(method, params)
        except requests.ConnectionError:  # a training asks the server for it, which may be gone or elsewhere
            logger.warning("the images are not scored: no server answers")
            return {}

    def on_init_complete(self) -> None:
        super().on_init_complete()
        address = f"http://127.0.0.1:{settings.MONAI_LABEL_SERVER_PORT}"
        print(
            f"\nMONAI Label answers at {address} (what it can do: {address}/)\n"
            "  3D Slicer, with its extension MONAI Label: module MONAI Label, this address as server, fetch models;\n"
            "    Active Learning > Next Sample; Auto Segmentation > Run; correct the segments; Submit Label;\n"
            "    after a few: Active Learning > Model all_stages > Train. See docs/monai-label.md.\n"
            f"  OHIF, when STUDIES is the address of a DICOMweb server: {address}/ohif/, open a study in the mode\n"
            "    MONAI Label; Auto-Segmentation > Run; Active Learning > Next Sample; Update Model trains.\n"
            "Ctrl-C ends it.\n",
            flush=True,
        )


def _end_with_parent() -> None:
    """End this process when the one that started it is gone.

    Otherwise a training would go on after its server was killed, beside the one that somebody starts next.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
