from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.handlers import MLFlowHandler
from sqlalchemy.exc import OperationalError

from common.engines import SemiSupervisedTrainer
from common.errors import BadInput, find_bad_input
from common.handlers import Checkpoint, Tracking, read_lineage, weights_digest
from common.handlers.tracking import EvaluationTracking
from common.methods import Method
from common.networks import save_weights, state_digest
from common.provenance import DataDigests


class Line(Method):
    """Its loss is 3, then 1 ...; it may fail at a step."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.network = torch.nn.Linear(1, 1)
        self.fail_at = fail_at

    def forward(self, batch, optimizer=""):
        if self.step == self.fail_at:
            raise BadInput("case_3.nii.gz: can't be read.")
        return {"loss": self.network.weight.sum() * 0 + 3 - 2 * self.step, "kept/wall": torch.tensor(math.nan)}


class Validation:
    """An evaluator that finds 0.25, then NaN."""

    def __init__(self) -> None:
        self.values = iter([0.25, math.nan])
        self.evaluator = Engine(lambda engine, batch: engine.state.metrics.update(val_mean_dice=next(self.values)))

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.evaluator.run([0], 1))


class Picture:
    """Saves a picture when training completes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, lambda: (self.folder / "curves.png").write_bytes(b"PNG"))


def with_database(folder: Path, template: Path | None) -> None:
    """A new database takes MLflow seconds to make, a copy nothing."""
    if template is not None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(template, folder / "mlruns.db")


def train(
    folder: Path, stage: str, learning_rate: float = 0.1, fail_at: int | None = None, resume: bool = False, **settings
) -> Path:
    """Two epochs of one step, configured as a bundle is; returns the weights' path."""
    output, model = folder / "output", folder / "models" / "model.pt"
    validation = Validation()
    parser = ConfigParser(
        {
            "learning_rate": learning_rate,
            "patch_size": [32, 32, 32],
            "long": "x" * 6000,
            "doubled": "$2 * @learning_rate",
            "network_def": {"features": [4, 8]},
            "resume": resume,
            "method": {
                "_comment": "what it is",
                "weight": "@learning_rate",
                "stages": "@network_def#features",
                "network": "@network_def",
                "unknown": "@nowhere",
                "losses": [{"_target_": "a.b", "classes": [1, 2]}, {"odd [key]": None}],
            },
            "many": {f"n{index}": index for index in range(250)},
            "evaluator": validation.evaluator,
            "tracking": {
                "_target_": "common.handlers.Tracking",
                "stage": stage,
                "output_dir": str(output),
                "model_path": str(model),
                "evaluator": "@evaluator",
                **settings,
            },
        }
    )
    method = Line(fail_at)
    optimizer = torch.optim.SGD(method.parameters(), lr=learning_rate)
    state = {"method": method, "optimizer": optimizer}
    checkpoint = Checkpoint(state, method.network, str(output), str(model), resume)
    handlers = [validation, Picture(output), checkpoint, parser.get_parsed_content("tracking")]
    SemiSupervisedTrainer("cpu", 2, [{}], method, optimizer, False, train_handlers=handlers).run()
    return model


def client_of(folder: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{folder / 'output' / 'mlruns.db'}")


def runs(folder: Path, stage: str) -> list[Run]:
    client = client_of(folder)
    experiment = client.get_experiment_by_name(stage)
    return client.search_runs([experiment.experiment_id], order_by=["attribute.start_time ASC"])


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A new, empty database."""
    path = tmp_path_factory.mktemp("template") / "mlruns.db"
    client = MlflowClient(tracking_uri=f"sqlite:///{path}")
    client._tracking_client.store.engine.dispose()
    return path


@pytest.fixture
def folder(tmp_path, template) -> Path:
    """A run's folder with an empty database in its output."""
    with_database(tmp_path / "output", template)
    return tmp_path


@pytest.fixture(scope="module")
def chain(tmp_path_factory, template) -> dict[str, Any]:
    """A teacher, and a student that starts from it; run in a folder of their own, to see what is left there."""
    root = tmp_path_factory.mktemp("chain")
    (root / "here").mkdir()
    with_database(root / "student" / "output", template)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "here")
        teacher = train(root / "teacher", "teacher")
        student = train(root / "student", "student", parents={"teacher": str(teacher), "none": None})
        left = [path.name for path in (root / "here").iterdir()]
    (teacher_run,) = runs(root / "teacher", "teacher")
    (student_run,) = runs(root / "student", "student")
    return {
        "root": root,
        "teacher": teacher,
        "student": student,
        "teacher_run": teacher_run,
        "student_run": student_run,
        "left": left,
    }


