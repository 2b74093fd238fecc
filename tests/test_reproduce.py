"""Trainings through MONAI's command line, repeated from their records."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from bundle_runs import PLAN, SHORT, config, run

from common.__main__ import main
from common.data import generate_phantoms
from common.handlers import weights_digest
from common.networks import SegmentationNetwork, save_weights

Reproduce = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a student's training, with its data, its teacher, and the weights that it went on from."""
    root = tmp_path_factory.mktemp("reproduce")
    generate_phantoms(root / "data", labeled=2, unlabeled=2, validation=1, shape=(24, 24, 20), seed=1, progress=False)
    widths = [PLAN[key] for key in ("features", "kernel_sizes", "strides")]
    for seed, name in enumerate(("teacher.pt", "start.pt")):
        torch.manual_seed(seed)
        save_weights(SegmentationNetwork(3, 1, 3, *widths), root / name)
    loader = {  # as MONAI Label has a bundle go on from its own weights
        "_target_": "CheckpointLoader",
        "load_path": str(root / "start.pt"),
        "load_dict": {"model": "@network"},
    }
    (root / "plan.json").write_text(json.dumps({**PLAN, "+train#handlers": [loader]}))
    settings = {
        **SHORT,
        "seed": 5,
        "num_workers": 1,
        "dataset_dir": str(root / "data"),
        "teacher_path": str(root / "teacher.pt"),
        "output_dir": str(root / "run" / "train"),
        "ckpt_dir": str(root / "run" / "models"),
    }
    done = run([config("student", "train.json"), str(root / "plan.json")], settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return root


@pytest.fixture
def record(trained: Path) -> dict[str, Any]:
    return json.loads((trained / "run" / "train" / "run.json").read_text())


@pytest.fixture
def reproduce(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Reproduce:
    """The command's exit code and what it says, of a record or the run itself."""

    def call(*options: str, record: dict[str, Any] | None = None) -> tuple[int, str]:
        path = trained / "run"
        if record is not None:
            path = tmp_path / "record.json"
            path.write_text(json.dumps(record))
        code = main(["reproduce", str(path), "--output", str(tmp_path / "again"), *options])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def test_the_record_says_what_it_takes(record: dict[str, Any], trained: Path) -> None:
    assert (record["stage"], record["seed"], record["device"], record["amp"]) == ("student", 5, "cpu", "false")
    assert record["num_workers"] == 1
    assert {"-m", "monai.bundle", "run", "--seed", "--config_file"} <= set(record["command"])
    assert Path(record["folder"]).is_dir()
    assert record["config"]["features"] == PLAN["features"]
    made_with = record["made_with"]
    assert made_with["torch"] == torch.__version__.split("+")[0] or made_with["torch"] == torch.__version__
    assert {"few-labels-bundles", "python", "monai", "pytorch-ignite", "numpy", "commit"} <= made_with.keys()
    assert made_with["threads"] == 1
    for role in ("teacher", "start"):
        assert record["parents"][role]["weights"] == weights_digest(trained / f"{role}.pt")
    assert record["weights"] == weights_digest(trained / "run" / "models" / "model.pt")
    listed = json.loads((trained / "data" / "datalist.json").read_text())
    entries = [entry for section in ("training", "unlabeled", "validation") for entry in listed[section]]
    names = {entry[key] for entry in entries for key in ("image", "label") if key in entry}  # a student reads no more
    files = {name: trained / "data" / name for name in names}
    assert len(files) == 8
    found = record["data"]["files"]
    assert found == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def test_names_of_cases_stay_in_the_folder(record: dict[str, Any], trained: Path) -> None:
    """MLflow may be somebody else's server, and the record beside the weights is what is packed."""
    client = mlflow.MlflowClient(record["tracking_uri"])
    found = client.get_run(record["run_id"])
    assert found.data.tags["data"]
    told = [str(found.data.to_dictionary()), (trained / "run" / "models" / "model.json").read_text()]
    told += [(trained / "run" / "train" / "config.json").read_text()]
    assert "phantom_training_000" in json.dumps(record)
    assert not [text for text in told if "phantom_training_000" in text]
    artifacts = {item.path for item in client.list_artifacts(record["run_id"])}
    assert "run.json" not in artifacts


def test_a_repetition_has_the_same_weights(reproduce: Reproduce, tmp_path: Path, trained: Path) -> None:
    code, said = reproduce("--run")
    assert code == 0, said
    assert "versions, code and machine: as in the record" in said
    assert "data: 8 files as in the record; weights of teacher, too; weights of start, too" in said
    assert "weights: the same as in the record, bit for bit" in said
    digests = [weights_digest(folder / "models" / "model.pt") for folder in (trained / "run", tmp_path / "again")]
    assert digests[0] == digests[1]
    code, said = reproduce()
    assert code == 1
    assert "something is there already" in said


def test_the_command_is_printed(reproduce: Reproduce, tmp_path: Path) -> None:
    code, said = reproduce()
    assert code == 0
    command = said.splitlines()[-1]
    assert re.search(r"OMP_NUM_THREADS=1 python -m monai\.bundle run --config_file \S+/again/config\.json ", command)
    for words in (f"--output_dir {tmp_path}/again", f"--ckpt_dir {tmp_path}/again/models", "--device cpu --amp false"):
        assert words in command
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["config.json"]


def test_other_data_are_named(reproduce: Reproduce, trained: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(trained / "data", tmp_path / "data")
    datalist = str(moved / "datalist.json")
    code, said = reproduce("--datalist", datalist)
    assert code == 0, said
    assert f"--dataset_dir {moved} --datalist {datalist}" in said
    image = next((moved / "images").glob("*training_000*"))
    image.write_bytes(image.read_bytes() + b"\0")
    next((moved / "labels").glob("*training_001*")).unlink()
    code, said = reproduce("--datalist", datalist, "--run")
    assert code == 1
    assert f"{image}: another content" in said
    assert re.search(r"labels/\S*training_001\S*: not here", said)
    assert "not run: with other data" in said
    (moved / "datalist.json").write_text((moved / "datalist.json").read_text() + " ")
    assert f"{datalist}: another content" in reproduce("--datalist", datalist)[1]
    (moved / "datalist.json").unlink()
    code, said = reproduce("--datalist", datalist)
    assert code == 1
    assert "say where it is with --datalist" in said


def test_other_weights_of_the_stage_before(
    reproduce: Reproduce, trained: Path, tmp_path: Path, record: dict[str, Any]
) -> None:
    shutil.copy(trained / "teacher.pt", tmp_path / "copy.pt")
    code, said = reproduce("--weights", f"teacher={tmp_path / 'copy.pt'}")
    assert code == 0, said
    assert f"--teacher_path {tmp_path / 'copy.pt'}" in said
    save_weights({"other": torch.zeros(1)}, tmp_path / "copy.pt")
    code, said = reproduce("--weights", f"teacher={tmp_path / 'copy.pt'}")
    assert code == 1
    assert f"teacher, {tmp_path / 'copy.pt'}: other weights" in said
    record["parents"]["teacher"]["path"] = str(tmp_path / "gone.pt")
    code, said = reproduce(record=record)
    assert code == 1
    assert "--weights teacher=FILE" in said
    code, said = reproduce("--weights", "student=x.pt")
    assert code == 1
    assert "of the roles of this run: teacher, start" in said


def test_weights_that_were_replaced_since(
    reproduce: Reproduce, trained: Path, tmp_path: Path, record: dict[str, Any]
) -> None:
    """Those that a training of MONAI Label went on from."""
    record["parents"]["start"]["path"] = str(trained / "run" / "models" / "model.pt")
    code, said = reproduce(record=record)
    assert code == 1
    assert "start, " in said
    assert "other weights" in said
    code, said = reproduce("--weights", f"start={trained / 'start.pt'}", record=record)
    assert code == 0, said
    number = next(n for n, item in enumerate(record["config"]["train"]["handlers"]) if "load_path" in item)
    assert f"--train#handlers#{number}#load_path {trained / 'start.pt'}" in said.replace("'", "")


def test_what_differs_here_is_said(reproduce: Reproduce, record: dict[str, Any]) -> None:
    record["made_with"].update({"torch": "1.2.3", "commit": "c" * 40, "device": "cuda"})
    record.update(device="cuda:1", amp="bf16", weights=None)
    record["resumed"] = [{"after_epoch": 3, "changed": ["learning_rate: 1 in the record, 2 here"]}]
    code, said = reproduce(record=record)
    assert code == 0, "other versions may well give the same weights"
    for words in ("torch: 1.2.3 in the record, ", f"commit: {'c' * 40} in the record", "not finished"):
        assert words in said
    assert "resumed after epoch 3" in said
    assert "learning_rate: 1 in the record" in said
    if not torch.cuda.is_available():
        assert "device: cuda in the record, cpu here" in said
        assert "--device cpu" in said
        assert "--amp" not in said


@pytest.mark.parametrize("same", [True, False])
def test_the_weights_are_compared(
    same: bool, reproduce: Reproduce, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = trained / "run" / "models" / "model.pt" if same else trained / "teacher.pt"

    def train(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "monai.bundle", "run"]
        (tmp_path / "again" / "models").mkdir()
        shutil.copy(source, tmp_path / "again" / "models" / "model.pt")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("common.reproduce.subprocess.run", train)
    monkeypatch.setattr("common.reproduce.environment", lambda *_: {})
    code, said = reproduce("--run")
    assert code == (0 if same else 1)
    assert ("bit for bit" in said) == same
    assert ("others than in the record" in said) != same


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"run_id": "0", "tracking_uri": "x"}'])
def test_a_record_that_is_none(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert main(["reproduce", str(tmp_path), "--output", str(tmp_path / "again")]) == 1
    assert "expected the" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
