"""Cases that each label one structure: teachers of one organ, the baselines, and the three systems, end to end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from bundle_runs import config, write_organ_teachers, write_partial_labels
from monai.bundle import ConfigParser

from common.data import load_section
from common.engines.organ_teachers import read_organ_teacher
from common.errors import find_bad_input

Workflow = Callable[..., None]
DYNAMIC_HEAD = {"network_def#_target_": "common.networks.dynamic_head.DynamicHeadNetwork"}
ONE_EPOCH = {"train#trainer#max_epochs": 1}


@pytest.fixture(scope="module")
def data(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms with the lumen labelled in the first training case, and the wall in the second."""
    return write_partial_labels(phantoms, tmp_path_factory.mktemp("partial") / "data")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for all runs: to make one takes longer than these trainings."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlruns.db'}"


@pytest.fixture
def workflow(workflow: Workflow, store: str) -> Workflow:
    return partial(workflow, tracking_uri=store)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    parser = ConfigParser.load_config_file(config("student", "train.json"))
    settings = {key: parser[key] for key in ("channels", "spacing", "intensity", "spatial_dims")}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teachers")
    return write_organ_teachers(folder, parser["labels"], patch_size=[16, 16, 16], **settings)


def folders(root: Path, name: str = "train") -> dict[str, str]:
    return {"output_dir": str(root / name), "ckpt_dir": str(root / "models")}


def recipe(name: str) -> str:
    return config("student", f"recipes/{name}.json")


def test_a_teacher_of_one_organ_from_training_to_inference(data: Path, workflow: Workflow, tmp_path: Path) -> None:
    shared = {"dataset_dir": str(data), "organ": "wall"}
    workflow("teacher", **shared, **ONE_EPOCH, **folders(tmp_path))
    state = torch.load(tmp_path / "models/model.pt", weights_only=True)["model"]
    assert state["segmentation_decoder.heads.0.weight"].shape[0] == 2
    assert json.loads((tmp_path / "models/model.json").read_text())["config"]["organ"] == "wall"

    workflow("teacher", names=("train.json", "evaluate.json"), **shared, **folders(tmp_path, "test"))
    summary = json.loads((tmp_path / "test/summary.json").read_text())
    assert list(summary["labels"]) == ["wall"]
    row = (tmp_path / "test/metrics.csv").read_text().splitlines()
    case = load_section(data / "datalist.json", "validation")[0]
    volume = float(row[1].split(",")[row[0].split(",").index("volume_ml_reference/wall")])
    assert volume == pytest.approx((np.asarray(nibabel.load(case["label"]).dataobj) == 2).sum() / 1000)

    workflow("teacher", names=("inference.json",), organ="wall", input=case["image"], **folders(tmp_path, "found"))
    found = json.loads(next((tmp_path / "found").glob("*.json")).read_text())
    assert list(found["volumes"]) == ["wall"]
    network, _ = read_organ_teacher(tmp_path / "models/model.pt", "wall")
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    for wrong in ("lumen", None):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            workflow("teacher", names=("inference.json",), organ=wrong, input=case["image"], **folders(tmp_path, "x"))
        assert f"organ: trained with wall, found {wrong}" in find_bad_input(caught.value)


def test_it_learns_from_the_cases_that_label_its_organ(data: Path, plan: Path) -> None:
    parser = ConfigParser()
    parser.read_config([config("teacher", "train.json"), str(plan)])
    parser.update({"dataset_dir": str(data), "organ": "wall", "device": "cpu"})
    dataset = parser.get_parsed_content("train#dataset")
    entries = load_section(data / "datalist.json", "training")
    assert [case["image"] for case in dataset.data] == [entries[1]["image"]]
    crops = [crop for _ in range(4) for crop in dataset[0]]
    assert {value for crop in crops for value in crop["label"].unique().tolist()} == {0, 1}
    assert all("annotated" not in crop for crop in crops)


def test_the_naive_baseline_forgets_what_is_unknown(data: Path, plan: Path) -> None:
    found = []
    for overlays in ([], [config("teacher", "baselines/unknown_is_background.json")]):
        parser = ConfigParser()
        parser.read_config([config("teacher", "train.json"), *overlays, str(plan)])
        parser.update({"dataset_dir": str(data), "device": "cpu", "batch_size": 2})
        batch = next(iter(parser.get_parsed_content("train#dataloader")))["labeled"]
        found.append(batch.get("annotated"))
    assert sorted(found[0]) == [[1], [2]], "the marginal loss is told"
    assert found[1] is None