def test_everything_is_under_the_output_folder(chain):
    assert chain["left"] == []
    root = chain["root"]
    assert (root / "teacher" / "output" / "mlruns.db").is_file()
    for name in ("teacher", "student"):
        assert f"{root / name / 'output'}" in chain[f"{name}_run"].info.artifact_uri
        assert sorted(path.name for path in (root / name).iterdir()) == ["models", "output"]


def test_parameters(chain):
    parameters = chain["teacher_run"].data.params
    assert parameters["learning_rate"] == "0.1"
    assert parameters["doubled"] == "$2 * @learning_rate"
    assert parameters["patch_size"] == "[32, 32, 32]"
    assert parameters["long"] == "x" * 500
    assert parameters["torch"] == torch.__version__
    assert {"version", "monai"} <= parameters.keys()


def test_parameters_within_the_config(chain):
    parameters = chain["teacher_run"].data.params
    assert parameters["network_def/features"] == "[4, 8]"
    assert parameters["method/weight"] == "0.1", "what the reference stands for"
    assert parameters["method/stages"] == "[4, 8]"
    assert parameters["method/losses/0/_target_"] == "a.b"
    assert parameters["method/losses/0/classes"] == "[1, 2]"
    assert parameters["method/losses/1/odd__key_"] == "None"
    assert not {"method/network", "method/unknown"} & parameters.keys(), "no values, but parts of the config"
    assert not [name for name in parameters if "_comment" in name]
    assert [parameters[f"many/n{index}"] for index in range(250)] == [str(index) for index in range(250)]


def test_metrics_by_epoch(chain):
    client, run_id = client_of(chain["root"] / "teacher"), chain["teacher_run"].info.run_id
    losses = [(metric.step, metric.value) for metric in client.get_metric_history(run_id, "train/loss")]
    assert losses == [(1, 3.0), (2, 1.0)]
    dice = [(metric.step, metric.value) for metric in client.get_metric_history(run_id, "val_mean_dice")]
    assert dice == [(1, 0.25)], "a figure that does not exist is not logged"
    assert "train/kept/wall" not in chain["teacher_run"].data.metrics


def test_config_and_pictures_are_kept(chain):
    client, run_id = client_of(chain["root"] / "teacher"), chain["teacher_run"].info.run_id
    assert {item.path for item in client.list_artifacts(run_id)} == {"config.json", "pictures"}
    assert [item.path for item in client.list_artifacts(run_id, "pictures")] == ["pictures/curves.png"]
    config = json.loads((chain["root"] / "teacher" / "output" / "config.json").read_text())
    assert config["network_def"] == {"features": [4, 8]}
    assert config["tracking"]["stage"] == "teacher"


