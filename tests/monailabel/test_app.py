"""The project's own app for MONAI Label: a real server, from no label at all to the next image to label."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from label_server import APP, AWKWARD, CORRUPT, ENVIRONMENT, STAGES, UNFAMILIAR, Server, Volumes, digest


@pytest.fixture(scope="module")
def studies(volumes: Volumes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return volumes.studies(tmp_path_factory.mktemp("app") / "studies")


@pytest.fixture(scope="module")
def conf(bundles: Path, volumes: Volumes) -> dict[str, Any]:
    return {"bundles": bundles, "plan": volumes.plan}


@pytest.fixture(scope="module")
def server(studies: Path, conf: dict[str, Any]) -> Iterator[Server]:
    with Server(APP, studies, studies.parent, conf) as running:
        yield running


@pytest.fixture(scope="module")
def labeled(server: Server, volumes: Volumes) -> Server:
    for name, path in volumes.labels.items():
        answer = server.put_label(name, path)
        assert answer.json() == {"image": name, "label": name}
    return server


@pytest.fixture(scope="module")
def trained(labeled: Server) -> Server:
    task = labeled.train("all_stages")
    assert task["status"] == "DONE", task
    return labeled


@pytest.fixture(scope="module")
def certain(trained: Server) -> Server:
    """A teacher and a student that know the anatomy a little."""
    for stage, settings in (("teacher", {"max_epochs": 30, "pretrained": False}), ("student", {"max_epochs": 6})):
        task = trained.train(stage, **settings)
        assert task["status"] == "DONE", task
    return trained


def weights(bundles: Path, stage: str) -> Path:
    return bundles / stage / "models" / "model.pt"


def assert_fits(prediction: Path, image: Path) -> np.ndarray:
    found, expected = nib.load(prediction), nib.load(image)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)
    return np.asarray(found.dataobj)


def test_before_the_first_label(server: Server, volumes: Volumes) -> None:
    info = server.info()
    assert info["models"] == {}
    assert info["labels"] == volumes.label_names
    assert list(info["trainers"]) == [*STAGES, "all_stages"]
    assert list(info["strategies"]) == ["entropy", "disagreement", "random"]
    answer = server.infer("teacher", AWKWARD)
    assert answer.status_code == 404
    assert "teacher has no weights yet" in answer.json()["detail"]
    task = server.train("teacher")
    assert task["status"] == "ERROR"
    assert any("no image has a label yet" in line for line in task["details"])
    assert server.ask("POST", "/activelearning/entropy", json={})["score"] is None


def test_what_there_is_not(server: Server) -> None:
    for answer in (server.infer("nobody", AWKWARD), server.start_training("nobody")):
        assert answer.status_code == 404
        assert "'nobody'; expected one of ['teacher'" in answer.json()["detail"]
    answer = server.request("POST", "/activelearning/tarot", json={})
    assert (answer.status_code, "'tarot'" in answer.json()["detail"]) == (404, True)


def test_a_label_of_another_grid_is_refused(labeled: Server, volumes: Volumes, studies: Path, tmp_path: Path) -> None:
    kept = digest(studies / "labels" / "final" / f"{AWKWARD}.nii.gz")
    label = nib.load(volumes.labels[AWKWARD])
    other = tmp_path / "other.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj)[:-2], label.affine), other)
    answer = labeled.put_label(AWKWARD, other)
    assert answer.status_code == 400
    assert "not on one grid" in answer.json()["detail"]
    other.write_text("no label")
    assert labeled.put_label(AWKWARD, other).status_code == 400
    assert labeled.put_label("nobody", volumes.labels[AWKWARD]).status_code == 404
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj) * 3, label.affine), other := tmp_path / "ids.nii.gz")
    assert "are not in `labels`" in labeled.put_label(AWKWARD, other).json()["detail"]
    answer = labeled.put_label(AWKWARD, volumes.labels[AWKWARD], segments=[*volumes.label_names, "tumour"])
    assert "segments ['tumour']" in answer.json()["detail"]
    assert digest(studies / "labels" / "final" / f"{AWKWARD}.nii.gz") == kept


def test_a_label_is_saved_by_the_names_of_its_segments(labeled: Server, volumes: Volumes, studies: Path) -> None:
    """3D Slicer numbers segments in the order of its list, whatever the model calls them."""
    saved = studies / "labels" / "final" / f"{AWKWARD}.nii.gz"
    given = np.asarray(nib.load(volumes.labels[AWKWARD]).dataobj)
    answer = labeled.put_label(AWKWARD, volumes.labels[AWKWARD], segments=volumes.label_names[::-1])
    assert answer.ok
    np.testing.assert_array_equal(np.asarray(nib.load(saved).dataobj), np.choose(given.astype(int), [0, 2, 1]))
    assert labeled.put_label(AWKWARD, volumes.labels[AWKWARD], segments=volumes.label_names).ok
    np.testing.assert_array_equal(np.asarray(nib.load(saved).dataobj), given)


def test_all_stages_are_one_training(trained: Server, volumes: Volumes, bundles: Path) -> None:
    info = trained.info()
    assert list(info["models"]) == list(STAGES)
    assert info["labels"] == volumes.label_names
    for stage, before in (("student", "teacher"), ("dual_decoder", "student")):
        record = json.loads(weights(bundles, stage).with_suffix(".json").read_text())
        former = json.loads(weights(bundles, before).with_suffix(".json").read_text())
        assert record["parents"][before]["weights"] == former["weights"]
    student = torch.load(weights(bundles, "student"), weights_only=True)["model"]
    dual = torch.load(weights(bundles, "dual_decoder"), weights_only=True)["model"]
    assert all(torch.equal(dual[name], value) for name, value in student.items())
    # Four images without a label, one of which can't be read.
    assert "3 labelled, 4 unlabelled" in trained.log.read_text()
    assert f"{CORRUPT}.nii.gz is left out" in trained.log.read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_predictions_fit_the_image(trained: Server, volumes: Volumes, studies: Path, stage: str) -> None:
    answer = studies.parent / f"{stage}.nii.gz"
    numbers = trained.predict(stage, AWKWARD, answer, save_label=True)
    labels = assert_fits(answer, volumes.images[AWKWARD])
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) <= {0, 1, 2}
    for index, name in enumerate(volumes.label_names, start=1):
        voxel = abs(np.linalg.det(nib.load(answer).affine)) / 1000
        assert numbers["volumes"][name] == {"value": pytest.approx((labels == index).sum() * voxel), "unit": "mL"}
    assert "field_of_view" in {warning["kind"] for warning in numbers["warnings"]}
    known = trained.ask("GET", "/datastore/label/info", params={"label": AWKWARD, "tag": "original"})
    assert known["params"]["warnings"] == numbers["warnings"]
    assert (known["model"], known["params"]["volumes"]) == (stage, numbers["volumes"])
    assert digest(studies / "labels" / "original" / f"{AWKWARD}.nii.gz") == digest(answer)


def test_the_dual_decoder_measures(trained: Server, volumes: Volumes, studies: Path, tmp_path: Path) -> None:
    numbers = trained.predict("dual_decoder", AWKWARD, tmp_path / "label.nii.gz", save_label=True)
    assert numbers["thickness"]["unit"] == "mm"
    labels = assert_fits(tmp_path / "label.nii.gz", volumes.images[AWKWARD])
    # Beside the label,
    saved = assert_fits(studies / "labels" / "thickness_original" / f"{AWKWARD}.nii.gz", volumes.images[AWKWARD])
    # and on request in its place.
    trained.predict("dual_decoder", AWKWARD, tmp_path / "map.nii.gz", output_map="thickness")
    shown = assert_fits(tmp_path / "map.nii.gz", volumes.images[AWKWARD])
    np.testing.assert_allclose(shown, saved, atol=1e-5)
    (structure,) = numbers["thickness"]["structures"]
    inside = labels == 1 + volumes.label_names.index(structure)
    assert numbers["thickness"]["structures"][structure]["voxels"] == inside.sum()
    assert not saved[~inside].any()
    if inside.any():
        assert numbers["thickness"]["structures"][structure]["mean"] == pytest.approx(saved[inside].mean(), abs=1e-4)
    config = trained.info()["models"]["dual_decoder"]["config"]
    assert config["output_map"] == ["segmentation", "thickness"]


def test_an_image_that_cannot_be_read_is_named(trained: Server) -> None:
    answer = trained.infer("teacher", CORRUPT)
    assert answer.status_code == 400
    assert f"{CORRUPT}.nii.gz can't be read" in answer.json()["detail"]
    answer = trained.infer("teacher", "nobody")
    assert (answer.status_code, "no image 'nobody'" in answer.json()["detail"]) == (404, True)


def test_weights_of_another_plan_are_neither_used_nor_trained_on(
    trained: Server, conf: dict[str, Any], studies: Path, bundles: Path, tmp_path: Path
) -> None:
    """They fit the network, and would segment voxels of another size."""
    kept = digest(weights(bundles, "teacher"))
    plan = {**json.loads(Path(conf["plan"]).read_text()), "spacing": [2.0, 2.0, 2.0]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with Server(APP, studies, tmp_path, {**conf, "plan": tmp_path / "plan.json"}) as other:
        answer = other.infer("teacher", AWKWARD)
        assert not answer.ok
        assert "spacing: trained with [1.0, 1.0, 1.0], found [2.0, 2.0, 2.0]" in answer.text
        task = other.train("teacher", max_epochs=1)
        assert task["status"] == "ERROR", task
        assert any("train with `pretrained` false" in line for line in task["details"]), task
        assert {name for name, found in other.score().items() if "error" in found} <= {CORRUPT}
        assert other.ask("POST", "/activelearning/random", json={})["id"]
    assert digest(weights(bundles, "teacher")) == kept


def test_the_unfamiliar_image_comes_first(certain: Server, volumes: Volumes, studies: Path) -> None:
    scores = certain.score()
    without = {name for name in volumes.images if name not in volumes.labels}
    assert {name for name, found in scores.items() if found} == without
    assert "error" in scores[CORRUPT]
    for strategy in ("entropy", "disagreement"):
        order = sorted(without - {CORRUPT}, key=lambda name: -scores[name][strategy])
        assert order[0] == UNFAMILIAR, scores
    first = certain.ask("POST", "/activelearning/entropy", json={})
    assert (first["id"], first["score"]) == (UNFAMILIAR, scores[UNFAMILIAR]["entropy"])
    assert first["uncertainty"] == scores[UNFAMILIAR]
    second = certain.ask("POST", "/activelearning/entropy", json={})
    assert second["id"] in without - {CORRUPT, UNFAMILIAR}
    assert certain.ask("POST", "/activelearning/random", json={})["id"] in without - {CORRUPT}
    # One that was repaired is an image like others, as soon as it is scored.
    path = studies / f"{CORRUPT}.nii.gz"
    broken = path.read_bytes()
    shutil.copy(volumes.images[UNFAMILIAR], path)
    try:
        repaired = certain.score()
    finally:
        path.write_bytes(broken)
    assert repaired[CORRUPT]["entropy"] == pytest.approx(scores[UNFAMILIAR]["entropy"])
    assert {name: repaired[name]["ts"] for name in without - {CORRUPT}} == {
        name: scores[name]["ts"] for name in without - {CORRUPT}
    }, "the others were not scored again"
    assert "error" in certain.score()[CORRUPT]


def test_the_student_learns_from_images_without_a_label(certain: Server, conf: dict[str, Any], studies: Path) -> None:
    """Twice with them, which gives the same weights twice, and once without, which gives others."""
    script = Path(__file__).with_name("student_runs.py")
    command = [str(ENVIRONMENT / "bin/python"), str(script), str(studies), json.dumps(conf, default=str)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MONAI_LABEL_AUTO_UPDATE_SCORING": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=studies.parent, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    once, again, without = json.loads(done.stdout.splitlines()[-1])
    assert once == again != without


def test_a_killed_server_loses_nothing(
    certain: Server, conf: dict[str, Any], studies: Path, bundles: Path, tmp_path: Path
) -> None:
    """Killed while it trains; what was before serves on, and the training does not go on by itself."""
    certain.predict("teacher", AWKWARD, tmp_path / "before.nii.gz")
    kept = digest(weights(bundles, "teacher"))
    with Server(APP, studies, tmp_path, conf) as doomed:
        assert doomed.start_training("teacher", max_epochs=100_000).ok
        doomed.wait_for("Epoch 2/100000")
        answer = doomed.start_training("teacher")
        assert (answer.status_code, "Already Running" in answer.json()["detail"]) == (429, True)
        doomed.process.send_signal(signal.SIGKILL)
        doomed.process.wait()
        deadline = time.monotonic() + 60
        while not doomed.is_gone():
            assert time.monotonic() < deadline, "the training outlives its server"
            time.sleep(0.2)
    assert digest(weights(bundles, "teacher")) == kept
    with Server(APP, studies, tmp_path, conf) as restarted:
        assert restarted.info()["datastore"]["completed"] == 3
        restarted.predict("teacher", AWKWARD, tmp_path / "after.nii.gz")
    assert digest(tmp_path / "before.nii.gz") == digest(tmp_path / "after.nii.gz")