@pytest.mark.parametrize(
    ("organ", "words"), [("heart", ["'heart'", "lumen, wall"]), ("lumen", ["1 cases", "'lumen'", "id 1"])]
)
def test_an_organ_that_cannot_be_learnt(
    organ: str, words: list[str], data: Path, workflow: Workflow, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    content = json.loads((copy / "datalist.json").read_text())
    content["training"] = content["training"][1:]
    (copy / "datalist.json").write_text(json.dumps(content))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        workflow("teacher", dataset_dir=str(copy), organ=organ, **folders(tmp_path))
    message = find_bad_input(caught.value)
    for word in words:
        assert word in message


SPOILED: dict[str, tuple[Any, list[str]]] = {
    "empty": ([], ["phantom_training_000", "`annotated` is []", "names no structure"]),
    "unknown": ([7], ["phantom_training_000", "['7']"]),
    "no list": (1, ["entry 0 of `training`", "list of label ids"]),
    "contradicts its label": ([2], ["phantom_training_000", "holds the ids [0, 1]", "`annotated` is [2]"]),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_a_case_says_of_its_label_must_be_true(name: str, data: Path, workflow: Workflow, tmp_path: Path) -> None:
    annotated, words = SPOILED[name]
    content = json.loads((data / "datalist.json").read_text())
    content["training"][0]["annotated"] = annotated
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    (copy / "datalist.json").write_text(json.dumps(content))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        workflow("student", recipe("dodnet"), dataset_dir=str(copy), **folders(tmp_path))
    message = find_bad_input(caught.value)
    for word in words:
        assert word in message
    assert not (tmp_path / "models/model.pt").exists()


@pytest.mark.parametrize("name", ["ms_kd", "co_training", "dodnet"])
def test_a_system_trains_resumes_and_predicts(
    name: str, data: Path, teachers: dict[str, str], workflow: Workflow, plan: Path, tmp_path: Path
) -> None:
    """Interrupted and resumed it ends with the same weights; its predictions are files like any other's."""
    settings: dict[str, Any] = {"dataset_dir": str(data)}
    if name != "dodnet":
        settings |= {"teacher_paths": teachers}
    workflow("student", recipe(name), **settings, **folders(tmp_path / "whole"))
    crash = tmp_path / "crash.json"
    crash.write_text(json.dumps({"+train#handlers": [{"_target_": "bundle_runs.Crash", "after_iteration": 3}]}))
    with pytest.raises(RuntimeError):  # in the second of two epochs
        workflow("student", recipe(name), str(crash), **settings, **folders(tmp_path / "cut"))
    assert not (tmp_path / "cut/models/model.pt").exists()
    workflow("student", recipe(name), resume=True, **settings, **folders(tmp_path / "cut"))
    states = [torch.load(tmp_path / run / "models/model.pt", weights_only=True)["model"] for run in ("whole", "cut")]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    record = json.loads((tmp_path / "whole/models/model.json").read_text())
    assert list(record["parents"]) == ([] if name == "dodnet" else ["lumen", "wall"])

    evaluated = {**folders(tmp_path / "whole", "test"), "dataset_dir": str(data)}
    workflow("student", recipe(name), names=("train.json", "evaluate.json"), **evaluated)
    summary = json.loads((tmp_path / "whole/test/summary.json").read_text())
    assert list(summary["labels"]) == ["lumen", "wall"]

    case = load_section(data / "datalist.json", "validation")[0]
    use = {**folders(tmp_path / "whole", "found"), "input": case["image"]}
    workflow("student", names=("inference.json",), **use, **(DYNAMIC_HEAD if name == "dodnet" else {}))
    predicted = nibabel.load(next((tmp_path / "whole/found").glob("*_seg.nii.gz")))
    assert predicted.shape == nibabel.load(case["image"]).shape


def test_completed_labels_are_files_beside_the_run(
    data: Path, teachers: dict[str, str], workflow: Workflow, tmp_path: Path
) -> None:
    shared = {"dataset_dir": str(data), **ONE_EPOCH}
    workflow("student", recipe("co_training"), teacher_paths=teachers, **shared, **folders(tmp_path))
    (datalist,) = (tmp_path / "train/completed").glob("*/datalist.json")
    for case in load_section(datalist, "training", ("label", "completed")):
        reference, completed = (np.asarray(nibabel.load(case[key]).dataobj) for key in ("label", "completed"))
        (known,) = case["annotated"]
        assert np.array_equal(completed == known, reference == known)
    # A datalist that names them needs no teachers any more.
    workflow("student", recipe("co_training"), datalist=str(datalist), **shared, **folders(tmp_path / "again"))
    first, again = (torch.load(path / "models/model.pt", weights_only=True) for path in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(value, again["model"][key]) for key, value in first["model"].items())


@pytest.mark.parametrize("name", ["ms_kd", "co_training"])
def test_a_system_without_its_teachers(name: str, data: Path, workflow: Workflow, tmp_path: Path) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        workflow("student", recipe(name), dataset_dir=str(data), **folders(tmp_path))
    assert "teacher_paths" in find_bad_input(caught.value)