def test_weights_digest_and_record(chain):
    digest = weights_digest(chain["teacher"])
    run = chain["teacher_run"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["weights"] == digest
    record = json.loads(chain["teacher"].with_suffix(".json").read_text())
    assert record == {
        "stage": "teacher",
        "run_id": run.info.run_id,
        "tracking_uri": f"sqlite:///{chain['root'] / 'teacher' / 'output' / 'mlruns.db'}",
        "weights": digest,
        "config": {"patch_size": [32, 32, 32], "network_def": {"features": [4, 8]}},
        "parents": {},
    }


@pytest.mark.parametrize("select", ["last", "best"])
def test_the_record_has_the_entropies_of_the_weights_that_are_used(folder, select):
    """The best are those of the first of two epochs, which are not those that training ends with."""
    method, entropies = Line(), iter([(0.1, 0.3), (0.5, 0.7)])

    def validate(engine, batch):
        engine.state.metrics["val_mean_dice"] = 1 - method.network.weight.item() ** 2
        images = (MetaTensor(torch.zeros(1, 2), meta={"filename_or_obj": name}) for name in ("a.nii", "b.nii"))
        return [{"image": image, "entropy": value} for image, value in zip(images, next(entropies), strict=True)]

    evaluator = Engine(validate)
    evaluator.network, evaluator.metric_cmp_fn = method.network, lambda current, best: current > best
    evaluator.state.key_metric_name = "val_mean_dice"
    with torch.no_grad():
        method.network.weight.zero_()

    class Validate:
        def attach(self, engine):
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: (evaluator.run([0], 1), self.move()))

        def move(self):
            with torch.no_grad():
                method.network.weight.add_(1 if method.network.weight.item() == 0 else 0)

    output, model = str(folder / "output"), folder / "models" / "model.pt"
    checkpoint = Checkpoint({"method": method}, method.network, output, str(model), False, select, evaluator)
    handlers = [Validate(), checkpoint, Tracking("teacher", output, str(model), evaluator=evaluator)]
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    SemiSupervisedTrainer("cpu", 2, [{}], method, optimizer, False, train_handlers=handlers).run()
    mean = {"last": 0.6, "best": 0.2}[select]
    record = json.loads(model.with_suffix(".json").read_text())
    assert record["entropy"] == {"mean": pytest.approx(mean), "sd": pytest.approx(0.2 / math.sqrt(2)), "n": 2}
    assert "entropy" not in read_lineage(model)


def test_a_student_names_its_teacher(chain):
    tags = chain["student_run"].data.tags
    assert tags["parent.teacher.run_id"] == chain["teacher_run"].info.run_id
    assert tags["parent.teacher.weights"] == weights_digest(chain["teacher"])
    assert tags["parent.teacher.tracking_uri"].endswith("teacher/output/mlruns.db")
    assert not [name for name in tags if name.startswith("parent.none")]
    lineage = read_lineage(chain["student"])
    assert lineage["stage"] == "student"
    assert lineage["parents"]["teacher"]["run_id"] == chain["teacher_run"].info.run_id


def test_failed_runs_are_marked_and_do_not_stand_in_the_way(folder):
    """The next run in that folder has another learning rate, which a run can't change once it is logged."""
    tmp_path = folder
    with pytest.raises(BadInput, match="case_3"):
        train(tmp_path, "teacher", fail_at=1)
    (failed,) = runs(tmp_path, "teacher")
    assert failed.info.status == "FAILED"
    assert failed.data.metrics["train/loss"] == 3.0, "what was known before it failed"
    assert not (tmp_path / "models" / "model.json").exists()
    train(tmp_path, "teacher", learning_rate=0.01)
    first, second = runs(tmp_path, "teacher")
    assert first.info.run_id == failed.info.run_id
    assert (first.info.status, first.data.params["learning_rate"]) == ("FAILED", "0.1")
    assert (second.info.status, second.data.params["learning_rate"]) == ("FINISHED", "0.01")


