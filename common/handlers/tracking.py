"""Tracking with MLflow, and the lineage that leads from a network back to what it was made from."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import monai
import torch
from ignite.engine import Engine, Events
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from monai.engines import Evaluator
from monai.handlers import MLFlowHandler

from .. import __version__
from ..engines.configuration import config_values, loaded_checkpoint, running_config
from ..engines.origin import trained_settings
from ..errors import BadInput
from ..files import write_atomically
from ..networks import read_record, read_weights, state_digest
from ..provenance import ROOT, DataDigests, different, environment
from .cases import case_file, cases_of, gather_cases, mean_and_spread, number
from .mlflow_store import SQLITE, failing_plainly, open_store, store_address, without_password

__all__ = ["EvaluationTracking", "Tracking", "read_lineage", "weights_digest"]

logger = logging.getLogger(__name__)
_LIMIT = 500  # characters of a parameter that every MLflow store takes
_KEY_LIMIT = 250  # characters of its name
_BATCH = 100  # parameters that a store takes at a time
RUN_FILE = "run.json"
_PRECISIONS: dict[Any, str] = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def weights_digest(path: str | Path) -> str:
    """Digest of the weights in a file, independent of how the file is packed."""
    return state_digest(read_weights(path))


def read_lineage(model_path: str | Path) -> dict[str, Any]:
    """What is known of the run that made some weights: its stage, run id, tracking address and digest.

    The record ``model.json`` beside the weights is believed only while its digest is that of the weights.
    """
    record = read_record(model_path)
    for key in ("config", "entropy"):
        record.pop(key, None)
    return record or {"weights": weights_digest(model_path)}


def _plainly(method: Callable[..., None]) -> Callable[..., None]:
    """A method of :class:`_Run` whose failure says which store can't be written rather than how."""

    @functools.wraps(method)
    def call(self: _Run, *arguments: Any, **named: Any) -> None:
        with failing_plainly(self.uri):
            method(self, *arguments, **named)

    return call


class _Run(MLFlowHandler):
    """One MLflow run of MONAI's handler, with the config as its parameters; only the first process writes."""

    # MONAI begins with None in both, and so says that there is never anything else.
    experiment: Any
    cur_run: Any

    def __init__(self, stage: str, output_dir: str, tracking_uri: str | None, run_name: str | None) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        self.output_dir = Path(output_dir)
        self.stage = stage
        if tracking_uri and tracking_uri != without_password(tracking_uri):
            raise BadInput(
                f"tracking_uri {without_password(tracking_uri)}: a user or password stands in it, which the run's "
                "config and record would tell. Set the environment variables MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD for a server, or MLFLOW_TRACKING_URI in place of tracking_uri."
            )
        self.uri = store_address(tracking_uri, self.output_dir / "mlruns.db")
        self.place = without_password(self.uri)  # for records
        self.config = running_config()
        if idist.get_rank() != 0:
            return  # a client makes its database at once, which only one process may do
        self._connect(run_name)

    @_plainly
    def _connect(self, run_name: str | None) -> None:
        open_store(self.uri)
        super().__init__(
            tracking_uri=self.uri,
            iteration_log=False,
            experiment_name=self.stage,
            run_name=run_name,
            experiment_param=self._parameters(),
            close_on_complete=False,
        )

    @_plainly
    def _log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        super()._log_metrics(metrics, step)

    def _parameters(self) -> dict[str, str]:
        values = config_values(self.config)
        values.update(version=__version__, monai=monai.__version__, torch=torch.__version__)
        return {key: str(value)[:_LIMIT] for key, value in values.items() if len(key) <= _KEY_LIMIT}

    def _log_params(self, params: dict[str, Any]) -> None:
        items = list(params.items())
        for first in range(0, len(items), _BATCH):
            super()._log_params(dict(items[first : first + _BATCH]))

    def attach(self, engine: Engine) -> None:
        """Register with the engine. Only the first process of a distributed run writes."""
        if idist.get_rank() != 0:
            return
        super().attach(engine)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    @_plainly
    def start(self, engine: Engine) -> None:
        """Open a run and log what is known before it."""
        self._set_experiment()
        # MONAI would continue whatever run of the experiment is not finished: one that failed with parameters that
        # MLflow will not change, or one that another process is busy with.
        name = self.run_name or time.strftime("run_%Y%m%d_%H%M%S")
        self.cur_run = self._interrupted(engine) or self.client.create_run(self.experiment.experiment_id, run_name=name)
        self._delete_exist_param_in_dict(self.experiment_param or {})
        super().start(engine)

    def _interrupted(self, engine: Engine) -> Run | None:
        """The run to continue, or None for a new one."""
        return None

    def _tag_origin(self, prefix: str, lineage: Mapping[str, Any]) -> None:
        for key in ("weights", "run_id", "tracking_uri"):
            if key in lineage:
                self.client.set_tag(self.cur_run.info.run_id, f"{prefix}.{key}", lineage[key])

    def epoch_completed(self, engine: Engine) -> None:
        """Log the epoch's metrics."""
        self._log_metrics(_finite(engine.state.metrics), engine.state.epoch)

    def _fail(self, engine: Engine, error: BaseException) -> None:
        if self.cur_run is None:
            return
        try:
            self.client.set_terminated(self.cur_run.info.run_id, "FAILED")
        except Exception as second:  # whatever it is, the first error is the one to be told
            logger.warning("MLflow was not told that the run failed: %s", second)


