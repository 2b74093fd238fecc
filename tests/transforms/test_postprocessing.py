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


def test_only_the_largest_component_of_each_structure_stays_when_asked_for(tmp_path: Path) -> None:
    classes = torch.zeros(6, 6, 6, dtype=torch.long)
    classes[0, 0, 0] = classes[1, 1, 1] = classes[1, 1, 2] = 1  # one piece, by a corner
    classes[5, 5, 5] = classes[5, 5, 4] = 1
    classes[1, 1, 3:5] = 2
    classes[1, 1, 5] = 1  # touches the second structure's largest piece, but not its own
    classes[4, 0, 0] = 2
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((6, 6, 6)), np.eye(4)), tmp_path / "case.nii.gz")
    before = preprocessing(["image"])
    image = before({"image": str(tmp_path / "case.nii.gz")})["image"]
    output = torch.nn.functional.one_hot(classes, 3).movedim(-1, 0).float()

    def segmentation(**options: bool) -> torch.Tensor:
        case = {
            "image": image,
            "pred": MetaTensor(output, meta=image.meta, applied_operations=image.applied_operations),
        }
        return postprocessing(before, LABELS, **options)(case)["segmentation"]

    assert torch.equal(segmentation()[0].long(), classes)
    kept = segmentation(largest_component=True)
    assert kept.dtype == torch.uint8
    expected = classes.clone()
    expected[5, 5, 4:] = 0
    expected[4, 0, 0] = expected[1, 1, 5] = 0
    assert torch.equal(kept[0].long(), expected)