def test_a_database_that_is_none_is_named(tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mlruns.db").write_text("no database\n" * 200)
    with pytest.raises(RuntimeError) as caught:
        train(tmp_path, "teacher")
    message = find_bad_input(caught.value)
    assert str(tmp_path / "output" / "mlruns.db") in message
    assert "choose another output_dir or tracking_uri" in message


def test_a_disk_that_fills_up_is_told_by_the_databases_name(folder, monkeypatch):
    def fail(self: MlflowClient, *_: object, **__: object) -> None:
        raise OperationalError("INSERT INTO metrics", {}, OSError("disk I/O error"))

    monkeypatch.setattr(MlflowClient, "log_batch", fail)
    with pytest.raises(BadInput, match=r"mlruns\.db: MLflow can't record the run there \(.*disk I/O error"):
        train(folder, "teacher")
    assert not (folder / "models" / "model.pt").exists()


def test_a_servers_password_is_not_told(folder, monkeypatch):
    secret = "https://me:secret@server.org/mlflow"

    def refuse(*_: object, **__: object) -> None:
        raise MlflowException(f"{secret} is gone")

    monkeypatch.setattr(MLFlowHandler, "__init__", refuse)
    with pytest.raises(
        BadInput, match=r"tracking_uri https://server\.org/mlflow: .*MLFLOW_TRACKING_PASSWORD"
    ) as refused:
        Tracking("teacher", str(folder), "model.pt", tracking_uri=secret)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", secret)
    with pytest.raises(BadInput, match=r"https://server\.org/mlflow: .*gone") as unreachable:
        Tracking("teacher", str(folder), "model.pt")
    assert "secret" not in f"{refused.value} {unreachable.value}"


@pytest.mark.parametrize(
    ("address", "recorded"),
    [
        ("postgresql://me:secret@server.org:5432/mlflow", "postgresql://server.org:5432/mlflow"),
        ("sqlite:////data/a@b.db", "sqlite:////data/a@b.db"),
        ("https://server.org", "https://server.org"),
    ],
)
def test_records_hold_no_password(folder, monkeypatch, address, recorded):
    """A database has it in its address, which only the environment may hold."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setattr(Tracking, "_connect", lambda *_: None)
    tracking = Tracking("teacher", str(folder), "model.pt")
    assert (tracking.uri, tracking.place) == (address, recorded)


def test_a_resumed_training_goes_on_with_its_run(folder):
    """MLflow changes no parameter once it is logged, and `resume` is another one now."""
    with pytest.raises(BadInput, match="case_3"):
        train(folder, "teacher", fail_at=1)
    (failed,) = runs(folder, "teacher")
    train(folder, "teacher", resume=True)
    (run,) = runs(folder, "teacher")
    assert (run.info.run_id, run.info.status) == (failed.info.run_id, "FINISHED")
    losses = client_of(folder).get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in losses] == [(1, 3.0), (2, 1.0)]
    assert run.data.params["resume"] == "False"
    assert read_lineage(folder / "models" / "model.pt")["run_id"] == run.info.run_id


@pytest.mark.parametrize("content", [None, "{", '{"run_id": "0123"}'])
def test_a_resumed_training_whose_run_is_lost_has_a_new_one(folder, caplog, content):
    with pytest.raises(BadInput, match="case_3"):
        train(folder, "teacher", fail_at=1)
    (folder / "output" / "run.json").unlink()
    if content is not None:
        (folder / "output" / "run.json").write_text(content)
    train(folder, "teacher", resume=True)
    assert [run.info.status for run in runs(folder, "teacher")] == ["FAILED", "FINISHED"]
    assert "MLflow gets a new one" in caplog.text


def interrupted(folder: Path, **settings: Any) -> dict[str, Any]:
    """The record of a run that has failed in its second epoch."""
    with pytest.raises(BadInput, match="case_3"):
        train(folder, "teacher", fail_at=1, **settings)
    return json.loads((folder / "output" / "run.json").read_text())


def test_what_mlflow_has_missed_is_logged_when_the_run_is_resumed(folder, monkeypatch):
    """A run may be killed between the checkpoint of an epoch and the way of its figures to MLflow."""
    with monkeypatch.context() as patch:
        patch.setattr(Tracking, "epoch_completed", lambda *_: None)
        interrupted(folder)
    (folder / "output" / "history.json").write_text(json.dumps({"train/loss": [[1, 3.0]], "val_mean_dice": []}))
    train(folder, "teacher", resume=True)
    (run,) = runs(folder, "teacher")
    losses = client_of(folder).get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in losses] == [(1, 3.0), (2, 1.0)]


def test_a_run_that_is_resumed_with_other_settings_says_so(folder, caplog):
    before = interrupted(folder)
    train(folder, "teacher", learning_rate=0.2, resume=True)
    record = json.loads((folder / "output" / "run.json").read_text())
    assert (record["config"], record["made_with"]) == (before["config"], before["made_with"])
    (resumed,) = record["resumed"]
    assert resumed["after_epoch"] == 1
    assert "learning_rate: 0.1 in the record, 0.2 here" in resumed["changed"]
    assert "learning_rate: 0.1 in the record, 0.2 here" in caplog.text
    assert record["weights"] == weights_digest(folder / "models" / "model.pt")


def test_a_run_that_is_resumed_with_another_teacher_says_so(folder, caplog):
    teacher = folder / "teacher.pt"
    save_weights({"weight": torch.zeros(1)}, teacher)
    with pytest.raises(BadInput, match="case_3"):
        train(folder, "student", fail_at=1, parents={"teacher": str(teacher)})
    save_weights({"weight": torch.ones(1)}, teacher)
    train(folder, "student", resume=True, parents={"teacher": str(teacher)})
    (resumed,) = json.loads((folder / "output" / "run.json").read_text())["resumed"]
    assert [words for words in resumed["changed"] if words.startswith("weights of teacher: ")]
    assert "weights of teacher: " in caplog.text


@pytest.mark.parametrize("changed", [True, False])
def test_a_run_that_is_resumed_on_other_data_says_so(folder, caplog, monkeypatch, changed):
    result = DataDigests.result
    monkeypatch.setattr(DataDigests, "result", lambda self, wait: result(self))
    datalist = folder / "datalist.json"
    datalist.write_text(json.dumps({"training": [{"image": "image.nii.gz"}]}))
    (folder / "image.nii.gz").write_text("voxels")
    data = interrupted(folder, datalist=str(datalist))["data"]
    assert list(data["files"]) == ["image.nii.gz"]
    (folder / "image.nii.gz").write_text("other voxels" if changed else "voxels")
    train(folder, "teacher", resume=True, datalist=str(datalist))
    record = json.loads((folder / "output" / "run.json").read_text())
    assert record["data"] == data
    (resumed,) = record["resumed"]
    assert ("the data" in resumed["changed"]) == changed
    assert ("The data have changed" in caplog.text) == changed


def evaluate(model: Path, output: Path, **settings) -> EvaluationTracking:
    """An evaluation of one case, whose figures a handler finds that comes after the tracking."""
    output.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "metrics.csv", "median_overview.png", "case_1_overview.png"):
        (output / name).write_text(name)
    evaluator = Engine(lambda engine, batch: None)
    handler = EvaluationTracking("teacher", str(output), str(model), **settings)
    handler.attach(evaluator)
    figures = {"mean_dice": 0.75, "hd95/wall": math.nan}
    evaluator.add_event_handler(Events.EPOCH_COMPLETED, lambda: evaluator.state.metrics.update(figures))
    evaluator.run([0], 1)
    return handler


def test_an_evaluation_lies_beside_the_training_of_its_weights(folder):
    model = train(folder, "teacher")
    (training,) = runs(folder, "teacher")
    evaluate(model, folder / "test")
    _, run = runs(folder, "teacher")
    assert (run.info.run_name, run.info.status) == ("evaluation", "FINISHED")
    assert run.data.metrics == {"mean_dice": 0.75}
    assert run.data.tags["model.weights"] == weights_digest(model)
    assert run.data.tags["model.run_id"] == training.info.run_id
    kept = sorted(item.path for item in client_of(folder).list_artifacts(run.info.run_id))
    assert kept == ["median_overview.png", "metrics.csv", "summary.json"]
    assert json.loads((folder / "output" / "run.json").read_text())["run_id"] == training.info.run_id
    assert not (folder / "test" / "mlruns.db").exists()


def test_an_evaluation_of_weights_from_elsewhere_has_its_own_database(tmp_path, template, weights):
    record = {"weights": weights_digest(weights), "tracking_uri": f"sqlite:///{tmp_path}/gone/mlruns.db", "run_id": "1"}
    weights.with_suffix(".json").write_text(json.dumps(record))
    with_database(tmp_path / "test", template)
    assert evaluate(weights, tmp_path / "test").uri == f"sqlite:///{tmp_path}/test/mlruns.db"
    assert not (tmp_path / "gone").exists()
    record["tracking_uri"] = "https://another.server"
    weights.with_suffix(".json").write_text(json.dumps(record))
    assert evaluate(weights, tmp_path / "test").uri == f"sqlite:///{tmp_path}/test/mlruns.db", "nobody asked for it"


def test_an_evaluation_that_fails_is_marked(tmp_path, template, weights):
    with_database(tmp_path / "output", template)
    evaluator = Engine(lambda engine, batch: 1 / 0)
    EvaluationTracking("teacher", str(tmp_path / "output"), str(weights)).attach(evaluator)
    with pytest.raises(ZeroDivisionError):
        evaluator.run([0], 1)
    (run,) = runs(tmp_path, "teacher")
    assert run.info.status == "FAILED"


def test_the_record_names_the_server_that_the_environment_sets(folder, monkeypatch):
    """MONAI's handler lets it win over the config."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'output' / 'mlruns.db'}")
    model = train(folder, "teacher", tracking_uri="sqlite:////nowhere/else.db")
    assert read_lineage(model)["tracking_uri"] == f"sqlite:///{folder / 'output' / 'mlruns.db'}"


TELEMETRY = """
import os, sys
import monai
from mlflow.telemetry import get_telemetry_client
before = get_telemetry_client() is not None
from common.handlers import Tracking
Tracking("teacher", sys.argv[1], sys.argv[1] + "/model.pt")
print(before, get_telemetry_client() is not None, os.environ["MLFLOW_DISABLE_TELEMETRY"])
"""


def test_mlflow_reports_nothing(folder):
    """In a process of its own, without what tells MLflow that this is a test."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", TELEMETRY, str(folder / "output")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.stdout.split("\n")[-2:] == ["True False true", ""], done.stderr


def test_what_the_user_says_of_reports_stands(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    monkeypatch.setattr("mlflow.telemetry.set_telemetry_client", lambda: pytest.fail("it is to be as it was"))
    Tracking("teacher", str(folder / "output"), str(folder / "model.pt"))
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


@pytest.mark.parametrize("kind", [Tracking, EvaluationTracking])
def test_only_the_first_process_tracks(tmp_path, weights, monkeypatch, kind):
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    engine = Engine(lambda engine, batch: None)
    kind("teacher", str(tmp_path / "output"), str(weights)).attach(engine)
    engine.run([0], 1)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["model.pt"]


@pytest.fixture
def weights(tmp_path) -> Path:
    save_weights({"weight": torch.arange(3.0)}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_digest_is_that_of_the_weights_however_they_are_packed(weights):
    digest = weights_digest(weights)
    assert digest == state_digest({"weight": torch.arange(3.0)})
    torch.save({"weight": torch.arange(3.0)}, weights)
    assert weights_digest(weights) == digest
    save_weights({"weight": torch.tensor([0.0, 1.0, 2.0001])}, weights)
    assert weights_digest(weights) != digest


def test_record_beside_the_weights_is_believed_while_it_is_theirs(weights):
    record = weights.with_suffix(".json")
    known = {"stage": "teacher", "run_id": "abc", "weights": weights_digest(weights)}
    record.write_text(json.dumps(known))
    assert read_lineage(weights) == known
    save_weights({"weight": torch.zeros(3)}, weights)
    assert read_lineage(weights) == {"weights": weights_digest(weights)}, "a stale record names the wrong run"


@pytest.mark.parametrize("content", [None, "", "{", '{"stage": "teacher"}', "[1, 2]", '"text"'])
def test_record_that_is_missing_or_damaged(weights, content):
    if content is not None:
        weights.with_suffix(".json").write_text(content)
    assert read_lineage(weights) == {"weights": weights_digest(weights)}


def test_a_parent_that_is_not_there_is_said_before_anything_is_made(tmp_path):
    with pytest.raises(BadInput, match="no such weights file"):
        Tracking(
            "student", str(tmp_path / "output"), str(tmp_path / "model.pt"), {"teacher": str(tmp_path / "none.pt")}
        )
