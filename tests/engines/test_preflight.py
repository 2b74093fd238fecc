from __future__ import annotations

import importlib
import json
import logging
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.utils import set_determinism

from common.engines import preflight, start
from common.errors import BadInput

LABELS = {"0": "background", "1": "wall"}


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    """Arguments of a preflight that finds nothing wrong."""

    def save(name: str, content: np.ndarray) -> str:
        nib.save(nib.Nifti1Image(content, np.eye(4)), tmp_path / name)
        return str(tmp_path / name)

    image = save("image.nii.gz", np.zeros((8, 8, 8), np.float32))
    label = save("label.nii.gz", np.ones((8, 8, 8), np.uint8))
    other = save("other.nii.gz", np.zeros((8, 8, 8), np.float32))
    datalist = tmp_path / "datalist.json"
    datalist.write_text(
        json.dumps({"labels": LABELS, "training": [{"image": "image.nii.gz", "label": "label.nii.gz"}]})
    )
    return {
        "training": [{"image": image, "label": label, "thickness": label}],
        "validation": [],
        "unlabeled": [{"image": other}],
        "datalist": str(datalist),
        "labels": LABELS,
        "channels": 1,
        "output_dir": str(tmp_path / "output"),
        "ckpt_dir": str(tmp_path / "models"),
        "targets": [{"name": "thickness", "kind": "dense", "structure": 1}],
        "divisor": [4, 4, 4],
        "patch_size": [8, 8, 8],
    }


def test_all_is_well(settings, caplog):
    with caplog.at_level(logging.INFO):
        preflight(**settings)
    assert "1 labelled, 1 unlabelled, 0 validation cases; classes: background, wall" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": []}, "'training' is empty"),
        ({"patch_size": [8, 8, 10]}, r"patch_size: \[8, 8, 10\].*divisible by \[4, 4, 4\]"),
        ({"patch_size": [8, 8]}, "patch_size"),
        ({"channels": 2}, "channel"),
        ({"labels": {"0": "background", "1": "lumen"}}, "lumen"),
        ({"targets": [{"name": "volume", "kind": "sum"}]}, "'volume'.*no training case"),
    ],
)
def test_what_is_wrong_is_found_before_training(settings, change, message):
    with pytest.raises(BadInput, match=message):
        preflight(**{**settings, **change})


def test_a_case_of_every_section_is_checked(settings, tmp_path):
    missing = str(tmp_path / "nowhere.nii.gz")
    for section, entry in (("unlabeled", {"image": missing}), ("validation", {"image": missing, "label": missing})):
        with pytest.raises(BadInput, match=r"nowhere\.nii\.gz"):
            preflight(**{**settings, section: [entry]})


def test_the_testing_section_is_no_training_data(settings, tmp_path):
    content = {"labels": LABELS, "training": [], "testing": ["image.nii.gz"]}
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"image\.nii\.gz is in training and in testing"):
        preflight(**settings)


@pytest.mark.parametrize("key", ["output_dir", "ckpt_dir"])
def test_a_folder_that_can_not_be_written(settings, tmp_path, key):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match="file"):
        preflight(**{**settings, key: str(tmp_path / "file")})


def test_entries_that_come_without_a_datalist(settings, tmp_path):
    """As from a server that hands over its own cases."""
    preflight(**{**settings, "datalist": str(tmp_path / "none.json"), "labels": {"0": "background", "1": "lumen"}})


@pytest.fixture
def plain_process(monkeypatch):
    """Puts back what :func:`start` settles for the whole process."""
    hook, deterministic = sys.excepthook, torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    # By its name among the modules: in the package the function of that name hides it.
    monkeypatch.setattr(importlib.import_module("common.engines.preflight"), "keep_pages", lambda: True)
    yield
    sys.excepthook = hook
    set_determinism(None)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


@pytest.mark.usefixtures("plain_process")
def test_start_sets_the_random_state():
    drawn = []
    for seed in (3, 3, 4):
        start(seed, "cpu")
        drawn.append((torch.rand(()).item(), float(np.random.rand())))
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[2][0]
    assert drawn[0][1] != drawn[2][1]
    start(3, "cpu")
    start(None, "cpu")
    assert torch.rand(()).item() == drawn[0][0], "None leaves the state as it is"


@pytest.mark.usefixtures("plain_process")
def test_start_without_the_gpu_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="'cuda:0' was asked for"):
        start(0, "cuda:0")
    assert sys.excepthook is not sys.__excepthook__, "and the message will be plain"
