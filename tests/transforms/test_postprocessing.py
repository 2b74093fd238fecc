from __future__ import annotations

from pathlib import Path

import itk
import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.errors import BadInput
from common.transforms.postprocessing import load_references, postprocessing
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


# Columns of 0.8, 1.25 and 3 mm, turned about the second axis by asin 0.6; the axes run to left, back and up.
OBLIQUE = np.array([[-0.64, 0, 1.8, 12.5], [0, -1.25, 0, -7.25], [0.48, 0, 2.4, 3], [0, 0, 0, 1]])


@pytest.mark.parametrize("suffix", ["nii.gz", "nrrd"])
@pytest.mark.parametrize("shape", [(7, 6, 5), (7, 6, 1)], ids=["volume", "slice"])
def test_files_lie_on_the_grid_of_their_input_voxel_for_voxel(
    tmp_path: Path, suffix: str, shape: tuple[int, ...]
) -> None:
    ids = np.random.default_rng(0).integers(0, 3, shape).astype(np.int16)
    if suffix == "nrrd":
        image = itk.image_from_array(np.ascontiguousarray(ids.T))
        in_lps = np.diag([-1, -1, 1, 1]) @ OBLIQUE
        sizes = np.linalg.norm(in_lps[:3, :3], axis=0)
        image.SetSpacing(sizes.tolist())
        image.SetDirection(itk.matrix_from_array(in_lps[:3, :3] / sizes))
        image.SetOrigin(in_lps[:3, 3].tolist())
        itk.imwrite(image, str(tmp_path / "scan.nrrd"))
    else:
        nibabel.save(nibabel.Nifti1Image(ids, OBLIQUE), tmp_path / "scan.nii.gz")
    before = preprocessing(["image"])
    case = before({"image": str(tmp_path / f"scan.{suffix}")})
    # A network that finds just what the image shows: its three values, whatever normalising made of them.
    classes = torch.as_tensor(
        np.unique(case["image"].numpy()[0], return_inverse=True)[1].reshape(case["image"].shape[1:])
    )
    output = torch.cat([torch.nn.functional.one_hot(classes, 3).movedim(-1, 0) * 20.0, 0.25 + classes[None]])
    case["pred"] = MetaTensor(output, meta=case["image"].meta, applied_operations=case["image"].applied_operations)
    postprocessing(before, LABELS, [THICKNESS], output_dir=str(tmp_path))(case)
    expected = {"seg": ids.astype(np.uint8), "thickness": np.where(ids == 2, 2.25, 0).astype(np.float32)}
    for postfix, array in expected.items():
        found = nibabel.load(tmp_path / f"scan_{postfix}.nii.gz")
        assert found.shape == shape
        assert found.get_data_dtype() == array.dtype
        assert np.array_equal(np.asarray(found.dataobj), array)
        np.testing.assert_allclose(found.affine, OBLIQUE, atol=1e-5)


def test_references_are_the_files_as_they_are(tmp_path: Path) -> None:
    arrays = {
        "label": np.random.default_rng(0).integers(0, 3, (6, 5, 4)).astype(np.uint8),
        "thickness": np.random.default_rng(1).random((6, 5, 4)).astype(np.float32),
    }
    case = {key: str(tmp_path / f"{key}.nii.gz") for key in arrays}
    for key, array in arrays.items():
        nibabel.save(nibabel.Nifti1Image(array, OBLIQUE), case[key])
    loaded = load_references([THICKNESS, {"name": "volume", "unit": "mL", "kind": "sum"}])({**case, "volume": 3.0})
    for key, name in (("label", "reference"), ("thickness", "reference_thickness")):
        assert np.array_equal(loaded[name].numpy(), arrays[key][None])
        np.testing.assert_allclose(loaded[name].affine, OBLIQUE, atol=1e-6)
        assert loaded[key] == case[key]
    assert loaded["volume"] == 3.0
    assert load_references([THICKNESS])({"image": "absent.nii.gz"}) == {"image": "absent.nii.gz"}


@pytest.mark.parametrize("key", ["label", "thickness"])
def test_a_reference_that_can_t_be_read_is_named_with_its_key(tmp_path: Path, key: str) -> None:
    path = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((20, 20, 20)), np.eye(4)), path)
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(BadInput, match=rf"^{key} {path} can't be read \(EOFError"):
        load_references([THICKNESS])({key: str(path)})
    path.unlink()
    with pytest.raises(BadInput, match=rf"^{key} {path} does not exist"):
        load_references([THICKNESS])({key: str(path)})


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
