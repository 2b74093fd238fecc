from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.transforms.postprocessing import postprocessing
from common.transforms.preprocessing import preprocessing

LABELS = {"0": "background", "1": "lumen", "2": "wall"}
THICKNESS = {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": 0, "scale": 2.0}


# Folders of DICOM series are mostly named by UIDs, which differ behind their last dot.
@pytest.mark.parametrize("name", ["scan", "scan.one", "1.2.840.113", "1.2.840.114"])
def test_files_are_called_after_the_case(tmp_path: Path, name: str) -> None:
    path = tmp_path / "input" / f"{name}.nii.gz"
    path.parent.mkdir()
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4), dtype=np.float32), np.eye(4)), path)
    before = preprocessing(["image"])
    case = before({"image": str(path)})
    # What a DICOM series leaves behind: the folder, which has no suffix.
    case["image"].meta["filename_or_obj"] = str(path.parent / name)
    output = torch.zeros(4, 4, 4, 4)
    output[2], output[3] = 1.0, 2.5
    case["pred"] = MetaTensor(output, meta=case["image"].meta, applied_operations=case["image"].applied_operations)
    written = tmp_path / "output"
    postprocessing(before, LABELS, [THICKNESS], output_dir=str(written))(case)
    assert sorted(file.name for file in written.iterdir()) == [f"{name}_seg.nii.gz", f"{name}_thickness.nii.gz"]
    assert (nibabel.load(written / f"{name}_seg.nii.gz").get_fdata() == 2).all()
    assert (nibabel.load(written / f"{name}_thickness.nii.gz").get_fdata() == 2.5).all()
