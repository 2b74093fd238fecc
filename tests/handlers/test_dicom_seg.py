"""DICOM segmentations, read back and compared with the series and with the label file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.transforms import SaveImage

from common.errors import BadInput
from common.handlers.dicom_seg import DicomSegWriter
from common.transforms import LoadCased

highdicom = pytest.importorskip("highdicom")
import pydicom  # noqa: E402
from dicom_series import AXIAL, OBLIQUE, SAGITTAL, write_series  # noqa: E402

LABELS = {"0": "background", "1": "Höhle", "2": "wall", "3": "never there"}


def make_volume() -> np.ndarray:
    """Labels (slices, rows, columns) that no turn or flip leaves as they are; the first slice is empty."""
    volume = np.zeros((5, 7, 6), dtype=np.int16)
    volume[1, 1:4, 1] = 1
    volume[2, 1:5, 1:3] = 1
    volume[2, 2, 4] = 2
    volume[3, 5, 2:5] = 2
    volume[4, 0, 5] = 2
    return volume


def predict(folder: Path, output: Path) -> None:
    """What an evaluator that finds the pixel values as labels writes: label file and DICOM segmentation."""
    image = LoadCased(("image",))({"image": str(folder)})["image"]
    segmentation = MetaTensor(image.to(torch.uint8), meta=dict(image.meta))
    SaveImage(output_dir=output, output_postfix="seg", separate_folder=False, output_dtype="uint8", resample=False)(
        segmentation
    )
    engine = Engine(lambda _, batch: [{"image": image, "segmentation": segmentation}])
    DicomSegWriter(output, LABELS, [{"image": str(folder)}], "teacher").attach(engine)
    engine.run([None])


@pytest.mark.parametrize("upwards", [True, False])
@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL, OBLIQUE], ids=["axial", "sagittal", "oblique"])
def test_it_holds_what_the_label_file_holds_and_names_the_right_slices(
    orientation: list[float], upwards: bool, tmp_path: Path
) -> None:
    volume = make_volume()
    slices = write_series(tmp_path / "a scan", volume, orientation, upwards)
    predict(tmp_path / "a scan", tmp_path / "out")
    found = highdicom.seg.segread(tmp_path / "out" / "a scan_seg.dcm")

    # Each frame has the mask of the very slice that it refers to.
    frames = set()
    for number, pixels in zip(range(found.NumberOfFrames), found.pixel_array, strict=True):
        item = found.PerFrameFunctionalGroupsSequence[number]
        segment = item.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        source = item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert np.array_equal(pixels, volume[slices[source]] == segment)
        frames.add((slices[source], segment))
    assert frames == {(1, 1), (2, 1), (2, 2), (3, 2), (4, 2)}

    # By highdicom's own geometry every voxel lies where the label file has it.
    label = nibabel.load(tmp_path / "out" / "a scan_seg.nii.gz")
    ids = np.asarray(label.dataobj)
    box = found.get_volume(combine_segments=True)
    assert box.array.any(axis=0).any()
    placed = np.zeros_like(ids)
    index = np.argwhere(box.array)
    to_label = np.linalg.inv(label.affine) @ np.diag([-1, -1, 1, 1]) @ box.affine
    there = np.c_[index, np.ones(len(index))] @ to_label.T[:, :3]
    assert np.allclose(there, np.rint(there), atol=1e-3)
    placed[tuple(np.rint(there).astype(int).T)] = box.array[tuple(index.T)]
    assert np.array_equal(placed, ids)
    assert (ids > 0).sum() == (volume > 0).sum()


def test_segments_are_described_and_the_patient_is_the_series_own(tmp_path: Path) -> None:
    write_series(tmp_path / "scan", make_volume(), AXIAL)
    predict(tmp_path / "scan", tmp_path / "out")
    found = highdicom.seg.segread(tmp_path / "out" / "scan_seg.dcm")
    source = pydicom.dcmread(tmp_path / "scan" / "00.dcm")
    assert [(item.SegmentNumber, item.SegmentLabel) for item in found.SegmentSequence] == [
        (1, "Höhle"),
        (2, "wall"),
        (3, "never there"),
    ]
    assert {item.SegmentAlgorithmType for item in found.SegmentSequence} == {"AUTOMATIC"}
    assert {item.SegmentAlgorithmName for item in found.SegmentSequence} == {"teacher"}
    assert found.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeValue == "85756007"
    assert (found.Modality, str(found.PatientName)) == ("SEG", "Doe^Jane")
    assert found.StudyInstanceUID == source.StudyInstanceUID
    assert found.SeriesInstanceUID != source.SeriesInstanceUID
    assert found.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert found.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID


def test_nothing_found(tmp_path: Path) -> None:
    write_series(tmp_path / "scan", make_volume() * 0, AXIAL)
    predict(tmp_path / "scan", tmp_path / "out")
    assert not highdicom.seg.segread(tmp_path / "out" / "scan_seg.dcm").pixel_array.any()


def test_files_that_lack_something_are_named(tmp_path: Path) -> None:
    write_series(tmp_path / "scan", make_volume(), AXIAL)
    for path in (tmp_path / "scan").iterdir():
        source = pydicom.dcmread(path)
        del source.FrameOfReferenceUID
        source.save_as(path)
    with pytest.raises(BadInput, match=r"dicom_seg: no segmentation can be made for .*scan .*Frame Of Reference UID"):
        predict(tmp_path / "scan", tmp_path / "out")


def test_it_is_refused_before_anything_is_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[dict[str, Any]] = [{"image": str(tmp_path)}, {"image": "scan.nii.gz"}]
    with pytest.raises(BadInput, match=r"scan\.nii\.gz is no folder with a DICOM series"):
        DicomSegWriter(tmp_path, LABELS, cases)
    DicomSegWriter(tmp_path, LABELS, [cases[0], {"image": "stray.dcm", "fault": "it fails by itself"}])
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(BadInput, match="pip install highdicom"):
        DicomSegWriter(tmp_path, LABELS, cases[:1])
