"""Who a patient is stays in the images and in the datalist: no result, log, record or message says it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from bundle_runs import PLAN, config
from monai.bundle import ConfigParser

from common.data.folders import make_datalist
from common.errors import find_bad_input
from common.networks import save_weights

PATIENT = "Ypsilantis"


def files_that_say(words: set[str], *folders: Path) -> list[str]:
    """Files whose name or content has one of the words, whatever its form."""
    found = []
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        said = [word for word in words if word in str(path.name) or word.encode() in content]
        found += [f"{path}: {said}"] if said else []
    return found


def test_training_and_evaluation_keep_the_datalist_s_patients_to_themselves(
    phantoms: Path,
    workflow: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    content = json.loads((phantoms / "datalist.json").read_text())
    for section in ("training", "unlabeled", "validation"):
        for index, entry in enumerate(content[section]):
            entry["patient"] = f"{PATIENT} {section} {index}"
            for key in ("image", "label", "thickness"):
                if key in entry:
                    entry[key] = str(phantoms / entry[key])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "datalist.json").write_text(json.dumps(content))
    folders = {"output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path / "models")}
    with caplog.at_level(logging.DEBUG):
        short = {"train#trainer#max_epochs": 1, "iterations_per_epoch": 1}
        workflow("teacher", dataset_dir=str(tmp_path / "data"), **folders, **short)
        folders["output_dir"] = str(tmp_path / "out" / "evaluation")
        workflow("teacher", names=("train.json", "evaluate.json"), dataset_dir=str(tmp_path / "data"), **folders)
    assert (tmp_path / "out" / "mlruns.db").exists()
    assert (tmp_path / "models" / "model.json").exists()
    assert (tmp_path / "out" / "evaluation" / "metrics.csv").exists()
    assert not files_that_say({PATIENT}, tmp_path / "out", tmp_path / "models")
    said = capfd.readouterr()
    assert PATIENT not in caplog.text + said.out + said.err


def test_nothing_of_a_dicom_header_reaches_results_or_logs(
    workflow: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pydicom = pytest.importorskip("pydicom")
    from dicom_series import AXIAL, write_series

    tags = {
        "PatientName": f"{PATIENT}^Anna",
        "PatientID": "QX4711XQ",
        "PatientBirthDate": "19530707",
        "AccessionNumber": "ACC0815",
        "ReferringPhysicianName": "Xanthippe",
        "InstitutionName": "Saint Elsewhere",
        "StudyDescription": "Findings of Ypsilantis",
    }

    def identify(slice_: pydicom.Dataset, _: int) -> None:
        for name, value in tags.items():
            setattr(slice_, name, value)

    values = np.random.default_rng(0).integers(-1000, 200, (8, 9, 10)).astype(np.int16)
    write_series(tmp_path / "scans" / "case", values, AXIAL, change=identify)
    write_series(tmp_path / "scans" / "two", values, AXIAL, change=identify)
    extra = pydicom.dcmread(next((tmp_path / "scans" / "two").iterdir()))
    extra.SeriesInstanceUID = pydicom.uid.generate_uid()
    extra.save_as(tmp_path / "scans" / "two" / "extra.dcm")
    uids = {extra.SeriesInstanceUID, extra.StudyInstanceUID, extra.SOPInstanceUID, extra.FrameOfReferenceUID}

    parser = ConfigParser()
    parser.read_config(config("teacher", "inference.json"))
    parser.update(PLAN)
    torch.manual_seed(0)
    save_weights(parser.get_parsed_content("network_def"), tmp_path / "models" / "model.pt")
    settings = {"ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "out"), "overview": True}
    with caplog.at_level(logging.DEBUG), pytest.raises(Exception) as caught:  # noqa: PT011 (MONAI wraps it)
        workflow("teacher", names=("inference.json",), input=str(tmp_path / "scans"), **settings)
    message = find_bad_input(caught.value)
    assert "2 DICOM series" in message
    words = {PATIENT, "Anna", *tags.values(), *map(str, uids)}
    names = {"case.json", "case_seg.nii.gz", "case_overview.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert not files_that_say(words, tmp_path / "out")
    header = nibabel.load(tmp_path / "out" / "case_seg.nii.gz").header.binaryblock
    assert not [word for word in words if word.encode() in header]
    said = capfd.readouterr()
    text = caplog.text + said.out + said.err + message
    assert not [word for word in words if word in text]

    # A datalist tells patients apart by a number of its own.
    (tmp_path / "scans" / "two" / "extra.dcm").unlink()
    datalist = json.dumps(make_datalist(tmp_path / "scans", validation=0))
    assert "patient-" in datalist
    assert not [word for word in words if word in datalist]
