"""Tracking with MLflow, and the lineage that leads from a network back to what it was made from."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import monai
import torch
from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler

from .. import __version__
from ..engines.configuration import running_config
from ..engines.origin import read_record, trained_settings
from ..files import write_atomically
from ..networks import read_weights, state_digest

__all__ = ["Tracking", "read_lineage", "weights_digest"]

logger = logging.getLogger(__name__)
_LIMIT = 500  # characters of a parameter that every MLflow store takes


def weights_digest(path: str | Path) -> str:
    """Digest of the weights in a file, independent of how the file is packed."""
    return state_digest(read_weights(path))


def read_lineage(model_path: str | Path) -> dict[str, Any]:
    """What is known of the run that made some weights: its stage, run id, tracking address and digest.

    The record ``model.json`` beside the weights is believed only while its digest is that of the weights.
    """
    record = read_record(model_path)
    record.pop("config", None)
    return {"weights": weights_digest(model_path), **record}


class Tracking(MLFlowHandler):
    """MONAI's MLflow handler, which also keeps the config, the weights' digest, the pictures and the lineage.

    By default everything goes to an SQLite file in ``output_dir``. Beside the weights it writes ``model.json``, by
    which the next stage finds the run they came from.

    Args:
        stage: name of the bundle; the experiment's name.
        output_dir: folder of the run; its ``config.json`` holds the merged config, its pictures are logged.
        model_path: the weights that the run will write.
        parents: weights that the run starts from or learns from, by role: ``{"teacher": path}``.
        tracking_uri: an MLflow server; None for the SQLite file.
        evaluator: its metrics are logged in the same run.
        run_name: name of the run.
    """

    def __init__(
        self,
        stage: str,
        output_dir: str,
        model_path: str,
        parents: Mapping[str, str] | None = None,
        tracking_uri: str | None = None,
        evaluator: Engine | None = None,
        run_name: str | None = None,
    ) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        self.output_dir = Path(output_dir)
        self.model_path = Path(model_path)
        self.stage = stage
        self.evaluator = evaluator
        self.parents = {role: read_lineage(path) for role, path in (parents or {}).items() if path}
        self.uri = tracking_uri or f"sqlite:///{(self.output_dir / 'mlruns.db').resolve()}"
        self.config = running_config()
        if idist.get_rank() != 0:
            return  # a client makes its database at once, which only one process may do
        _quiet_migrations(self.uri)
        super().__init__(
            tracking_uri=self.uri,
            iteration_log=False,
            experiment_name=stage,
            run_name=run_name,
            experiment_param=self._parameters(),
            close_on_complete=False,
        )

    def _parameters(self) -> dict[str, str]:
        plain = {key: value for key, value in self.config.items() if not isinstance(value, Mapping)}
        versions = {"version": __version__, "monai": monai.__version__, "torch": torch.__version__}
        return {key: str(value)[:_LIMIT] for key, value in {**plain, **versions}.items()}

    def attach(self, engine: Engine) -> None:
        """Register with the trainer. Only the first process of a distributed run writes."""
        if idist.get_rank() != 0:
            return
        super().attach(engine)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(
                Events.COMPLETED,
                lambda evaluator: self._log_metrics(_finite(evaluator.state.metrics), engine.state.epoch),
            )

    def start(self, engine: Engine) -> None:
        """Open a new run and log what is known before training."""
        self._set_experiment()
        # MONAI would continue whatever run of the experiment is not finished: one that failed with parameters that
        # MLflow will not change, or one that another process is busy with.
        name = self.run_name or time.strftime("run_%Y%m%d_%H%M%S")
        self.cur_run = self.client.create_run(self.experiment.experiment_id, run_name=name)
        super().start(engine)
        for role, lineage in self.parents.items():
            for key in ("weights", "run_id", "tracking_uri"):
                if key in lineage:
                    self.client.set_tag(self.cur_run.info.run_id, f"parent.{role}.{key}", lineage[key])
        if self.config:
            path = self.output_dir / "config.json"
            write_atomically(path, json.dumps(self.config, indent=2))
            self.client.log_artifact(self.cur_run.info.run_id, str(path))

    def epoch_completed(self, engine: Engine) -> None:
        """Log the epoch's metrics."""
        self._log_metrics(_finite(engine.state.metrics), engine.state.epoch)

    def complete(self, engine: Engine) -> None:
        """Log the weights' digest and the pictures, and write the record beside the weights."""
        run_id = self.cur_run.info.run_id
        digest = weights_digest(self.model_path)
        self.client.set_tag(run_id, "weights", digest)
        record = {"stage": self.stage, "run_id": run_id, "tracking_uri": self.uri, "weights": digest}
        text = json.dumps({**record, "config": trained_settings(self.config), "parents": self.parents}, indent=2)
        write_atomically(self.model_path.with_suffix(".json"), text)
        for path in sorted(self.output_dir.glob("*.png")):
            self.client.log_artifact(run_id, str(path), "pictures")
        self.client.set_terminated(run_id, self.run_finish_status)

    def _fail(self, engine: Engine, error: BaseException) -> None:
        if self.cur_run is not None:
            self.client.set_terminated(self.cur_run.info.run_id, "FAILED")


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items() if float(value) == float(value)}


def _quiet_migrations(uri: str) -> None:
    # MLflow reports every migration of a new SQLite file in some thirty log lines, which bury the training's own.
    if uri.startswith("sqlite:"):
        for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
            logging.getLogger(name).setLevel(logging.ERROR)
