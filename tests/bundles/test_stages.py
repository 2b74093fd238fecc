"""The three stages in a row, as a user runs them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import nibabel
import numpy as np
import pytest
import torch
from bundle_runs import BUNDLES, Chain, config, run
from matplotlib.image import imread

from common.errors import find_bad_input
from common.handlers import read_lineage
from common.networks import read_record


@pytest.mark.parametrize("bundle", BUNDLES)
def test_training_leaves_weights_checkpoint_curves_and_a_picture(bundle: str, chain: Chain) -> None:
    content = torch.load(chain.model(bundle), weights_only=True)
    assert set(content) == {"model"}
    assert all(torch.isfinite(value).all() for value in content["model"].values())
    assert [path.name for path in chain.model(bundle).parent.glob("*.pt")] == ["model.pt"]
    for name in ("checkpoint.pt", "config.json", "curves.png", "mlruns.db"):
        assert (chain.output(bundle) / name).is_file(), name
    (picture,) = chain.output(bundle).glob("*_overview*.png")
    # Image, reference, prediction, error, and below them the maps: reference, prediction, error.
    assert imread(picture).shape[:2] == ((680, 1280) if bundle == "dual_decoder" else (340, 1280))


def test_the_dual_decoder_keeps_the_students_segmentation(chain: Chain) -> None:
    student = torch.load(chain.model("student"), weights_only=True)["model"]
    dual = torch.load(chain.model("dual_decoder"), weights_only=True)["model"]
    assert set(student) < set(dual)
    assert all(torch.equal(dual[name], value) for name, value in student.items())
    teacher = torch.load(chain.model("teacher"), weights_only=True)["model"]
    assert not all(torch.equal(teacher[name], value) for name, value in student.items())


def test_lineage_leads_back_to_the_teacher(chain: Chain) -> None:
    for bundle, role in (("student", "teacher"), ("dual_decoder", "student")):
        record, parent = read_lineage(chain.model(bundle)), read_lineage(chain.model(role))
        client = mlflow.MlflowClient(f"sqlite:///{chain.output(bundle) / 'mlruns.db'}")
        tags = client.get_run(record["run_id"]).data.tags
        assert tags[f"parent.{role}.run_id"] == parent["run_id"]
        assert tags[f"parent.{role}.weights"] == parent["weights"]
        assert tags["weights"] == record["weights"]
        metrics = client.get_run(record["run_id"]).data.metrics
        assert "train/loss" in metrics
        assert "val_mean_dice" in metrics
        assert ("val_error" in metrics) == (bundle == "dual_decoder")


def test_weights_know_how_uncertain_they_are_on_the_validation_cases(chain: Chain) -> None:
    for bundle in BUNDLES:
        entropy = read_record(chain.model(bundle))["entropy"]
        assert entropy["n"] == 2
        assert 0 < entropy["mean"] < math.log(3)


def test_the_best_dual_decoder_is_that_of_the_smallest_error(
    chain: Chain, workflow: Callable[..., None], tmp_path: Path
) -> None:
    places = {"output_dir": str(tmp_path / "train"), "ckpt_dir": str(tmp_path / "models")}
    # The second epoch's steps are so large that the first must be the better one.
    second = {
        "train#lr_scheduler": "$torch.optim.lr_scheduler.LambdaLR(@train#optimizer, lambda step: 100.0 ** (step // 2))"
    }
    (tmp_path / "worse.json").write_text(json.dumps(second))
    workflow(
        "dual_decoder", str(tmp_path / "worse.json"), **{**chain.settings("dual_decoder"), **places, "select": "best"}
    )
    best = torch.load(tmp_path / "train" / "best.pt", weights_only=True)["model"]
    deployed = torch.load(tmp_path / "models" / "model.pt", weights_only=True)["model"]
    last = torch.load(tmp_path / "train" / "checkpoint.pt", weights_only=True)["state"]["method"]
    assert all(torch.equal(deployed[name], value) for name, value in best.items())
    assert not all(torch.equal(last[f"network.{name}"], value) for name, value in best.items() if "regression" in name)


@pytest.fixture(scope="module")
def turned(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validation image with its axes turned and flipped and another spacing."""
    source = nibabel.load(sorted((chain.data / "images").glob("*validation*"))[0])
    array = np.flip(np.transpose(np.asarray(source.dataobj), (2, 0, 1)), 0)
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = -1.2, 0.9, 1.1, 1.0
    affine[2, 3] = 30.0
    path = tmp_path_factory.mktemp("input") / "a case.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(array), affine), path)
    return path


