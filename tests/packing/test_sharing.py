"""A packed bundle where this project is not: downloaded, run, and beside another version of itself.

Processes that start Python anew take seconds each, so they are few and each does much.
"""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import itk
import nibabel
import numpy as np
import pytest
import torch
from bundle_runs import BUNDLES, config
from monai.bundle import ConfigParser
from monai.bundle import run as run_bundle

from common.packing import pack_bundle

# Python runs this file at its start when it finds it on its path: the project then can't be imported.
WITHOUT_PROJECT = """
import sys

class Refuse:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "common":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse)
"""
# What a user types, the second and third line in one process to spare the imports.
ONE_PROCESS = """
import runpy, sys
for arguments in {commands!r}:
    sys.argv = ["monai.bundle", *arguments]
    try:
        runpy.run_module("monai.bundle", run_name="__main__")
    except SystemExit as done:
        assert not done.code, done.code
assert not any(name.split(".")[0] == "common" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NIfTI file and the folder of a DICOM series, of voxels that are no cubes of 1 mm."""
    folder = tmp_path_factory.mktemp("scans") / "some scans"
    (folder / "series").mkdir(parents=True)
    volume = np.random.default_rng(3).normal(-600, 300, (22, 20, 18)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([-0.9, 1.1, 1.2, 1.0])), folder / "scan.nii.gz")
    for index, pixels in enumerate(volume.T):
        image = itk.image_from_array(np.ascontiguousarray(pixels[None]))
        image.SetSpacing((0.8, 0.9, 1.5))
        image.SetOrigin((1.0, 2.0, 3.0 + 1.5 * index))
        tags = image.GetMetaDataDictionary()
        tags["0020|000e"], tags["0020|000d"], tags["0008|0060"] = "1.2.3.4", "1.2.3", "CT"
        tags["0020|0013"] = str(index + 1)
        writer = itk.ImageFileWriter.New(image, FileName=str(folder / "series" / f"{index:03d}.dcm"))
        gdcm = itk.GDCMImageIO.New()
        gdcm.KeepOriginalUIDOn()
        writer.SetImageIO(gdcm)
        writer.Update()
    return folder


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url(packed: dict[str, Path]) -> Iterator[str]:
    """The archives on a server of this machine."""
    handler = partial(_Quiet, directory=packed["teacher"].parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def away(tmp_path: Path) -> Callable[..., None]:
    """Run Python in a folder of its own, where the project can't be imported."""
    folder, start = tmp_path / "away", tmp_path / "start"
    folder.mkdir()
    start.mkdir()
    (start / "sitecustomize.py").write_text(WITHOUT_PROJECT)
    settings = {"PYTHONPATH": str(start), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    settings["MLFLOW_DISABLE_TELEMETRY"] = "true"

    def call(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, **settings},
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    return call


def commands(bundle: str, url: str, scans: Path) -> list[list[str]]:
    """What a user types: download, then predict."""
    inference = f"bundles/{bundle}/configs/inference.json"
    return [
        ["download", "--name", bundle, "--url", f"{url}/{bundle}-1.0.0.zip", "--bundle_dir", "bundles"],
        ["run", "--config_file", inference, "--input", str(scans), "--output_dir", "results", "--device", "cpu"],
    ]


def predicted(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("bundle", BUNDLES)
def test_downloaded_it_predicts_what_it_predicted_before(
    bundle: str, url: str, away: Callable[..., None], scans: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    here = tmp_path / "here"
    hook, threads = sys.excepthook, torch.get_num_threads()
    torch.set_num_threads(1)  # as there: others take sums in another order, in which noise is another class
    try:
        run_bundle(
            config_file=[config(bundle, "inference.json"), str(trained["plan"])],
            ckpt_dir=str(trained[bundle].parent),
            input=str(scans),
            output_dir=str(here),
            device="cpu",
        )
    finally:
        sys.excepthook = hook
        torch.set_num_threads(threads)
    typed = commands(bundle, url, scans)
    if bundle == "dual_decoder":
        for arguments in typed:
            away("-m", "monai.bundle", *arguments)
    else:
        away("-c", ONE_PROCESS.format(commands=typed))
    found, expected = predicted(tmp_path / "away" / "results"), predicted(here)
    assert {"scan_seg.nii.gz", "series_seg.nii.gz", "scan.json", "series.json"} <= set(expected)
    assert ("series_thickness.nii.gz" in expected) == (bundle == "dual_decoder")
    assert found == expected
    for name in ("scan", "series"):
        assert len(np.unique(nibabel.load(here / f"{name}_seg.nii.gz").dataobj)) > 1, "nothing to tell apart"


@pytest.fixture
def own_modules() -> Iterator[None]:
    """Whatever a test loads from bundles is forgotten after it."""
    yield
    _unload()


def _unload() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
        del sys.modules[name]


def load(root: Path) -> dict[str, Any]:
    """Take what serves a bundle out of its config, as MONAI Label does: with its own `scripts` and nobody else's."""
    _unload()
    sys.path.insert(0, str(root))
    try:
        parser = ConfigParser()
        parser.read_config(str(root / "configs" / "inference.json"))
        parser["device"] = "cpu"
        found = {key: parser.get_parsed_content(key) for key in ("bundle_root", "network", "inferer", "preprocessing")}
        found["network"].load_state_dict(torch.load(root / "models" / "model.pt", weights_only=True)["model"])
    finally:
        sys.path.remove(str(root))
    return found


def predict(bundle: dict[str, Any], image: Path) -> torch.Tensor:
    volume = bundle["preprocessing"]({"image": str(image)})["image"]
    with torch.no_grad():
        return bundle["inferer"](volume[None], bundle["network"].eval()).as_tensor()


@pytest.mark.usefixtures("own_modules")
def test_two_versions_side_by_side(
    trained: dict[str, Path], train: Callable[..., Path], scans: Path, tmp_path: Path
) -> None:
    plan = json.loads(trained["plan"].read_text())
    targets = [{"name": name, "kind": "dense", "structure": 1, "scale": 2.0} for name in ("a", "b")]
    other = {**plan, "features": [4, 4, 8, 8], "labels": {"0": "background", "1": "liver"}, "targets": targets}
    roots, alone = [], []
    for version, content in (("1.0.0", plan), ("2.0.0", other)):
        folder = tmp_path / version
        folder.mkdir()
        path = folder / "plan.json"
        path.write_text(json.dumps(content))
        weights = train("dual_decoder", folder / "trained", path, seed=int(version[0]))
        pack_bundle("dual_decoder", folder / "packed.zip", path, weights, version=version)
        with zipfile.ZipFile(folder / "packed.zip") as archive:
            archive.extractall(folder)
        roots.append(folder / "dual_decoder")
        with open(roots[-1] / "scripts/common/networks/dual_decoder.py", "a") as code:
            code.write(f"\nCODE_OF = {version!r}\n")
        alone.append(predict(load(roots[-1]), scans / "scan.nii.gz"))
    assert [output.shape[1] for output in alone] == [4, 4]
    assert not torch.equal(*alone)

    bundles = [load(root) for root in roots]
    for _ in range(2):  # by turns, so that either would meet what the other left behind
        for bundle, root, version, expected in zip(bundles, roots, ("1.0.0", "2.0.0"), alone, strict=True):
            code = type(bundle["network"]).forward.__globals__
            assert code["CODE_OF"] == version
            assert code["__file__"].startswith(str(root))
            assert bundle["bundle_root"] == str(root)
            assert torch.equal(predict(bundle, scans / "scan.nii.gz"), expected)
