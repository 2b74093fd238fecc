"""A CT series as a scanner writes it, for tests. Needs pydicom, which comes with highdicom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SPACING = (0.75, 0.5, 2.5)  # between rows, columns, slices
AXIAL = [1, 0, 0, 0, 1, 0]
SAGITTAL = [0, 1, 0, 0, 0, -1]
OBLIQUE = [0.8, 0.6, 0, 0, 0, -1]


def write_series(folder: Path, volume: np.ndarray, orientation: list[float], upwards: bool = True) -> dict[str, int]:
    """Write up to 31 slices (slices, rows, columns), names and instance numbers in an order of their own.

    Returns the slice of each SOP instance.
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
        source.save_as(folder / f"{(7 * index) % 31:02d}.dcm", enforce_file_format=True)
        slices[source.SOPInstanceUID] = index
    return slices
