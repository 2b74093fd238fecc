"""A prediction as DICOM Segmentation (DICOM PS3.3, A.51), which a PACS stores beside the series it was made from."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events

from .. import __version__
from ..data.datalist import case_name
from ..data.grids import describe_error, dicom_files
from ..errors import BadInput
from ..files import write_atomically
from .cases import array, case_file, case_meta, cases_of, is_main

__all__ = ["DicomSegWriter", "dicom_segmentation"]

# Must be there, be it empty; anonymised files often lack them.
PATIENT_AND_STUDY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime"),
)
LONGEST_LABEL = 64  # characters, of DICOM's LO
MANUFACTURER = "few-labels-bundles"


def _require_highdicom() -> Any:
    try:
        import highdicom
    except ImportError as error:
        raise BadInput(
            f"dicom_seg: needs highdicom, which can't be imported ({error}). Install it, `pip install highdicom`, or "
            "leave the option out."
        ) from error
    return highdicom


def dicom_segmentation(
    segmentation: torch.Tensor,
    folder: str | os.PathLike[str],
    labels: Mapping[str, str],
    algorithm: str = MANUFACTURER,
) -> Any:
    """A DICOM Segmentation of a label map, referring to the series it was predicted from.

    Each label but the background is a binary segment with the label's name, made by an automatic algorithm. The names
    being free, its coded category and type are both "Tissue" (SNOMED CT 85756007), as viewers do where nothing more is
    known. Patient and study are those of the series; series and instance are new.

    Args:
        segmentation: label ids (1, columns, rows, slices) on the series' own grid, as ITK reads it.
        folder: the series, single-frame files.
        labels: label id (as a string) to name, ids 0 to K - 1.
        algorithm: name of the algorithm in the file.

    Returns:
        A ``highdicom.seg.Segmentation``, not yet written. Slices without any label are left out of it.

    Raises:
        BadInput: highdicom is not installed, the folder is no series of single-frame files on the label map's grid, or
            the files lack what a segmentation has to repeat of them.
    """
    highdicom = _require_highdicom()
    import pydicom
    from pydicom.sr.codedict import codes

    ids = array(segmentation)
    # In the order in which ITK makes slices of them: by position, whatever names and instance numbers say.
    series = [pydicom.dcmread(file, stop_before_pixels=True) for file in dicom_files(folder)]
    for source in series:
        for keyword in PATIENT_AND_STUDY:
            if keyword not in source:
                setattr(source, keyword, "")
    try:
        if [(source.Columns, source.Rows, len(series)) for source in series] != [ids.shape] * len(series):
            raise BadInput(
                f"dicom_seg: {folder} has {len(series)} files of {series[0].Columns} x {series[0].Rows} pixels, the "
                f"prediction {' x '.join(map(str, ids.shape))} voxels; expected a series with a file a slice."
            )
        family = highdicom.AlgorithmIdentificationSequence(
            name=algorithm, family=codes.DCM.ArtificialIntelligence, version=__version__
        )
        segments = [
            highdicom.seg.SegmentDescription(
                segment_number=int(label),
                segment_label=name[:LONGEST_LABEL],
                segmented_property_category=codes.SCT.Tissue,
                segmented_property_type=codes.SCT.Tissue,
                algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=family,
            )
            for label, name in sorted(labels.items(), key=lambda item: int(item[0]))
            if int(label)
        ]
        return highdicom.seg.Segmentation(
            source_images=series,
            pixel_array=np.ascontiguousarray(ids.astype(np.uint8).transpose(2, 1, 0)),
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=highdicom.UID(),
            series_number=int(series[0].get("SeriesNumber") or 0) + 1000,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer=MANUFACTURER,
            manufacturer_model_name=algorithm,
            software_versions=__version__,
            device_serial_number="0",
            content_label="SEGMENTATION",
            series_description=f"Segmentation ({algorithm})",
            specific_character_set="ISO_IR 192",
        )
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"dicom_seg: no segmentation can be made for {folder} ({describe_error(error)}); its files lack something, "
            "or are not single-frame images."
        ) from error


class DicomSegWriter:
    """Write ``<case>_seg.dcm`` of every case that an evaluator predicts; see :func:`dicom_segmentation`.

    Args:
        output_dir: folder of the files.
        labels: label id (as a string) to name.
        cases: the entries that will be predicted; each must be the folder of a DICOM series.
        algorithm: name of the algorithm in the files.
        prediction_key: the predicted label map (1, *spatial) on the series' own grid.

    Raises:
        BadInput: highdicom is not installed, or a case is no DICOM series.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        labels: Mapping[str, str],
        cases: Sequence[Mapping[str, Any]],
        algorithm: str = MANUFACTURER,
        prediction_key: str = "segmentation",
    ) -> None:
        _require_highdicom()
        for case in (case for case in cases if "fault" not in case):
            if not isinstance(case["image"], str) or not os.path.isdir(case["image"]):
                raise BadInput(
                    f"dicom_seg: {case['image']} is no folder with a DICOM series, and a DICOM segmentation has to "
                    "refer to one. Predict the series alone, or leave the option out."
                )
        self.output_dir = Path(output_dir)
        self.labels = dict(labels)
        self.algorithm = algorithm
        self.prediction_key = prediction_key

    def attach(self, engine: Engine) -> None:
        """Register at the evaluator ``engine``: a file after every case."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        if not is_main():
            return
        for case in cases_of(engine):
            folder, buffer = case_file(case), io.BytesIO()
            dicom_segmentation(case[self.prediction_key], folder, self.labels, self.algorithm).save_as(buffer)
            write_atomically(self.output_dir / f"{case_name(case_meta(case))}_seg.dcm", buffer.getvalue())