class Tracking(_Run):
    """MONAI's MLflow handler, which also keeps the config, the weights' digest, the pictures and the lineage.

    By default everything goes to an SQLite file in ``output_dir``. Beside the weights it writes ``model.json``, by
    which the next stage finds the run they came from. A training that is resumed continues its run, which ``run.json``
    in ``output_dir`` names. That file is the run's record, too, from which ``python -m common reproduce`` repeats it:
    command, seed, versions, commit, config, digests of the data and of the weights. It names files of the data, so it
    stays there: neither MLflow nor a packed bundle gets it. Parameters are all values of the config,
    ``train#trainer#max_epochs`` as ``train/trainer/max_epochs``. MLflow's own usage reports are off, unless
    ``MLFLOW_DISABLE_TELEMETRY`` is set.

    The record also has mean, standard deviation and number of the validation cases' ``entropy``, of these very weights,
    by which inference knows a case that is unusually uncertain. They are missing without a validation of them, as when
    the best ones are from before a training was interrupted.

    Args:
        stage: name of the bundle; the experiment's name.
        output_dir: folder of the run; its ``config.json`` holds the merged config, its pictures are logged.
        model_path: the weights that the run will write.
        parents: weights that the run starts from or learns from, by role: ``{"teacher": path}``.
        tracking_uri: an MLflow server; None for the SQLite file.
        evaluator: its metrics are logged in the same run.
        run_name: name of the run.
        datalist: of the data, whose digests go to the record.
        cases: the entries that are used, see :func:`~common.provenance.data_digests`.
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
        datalist: str | None = None,
        cases: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.model_path = Path(model_path)
        self.evaluator = evaluator
        self.datalist = datalist
        self.cases = cases
        paths, loaded = dict(parents or {}), loaded_checkpoint(running_config())
        if loaded:
            paths["start"] = loaded[1]
        self.parent_paths = {role: Path(path).resolve() for role, path in paths.items() if path}
        self.parents = {role: read_lineage(path) for role, path in self.parent_paths.items()}
        self.record: dict[str, Any] = {}
        self.digests: DataDigests | None = None
        self.entropies: list[dict[str, Any]] = []
        # Of the weights that were validated, by digest: which of them are used, the last or the best, others decide.
        self.validated: dict[str, dict[str, float | int]] = {}
        super().__init__(stage, output_dir, tracking_uri, run_name)

    def attach(self, engine: Engine) -> None:
        """Register with the trainer, after the :class:`Checkpoint` that resumes it."""
        super().attach(engine)
        if self.evaluator is not None:
            if idist.get_rank() == 0:
                self.evaluator.add_event_handler(
                    Events.COMPLETED,
                    lambda evaluator: self._log_metrics(_finite(evaluator.state.metrics), engine.state.epoch),
                )
            self.evaluator.add_event_handler(Events.EPOCH_STARTED, lambda: self.entropies.clear())
            self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._collect_entropies)
            self.evaluator.add_event_handler(Events.COMPLETED, self._note_entropies)

    def _collect_entropies(self, evaluator: Engine) -> None:
        cases: list[dict[str, Any]] = cases_of(evaluator) if isinstance(evaluator.state.output, (dict, list)) else []
        self.entropies += [
            {"file": case_file(case), "entropy": number(case["entropy"])} for case in cases if "entropy" in case
        ]

    def _note_entropies(self, evaluator: Evaluator) -> None:
        entropies = [row["entropy"] for row in gather_cases(self.entropies)]
        if entropies and idist.get_rank() == 0:
            network: Any = getattr(evaluator, "network")  # noqa: B009 (of every evaluator, though not declared)
            network = getattr(network, "module", network)  # without what distributes it
            self.validated[state_digest(network.state_dict())] = mean_and_spread(entropies)
            self._write_record()  # at once: a run that is resumed does not validate these weights again

    def _interrupted(self, engine: Engine) -> Run | None:
        if engine.state.epoch == 0:
            return None
        try:
            run_id = json.loads((self.output_dir / RUN_FILE).read_text())["run_id"]
            self.client.update_run(run_id, status="RUNNING")
            return self.client.get_run(run_id)
        except (OSError, ValueError, KeyError, MlflowException) as error:
            logger.warning("The run that is resumed is not found (%s): MLflow gets a new one", error)
            return None

    @_plainly
    def start(self, engine: Engine) -> None:
        """Open a run, or that which is resumed, and log what is known before training."""
        super().start(engine)
        run_id = self.cur_run.info.run_id
        self._begin_record(engine)
        if engine.state.epoch > 0:
            self._log_lost(engine)
        for role, lineage in self.parents.items():
            self._tag_origin(f"parent.{role}", lineage)
        if self.config:
            path = self.output_dir / "config.json"
            write_atomically(path, json.dumps(self.config, indent=2))
            self.client.log_artifact(run_id, str(path))

    def _begin_record(self, engine: Engine) -> None:
        """Write what is known of the run before it; of one that is resumed, add what has changed since it began."""
        device = getattr(engine.state, "device", "cpu")
        made_with = environment(device, idist.get_world_size())
        precision: Any = getattr(engine, "precision", None)
        streams = getattr(engine.state.dataloader, "streams", {})
        earlier = self._earlier_record() if engine.state.epoch > 0 else {}
        self.record = {
            "stage": self.stage,
            "command": sys.orig_argv,
            "folder": os.getcwd(),
            # A packed bundle's code lies in the bundle, not where the project is installed.
            "bundle_folder": str(ROOT.parent) if __package__.startswith("scripts.") else None,
            "seed": getattr(engine, "seed", None),
            "device": str(device),
            "amp": _PRECISIONS.get(precision, "false"),
            "num_workers": max((loader.num_workers for loader in streams.values()), default=0),
            "made_with": made_with,
            "config": self.config,
            "parents": {
                role: {"path": str(path), "weights": self.parents[role]["weights"]}
                for role, path in self.parent_paths.items()
            },
            "data": None,
            "resumed": [],
            "weights": None,
            "validated": {},
            **earlier,
            "run_id": self.cur_run.info.run_id,
            "tracking_uri": self.place,
        }
        self.validated = self.record["validated"]
        if earlier:
            configs = {**earlier["config"], "resume": self.config.get("resume")}, self.config
            before, now = map(config_values, configs)
            weights = (
                {f"weights of {role}": parent["weights"] for role, parent in parents.items()}
                for parents in (earlier["parents"], self.parents)
            )
            changed = [*different(before, now), *different(earlier["made_with"], made_with), *different(*weights)]
            self.record["resumed"].append({"after_epoch": engine.state.epoch, "changed": changed})
            if changed:
                logger.warning(
                    "The run is resumed with other settings, programs or weights to learn from than it was begun with, "
                    "so its own may not be those of one that nothing has stopped: %s",
                    "; ".join(changed),
                )
        if self.datalist is not None:
            self.digests = DataDigests(self.datalist, self.cases)
        self._write_record()
        self.client.set_tag(self.cur_run.info.run_id, "commit", str(made_with["commit"]))

    def _earlier_record(self) -> dict[str, Any]:
        try:
            record = json.loads((self.output_dir / RUN_FILE).read_text())
            return record if {"config", "made_with", "parents", "resumed"} <= record.keys() else {}
        except (OSError, ValueError):
            return {}

    def _write_record(self) -> None:
        write_atomically(self.output_dir / RUN_FILE, json.dumps(self.record, indent=2))

    def _add_digests(self, wait: bool) -> None:
        """Put the digests of the data into the record, once they are known."""
        data = self.digests.result(wait) if self.digests else None
        if data is None:
            return
        self.digests = None
        if self.record["data"] not in (None, data):
            logger.warning("The data have changed since the run that is resumed was begun")
            self.record["resumed"][-1]["changed"].append("the data")
        else:
            self.record["data"] = data
        self._write_record()
        # One digest of all, which names no file.
        digest = hashlib.sha256(json.dumps([data["sha256"], *sorted(map(str, data["files"].values()))]).encode())
        self.client.set_tag(self.cur_run.info.run_id, "data", digest.hexdigest())

    def _log_lost(self, engine: Engine) -> None:
        """Log the last epoch's figures, when the run was killed between its checkpoint and their way to MLflow."""
        run_id, epoch = self.cur_run.info.run_id, engine.state.epoch
        if any(metric.step == epoch for metric in self.client.get_metric_history(run_id, "train/loss")):
            return
        try:
            history = json.loads((self.output_dir / "history.json").read_text())
        except (OSError, ValueError):
            return
        figures = {name: dict(points).get(epoch) for name, points in history.items()}
        self._log_metrics({name: value for name, value in figures.items() if value is not None}, epoch)

    @_plainly
    def epoch_completed(self, engine: Engine) -> None:
        """Log the epoch's metrics, and the digests of the data when they are known."""
        super().epoch_completed(engine)
        self._add_digests(wait=False)

    @_plainly
    def complete(self, engine: Engine) -> None:
        """Log the weights' digest and the pictures, and write the record beside the weights."""
        run_id = self.cur_run.info.run_id
        digest = weights_digest(self.model_path)
        self.client.set_tag(run_id, "weights", digest)
        record = {"stage": self.stage, "run_id": run_id, "tracking_uri": self.place, "weights": digest}
        entropy = self.validated.get(digest)
        record.update({"entropy": entropy} if entropy and entropy["n"] > 1 else {})
        text = json.dumps({**record, "config": trained_settings(self.config), "parents": self.parents}, indent=2)
        write_atomically(self.model_path.with_suffix(".json"), text)
        self.record["weights"] = digest
        self._write_record()
        if self.digests and self.digests.result(wait=False) is None:
            logger.info("Waiting for the digests of the data, for the record; the weights are written")
        self._add_digests(wait=True)
        for path in sorted(self.output_dir.glob("*.png")):
            self.client.log_artifact(run_id, str(path), "pictures")
        self.client.set_terminated(run_id, self.run_finish_status)