@pytest.fixture(scope="module")
def predictions(chain: Chain, turned: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for bundle in ("student", "dual_decoder"):
        folders[bundle] = tmp_path_factory.mktemp(bundle)
        settings = {"input": str(turned), "output_dir": str(folders[bundle]), "device": "cpu"}
        done = run(
            [config(bundle, "inference.json"), str(chain.plan)],
            {**settings, "ckpt_dir": str(chain.model(bundle).parent)},
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return folders


def test_prediction_returns_to_the_inputs_grid(predictions: dict[str, Path], turned: Path) -> None:
    image = nibabel.load(turned)
    folder = predictions["dual_decoder"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "a case.json",
        "a case_seg.nii.gz",
        "a case_thickness.nii.gz",
    ]
    label, thickness = (nibabel.load(folder / f"a case_{name}.nii.gz") for name in ("seg", "thickness"))
    for volume in (label, thickness):
        assert volume.shape == image.shape
        assert np.allclose(volume.affine, image.affine, atol=1e-4)
    found, values = np.asarray(label.dataobj), np.asarray(thickness.dataobj)
    assert set(np.unique(found)) <= {0, 1, 2}
    assert not values[found != 2].any()
    numbers = json.loads((folder / "a case.json").read_text())
    voxel = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    for label_id, name in ((1, "lumen"), (2, "wall")):
        assert numbers["volumes"][name]["unit"] == "mL"
        assert numbers["volumes"][name]["value"] == pytest.approx((found == label_id).sum() * voxel, rel=1e-4)
    statistics = numbers["thickness"]["structures"]["wall"]
    assert set(statistics) >= {"mean", "median", "p5", "p95"}
    if (found == 2).any():
        assert statistics["mean"] == pytest.approx(values[found == 2].mean(), rel=1e-3)


def test_label_files_of_student_and_dual_decoder_are_equal(predictions: dict[str, Path]) -> None:
    student, dual = (nibabel.load(predictions[b] / "a case_seg.nii.gz") for b in ("student", "dual_decoder"))
    assert np.array_equal(np.asarray(student.dataobj), np.asarray(dual.dataobj))


def test_evaluation_writes_table_and_summary(chain: Chain, tmp_path: Path) -> None:
    done = run(
        [config("dual_decoder", "train.json"), config("dual_decoder", "evaluate.json"), str(chain.plan)],
        {
            "dataset_dir": str(chain.data),
            "output_dir": str(tmp_path),
            "ckpt_dir": str(chain.model("dual_decoder").parent),
            "device": "cpu",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3
    assert {"dice/wall", "hd95/lumen", "asd/wall", "jaccard/wall", "thickness/mae"} <= set(rows[0].split(","))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["cases"] == 2
    assert {"mae", "rmse", "r2"} <= set(summary["targets"]["thickness"]["case_means"])


@pytest.mark.parametrize("bundle", BUNDLES)
def test_cases_whose_files_have_one_name_are_measured_apart(
    bundle: str, chain: Chain, workflow: Callable[..., None], tmp_path: Path
) -> None:
    content = json.loads((chain.data / "datalist.json").read_text())
    for index, entry in enumerate(content["validation"]):
        for key in ("image", "label", "thickness"):
            link = tmp_path / f"p{index}" / f"{key}.nii.gz"
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(chain.data / entry[key])
            entry[key] = str(link)
    (tmp_path / "datalist.json").write_text(json.dumps({**content, "training": [], "unlabeled": []}))
    names, measured = ("train.json", "evaluate.json"), tmp_path / "measured"
    settings = {"dataset_dir": str(tmp_path), "output_dir": str(measured)}
    settings["postprocessing#output_dir"] = str(tmp_path / "predicted")
    workflow(bundle, names=names, **settings, ckpt_dir=str(chain.model(bundle).parent))
    rows = (measured / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["case", "p0_image", "p1_image"]
    maps = {path.name for path in (tmp_path / "predicted").glob("*_seg.nii.gz")}
    assert maps == {"p0_image_seg.nii.gz", "p1_image_seg.nii.gz"}


@pytest.mark.parametrize("bundle", ["teacher", "student"])
def test_the_stages_before_predict_and_are_measured_alone(
    bundle: str, chain: Chain, turned: Path, workflow: Callable[..., None], tmp_path: Path
) -> None:
    weights = {"ckpt_dir": str(chain.model(bundle).parent)}
    predicted, measured = tmp_path / "predicted", tmp_path / "measured"
    workflow(bundle, names=("inference.json",), input=str(turned), output_dir=str(predicted), **weights)
    assert sorted(path.name for path in predicted.iterdir()) == ["a case.json", "a case_seg.nii.gz"]
    names = ("train.json", "evaluate.json")
    workflow(bundle, names=names, dataset_dir=str(chain.data), output_dir=str(measured), **weights)
    rows = (measured / "metrics.csv").read_text().splitlines()
    assert len(rows) == 3
    assert {"dice/lumen", "dice/wall"} <= set(rows[0].split(","))
    assert json.loads((measured / "summary.json").read_text())["cases"] == 2


def test_a_broken_scan_does_not_stop_the_others(
    chain: Chain, turned: Path, workflow: Callable[..., None], tmp_path: Path
) -> None:
    scans, predicted = tmp_path / "scans", tmp_path / "predicted"
    scans.mkdir()
    whole = turned.read_bytes()
    for name, content in (("a.nii.gz", whole), ("b.nii.gz", whole[: len(whole) // 2]), ("c.nii.gz", whole)):
        (scans / name).write_bytes(content)
    settings = {"ckpt_dir": str(chain.model("teacher").parent), "input": str(scans), "output_dir": str(predicted)}
    with pytest.raises(Exception) as caught:  # noqa: PT011
        workflow("teacher", names=("inference.json",), **settings)
    message = find_bad_input(caught.value)
    assert message is not None
    assert "1 of 3 cases failed" in message
    assert "b.nii.gz" in message
    assert sorted(path.name for path in predicted.iterdir()) == ["a.json", "a_seg.nii.gz", "c.json", "c_seg.nii.gz"]


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    chain: Chain, workflow: Callable[..., None], tmp_path: Path
) -> None:
    crash = tmp_path / "crash.json"
    handler = {"_target_": "bundle_runs.Crash", "after_iteration": 3}
    crash.write_text(json.dumps({"+train#handlers": [handler]}))

    def train(name: str, *overlays: str, **settings: Any) -> Path:
        folder = tmp_path / name
        places = {"output_dir": str(folder / "train"), "ckpt_dir": str(folder / "models")}
        workflow("student", *overlays, **{**chain.settings("student"), **places, **settings})
        return folder / "models" / "model.pt"

    whole = torch.load(train("whole"), weights_only=True)["model"]
    with pytest.raises(RuntimeError):  # in the second of two epochs
        train("resumed", str(crash))
    assert not (tmp_path / "resumed" / "models" / "model.pt").exists()
    saved = torch.load(tmp_path / "resumed" / "train" / "checkpoint.pt", weights_only=True)
    assert (saved["epoch"], saved["iteration"]) == (1, 2)
    resumed = torch.load(train("resumed", resume=True), weights_only=True)["model"]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_the_recorded_config_runs_again(chain: Chain, tmp_path: Path) -> None:
    recorded = chain.output("teacher") / "config.json"
    done = run([str(recorded)], {"output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path / "models")})
    assert done.returncode == 0, done.stderr[-3000:]
    again = torch.load(tmp_path / "models" / "model.pt", weights_only=True)["model"]
    first = torch.load(chain.model("teacher"), weights_only=True)["model"]
    assert all(torch.equal(again[name], value) for name, value in first.items())
