"""Prediction and training of one bundle, and of all three in turn."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
from monai.bundle import ConfigParser
from monai.handlers import CheckpointLoader
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.train.bundle import BundleTrainTask

from common.data.studies import readable
from common.engines.origin import check_origin
from common.errors import BadInput
from common.files import write_nifti

__all__ = ["AllStages", "StageInference", "StageTraining", "label_ids"]

logger = logging.getLogger(__name__)

# What a viewer offers to change. Of MONAI Label's others, the empty list of weights keeps 3D Slicer from the first
# training, and the rest are the bundle's to decide.
OPTIONS = ("device", "pretrained", "max_epochs", "val_split", "multi_gpu", "gpus")


def _merged(path: str, config: str, plan: str | None) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([config, *([plan] if plan else [])])
    parser["bundle_root"] = path
    return parser


def label_ids(path: str, plan: str | None = None) -> dict[str, int]:
    """The structures that a bundle segments, by name; background is none."""
    parser = _merged(path, str(Path(path) / "configs" / "inference.json"), plan)
    names = parser.get_parsed_content("postprocessing#labels")
    return {name: int(index) for index, name in names.items() if int(index) != 0}


class StageInference(BundleInferTask):
    """Prediction of a stage.

    Args:
        path: folder of the bundle.
        conf: of the app.
        plan: a config that is laid over the bundle's; None for none.
    """

    def __init__(self, path: str, conf: Mapping[str, str], plan: str | None = None) -> None:
        self.plan = plan
        self._checked: tuple[str, float] | None = None
        super().__init__(path, conf, load_strict=True)
        self._config.pop("model_filename", None)  # other weights than those of the training would go unchecked
        # The metadata are those of the bundle's own plan, and name its measurements among the labels.
        self.labels = label_ids(path, plan)

    def _load_bundle_config(self, path: str, config: str) -> ConfigParser:
        return _merged(path, config, self.plan)

    def check_weights(self) -> None:
        """Check that the weights were trained with this plan: MONAI Label loads whatever has the same shapes.

        Raises:
            BadInput: they were trained with another one.
        """
        path = self.get_path()
        if path and self._checked != (path, Path(path).stat().st_mtime):
            check_origin(path, "trained weights", own=True, config=self.bundle_config.get())
            self._checked = path, Path(path).stat().st_mtime

    def _get_network(self, device: str, data: Mapping[str, Any] | None) -> Any:
        self.check_weights()
        return super()._get_network(device, data)

    def writer(self, data: dict[str, Any], extension: str | None = None, dtype: Any = None) -> tuple[Any, Any]:
        """Write what is shown and, where that is to be saved, all targets' maps, to the request's ``map_folder``."""
        data.setdefault("result_compress", True)
        file, result = super().writer(data, extension, dtype)
        if data.get("save_label") and data.get("map_folder"):
            for key in [key for key in data if str(key).endswith("_pred")]:
                image = nib.Nifti1Image(data[key][0].cpu().numpy().astype(np.float32), np.asarray(data[key].affine))
                write_nifti(Path(data["map_folder"]) / f"{key.removesuffix('_pred')}.nii.gz", image)
        return file, result


class StageTraining(BundleTrainTask):
    """Training of a stage from the datastore's labels; the arguments are those of :class:`StageInference`."""

    def __init__(self, path: str, conf: Mapping[str, str], plan: str | None = None) -> None:
        self.plan = plan
        super().__init__(path, conf)

    def _load_bundle_config(self, path: str, config: str) -> ConfigParser:
        return _merged(path, config, self.plan)

    def config(self) -> dict[str, Any]:
        options = {**super().config(), "max_epochs": self._epochs}
        return {name: options[name] for name in OPTIONS}

    @property
    def _epochs(self) -> int:
        return self.bundle_config["train"]["trainer"]["max_epochs"]

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        return super().__call__({"max_epochs": self._epochs, **request}, datastore)

    def _fetch_datalist(self, request: Mapping[str, Any], datastore: Datastore) -> list[dict[str, Any]]:
        cases = sorted(super()._fetch_datalist(request, datastore), key=lambda case: case["image"])
        if not cases:
            raise BadInput("no image has a label yet: submit at least one label, then train.")
        # Kept for the overrides, which MONAI Label asks for without saying whose.
        self._studies = str(Path(cases[0]["label"]).parents[2])
        self._unlabeled = [datastore.get_image_uri(name) for name in datastore.get_unlabeled_images()]
        return cases

    def _load_checkpoint(self, model_pytorch: str, pretrained: bool, train_handlers: list[dict[str, Any]]) -> None:
        if pretrained and Path(model_pytorch).exists():
            # Student and dual decoder begin with the weights of the stage before, and say so by a loader of their own.
            if not any(handler.get("_target_") == CheckpointLoader.__name__ for handler in train_handlers):
                try:
                    check_origin(model_pytorch, "weights to go on from", own=True, config=self.bundle_config.get())
                except BadInput as error:
                    raise BadInput(f"{error} To begin anew, train with `pretrained` false.") from error
            super()._load_checkpoint(model_pytorch, pretrained, train_handlers)

    def _update_overrides(self, overrides: dict[str, Any]) -> dict[str, Any]:
        overrides["dataset_dir"] = self._studies
        if "unlabeled_dataset" in self.bundle_config["train"]:
            unlabeled = readable(({"image": path} for path in self._unlabeled), self.bundle_config["channels"])
            if unlabeled:
                overrides["train#unlabeled_dataset#data"] = unlabeled
            logger.info("%d images without a label", len(unlabeled))
        return overrides

    def run_single_gpu(self, request: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
        files: Sequence[str] = [self.bundle_config_path, *([self.plan] if self.plan else [])]
        monai.bundle.run(run_id="run", meta_file=self.bundle_metadata_path, config_file=files, **overrides)


class AllStages(TrainTask):
    """All stages in turn, each from the weights of the one before, as one training.

    Args:
        stages: the stages by name, in order.
    """

    def __init__(self, stages: Mapping[str, StageTraining]) -> None:
        super().__init__("Teacher, student and dual decoder, one after the other")
        self.stages = stages

    def config(self) -> dict[str, Any]:
        return next(iter(self.stages.values())).config()

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        for name, stage in self.stages.items():
            logger.info("Stage %s", name)
            stage({**request, "model": name}, datastore)
        return {}