class EvaluationTracking(_Run):
    """Log an evaluation as an MLflow run of its own, called ``evaluation``, that names the weights it judges.

    It goes to ``tracking_uri``; without one to the SQLite file that holds the weights' training, where that is on this
    machine and may be written, else to one in ``output_dir``. The tags ``model.weights`` and ``model.run_id`` are the
    weights' digest and the run that made them.

    Args:
        stage: name of the bundle; the experiment's name.
        output_dir: folder of the evaluation, of which ``summary.json``, ``metrics.csv`` and ``median_*.png`` are kept.
        model_path: the weights.
        tracking_uri: an MLflow server.
    """

    def __init__(self, stage: str, output_dir: str, model_path: str, tracking_uri: str | None = None) -> None:
        self.model = read_lineage(model_path)
        known = self.model.get("tracking_uri", "")
        if tracking_uri is None and known.startswith(SQLITE) and os.access(known.removeprefix(SQLITE), os.W_OK):
            tracking_uri = known
        super().__init__(stage, output_dir, tracking_uri, "evaluation")

    @_plainly
    def start(self, engine: Engine) -> None:
        """Open the run and log what is evaluated."""
        super().start(engine)
        self._tag_origin("model", self.model)
        if self.config:
            self.client.log_dict(self.cur_run.info.run_id, self.config, "config.json")

    def epoch_completed(self, engine: Engine) -> None:
        """Nothing: handlers that come later may add figures, too."""

    def _fail(self, engine: Engine, error: BaseException) -> None:
        super()._fail(engine, error)
        raise error  # which an engine that somebody listens to does not

    @_plainly
    def complete(self, engine: Engine) -> None:
        """Log the figures and files."""
        run_id = self.cur_run.info.run_id
        self._log_metrics(_finite(engine.state.metrics))
        for pattern in ("summary.json", "metrics.csv", "median_*.png"):
            for path in sorted(self.output_dir.glob(pattern)):
                self.client.log_artifact(run_id, str(path))
        self.client.set_terminated(run_id, self.run_finish_status)


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items() if float(value) == float(value)}
