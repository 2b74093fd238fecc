"""MONAI Label's own app for bundles, offline: the bundles of this checkout and, packed, those that are shared."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from label_server import AWKWARD, CORRUPT, ENVIRONMENT, ROOT, STAGES, UNFAMILIAR, Server, Volumes, digest
from monai.bundle import ConfigParser

from common.networks import read_weights, save_weights
from common.packing import pack_bundle

CONF = {"zoo_source": "none", "sam2": "false"}
ORGANS = "organs"  # a student by the recipe DoDNet, whose network is another one


def network_config(stage: str, name: str, *overlays: Path) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(path) for path in (ROOT / "bundles" / stage / "configs" / name, *overlays)])
    return parser


def untrained(stage: str, path: Path, *overlays: Path) -> None:
    """Some weights: without any, the app does not offer the model."""
    save_weights(network_config(stage, "train.json", *overlays).get_parsed_content("network_def"), path)


def copy_bundle(stage: str, volumes: Volumes, target: Path) -> None:
    """The bundle of the checkout with the plan in its files: the app reads each of them alone."""
    shutil.copytree(ROOT / "bundles" / stage, target, ignore=shutil.ignore_patterns("models", "eval"))
    for name in ("train.json", "inference.json"):
        merged = network_config(stage, name, volumes.plan)
        (target / "configs" / name).write_text(json.dumps(merged.get()))
    metadata = json.loads((target / "configs" / "metadata.json").read_text())
    names = {str(index): name for index, name in enumerate(["background", *volumes.label_names])}
    metadata["network_data_format"]["outputs"]["pred"]["channel_def"] = names
    (target / "configs" / "metadata.json").write_text(json.dumps(metadata))
    untrained(stage, target / "models" / "model.pt", volumes.plan)


def pack_and_unpack(stage: str, volumes: Volumes, target: Path, folder: Path, *overlays: Path) -> None:
    """The bundle as somebody gets it who has nothing but the packed file."""
    archive, weights = folder / f"{target.name}.zip", folder / "weights" / target.name / "model.pt"
    untrained(stage, weights, volumes.plan, *overlays)
    pack_bundle(stage, archive, plan=volumes.plan, weights=weights, overlays=overlays)
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder / "unpacked")
        top = file.namelist()[0].split("/")[0]
    (folder / "unpacked" / top).rename(target)


@pytest.fixture(scope="module", params=["checkout", "packed"])
def server(
    request: pytest.FixtureRequest, volumes: Volumes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp(f"stock_{request.param}")
    app = shutil.copytree(ENVIRONMENT / "monailabel" / "sample-apps" / "monaibundle", folder / "app")
    (app / "model").mkdir()
    for stage in STAGES:
        if request.param == "packed":
            pack_and_unpack(stage, volumes, app / "model" / stage, folder)
        else:
            copy_bundle(stage, volumes, app / "model" / stage)
    models = list(STAGES)
    if request.param == "packed":
        recipe = ROOT / "bundles" / "student" / "configs" / "recipes" / "dodnet.json"
        pack_and_unpack("student", volumes, app / "model" / ORGANS, folder, recipe)
        models.append(ORGANS)
    with Server(app, volumes.studies(folder / "studies"), folder, {**CONF, "models": ",".join(models)}) as running:
        yield running


def test_lists_them_all(server: Server, volumes: Volumes) -> None:
    info = server.info()
    found = [path.name for path in (server.folder / "app" / "model").iterdir()]
    assert sorted(info["models"]) == sorted(info["trainers"]) == sorted(found)
    assert set(STAGES) <= set(found)
    for stage in found:
        assert info["models"][stage]["type"] == "segmentation"
        assert set(volumes.label_names) <= set(info["models"][stage]["labels"])


@pytest.mark.parametrize("stage", [*STAGES, ORGANS])
def test_the_whole_round(server: Server, volumes: Volumes, stage: str, tmp_path: Path) -> None:
    folder = server.folder
    if not (folder / "app" / "model" / stage).exists():
        pytest.skip("a recipe's network goes to MONAI Label packed")
    before = server.predict(stage, AWKWARD, tmp_path / "before.nii.gz")
    assert set(before["volumes"]) == set(volumes.label_names)
    assert server.ask("POST", "/activelearning/random", json={})["id"] in volumes.images
    for name, path in volumes.labels.items():
        assert server.put_label(name, path).ok
    model = folder / "app" / "model" / stage / "models" / "model.pt"
    kept = digest(model)
    task = server.train(stage)
    assert task["status"] == "DONE", task
    assert digest(model) != kept
    if stage == "student":
        assert f"3 labelled, {len(volumes.images) - 4} unlabelled" in server.log.read_text()
        assert f"{CORRUPT}.nii.gz is left out" in server.log.read_text()
    numbers = server.predict(stage, UNFAMILIAR, tmp_path / "after.nii.gz", save_label=True)
    found, image = nib.load(tmp_path / "after.nii.gz"), nib.load(volumes.images[UNFAMILIAR])
    assert found.shape == image.shape
    np.testing.assert_allclose(found.affine, image.affine, atol=1e-4)
    assert set(np.unique(np.asarray(found.dataobj))) <= {0, 1, 2}
    assert (folder / "studies" / "labels" / "original" / f"{UNFAMILIAR}.nii.gz").exists()
    known = server.ask("GET", "/datastore/label/info", params={"label": UNFAMILIAR, "tag": "original"})
    assert known["params"]["volumes"] == numbers["volumes"]
    if stage == "dual_decoder":
        # Its former weights, which MONAI Label would have it train on from, don't come between it and the student.
        student = read_weights(folder / "app" / "model" / "student" / "models" / "model.pt")
        dual = read_weights(model)
        assert all(torch.equal(dual[name], value) for name, value in student.items())
        assert known["params"]["thickness"] == numbers["thickness"]
        assert numbers["thickness"]["unit"] == "mm"
        server.predict(stage, UNFAMILIAR, tmp_path / "map.nii.gz", output_map="thickness")
        shown = nib.load(tmp_path / "map.nii.gz")
        assert (shown.shape, shown.get_data_dtype()) == (image.shape, np.float32)


def test_answers_after_what_it_cannot_do(server: Server) -> None:
    """MONAI Label's app says why in its log alone; here it has to stay alive."""
    assert server.infer("teacher", CORRUPT).status_code == 500
    server.wait_for(f"{CORRUPT}.nii.gz can't be read")
    assert server.infer("nobody", AWKWARD).status_code == 500
    assert set(STAGES) <= set(server.info()["models"])
