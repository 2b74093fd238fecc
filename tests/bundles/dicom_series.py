"""CT as a scanner writes it, for tests. Needs pydicom, which comes with highdicom."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

SPACING = (0.75, 0.5, 2.5)  # between rows, columns, slices
AXIAL = [1, 0, 0, 0, 1, 0]
SAGITTAL = [0, 1, 0, 0, 0, -1]
OBLIQUE = [0.8, 0.6, 0, 0, 0, -1]


def write_series(
    folder: Path,
    volume: np.ndarray,
    orientation: list[float],
    upwards: bool = True,
    change: Callable[[pydicom.Dataset, int], None] | None = None,
) -> dict[str, int]:
    """Write up to 31 slices (slices, rows, columns), names and instance numbers in an order of their own.

    ``change`` gets each slice and its index before it is written. Returns the slice of each SOP instance.
    """
    folder.mkdir(parents=True)
    row, column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    normal = np.cross(row, column) * (1 if upwards else -1)
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    slices = {}
    for index, pixels in enumerate(volume):
        source = pydicom.Dataset()
        source.SOPClassUID, source.SOPInstanceUID = CTImageStorage, generate_uid()
        source.StudyInstanceUID, source.SeriesInstanceUID, source.FrameOfReferenceUID = study, series, frame
        source.Modality, source.PatientName, source.SeriesNumber = "CT", "Doe^Jane", 3
        source.InstanceNumber = len(volume) - index
        source.Rows, source.Columns = pixels.shape
        source.PixelSpacing, source.SliceThickness = list(SPACING[:2]), SPACING[2]
        source.ImageOrientationPatient = list(orientation)
        source.ImagePositionPatient = [round(float(x), 4) for x in np.array([-10, 5, 30]) + index * SPACING[2] * normal]
        source.SamplesPerPixel, source.PhotometricInterpretation = 1, "MONOCHROME2"
        source.BitsAllocated = source.BitsStored = 16
        source.HighBit, source.PixelRepresentation = 15, 1
        source.RescaleSlope, source.RescaleIntercept = 1, 0
        source.PixelData = pixels.tobytes()
        source.file_meta = pydicom.dataset.FileMetaDataset()
        source.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        if change is not None:
            change(source, index)
        source.save_as(folder / f"{(7 * index) % 31:02d}.dcm", enforce_file_format=True)
        slices[source.SOPInstanceUID] = index
    return slices


def write_frames(
    path: Path, volume: np.ndarray, places: list[tuple[float, float, float]], spacing: tuple[float, float]
) -> None:
    """Write axial slices (slices, rows, columns) as the frames of one enhanced file, with rows and columns ``spacing``
    mm apart."""

    def item(**values: object) -> pydicom.Dataset:
        dataset = pydicom.Dataset()
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
        return dataset

    source = item(SOPClassUID=EnhancedCTImageStorage, SOPInstanceUID=generate_uid(), Modality="CT")
    source.StudyInstanceUID, source.SeriesInstanceUID = generate_uid(), generate_uid()
    source.NumberOfFrames, source.Rows, source.Columns = volume.shape
    source.SamplesPerPixel, source.PhotometricInterpretation = 1, "MONOCHROME2"
    source.BitsAllocated = source.BitsStored = 16
    source.HighBit, source.PixelRepresentation = 15, 1
    shared = item(
        PixelMeasuresSequence=[item(PixelSpacing=list(spacing), SliceThickness=2.5)],
        PlaneOrientationSequence=[item(ImageOrientationPatient=AXIAL)],
    )
    source.SharedFunctionalGroupsSequence = [shared]
    source.PerFrameFunctionalGroupsSequence = [
        item(PlanePositionSequence=[item(ImagePositionPatient=list(place))]) for place in places
    ]
    source.PixelData = volume.tobytes()
    source.file_meta = pydicom.dataset.FileMetaDataset()
    source.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    source.save_as(path, enforce_file_format=True)
