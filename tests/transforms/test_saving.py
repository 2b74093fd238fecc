from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.errors import BadInput
from common.transforms.saving import SaveNiftid

# Columns of 0.8, 1.25 and 3 mm, turned about the second axis by asin 0.6; the first two run to the left and the back.
OBLIQUE = np.array([[-0.64, 0, 1.8, 12.5], [0, -1.25, 0, -7.25], [0.48, 0, 2.4, 3], [0, 0, 0, 1]])
FLAT = np.array([[-0.64, 0.9, 12.5], [0.48, 1.2, -7.25], [0, 0, 1]])


def case(shape: tuple[int, ...], affine: np.ndarray, name: str = "/data/scan.nii.gz") -> dict[str, MetaTensor]:
    values = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)) * 300
    return {"map": MetaTensor(values, affine=torch.as_tensor(affine), meta={"filename_or_obj": name})}


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_a_file_holds_the_map_voxel_for_voxel_on_its_grid(tmp_path: Path, dtype: str) -> None:
    data = case((5, 4, 3), OBLIQUE)
    data["map"] = data["map"] % 256 if dtype == "uint8" else data["map"]
    assert SaveNiftid("map", tmp_path / "new", "seg", dtype)(data) == data
    found = nibabel.load(tmp_path / "new" / "scan_seg.nii.gz")
    assert found.get_data_dtype() == np.dtype(dtype)
    assert np.array_equal(np.asarray(found.dataobj), data["map"][0].numpy().astype(dtype))
    np.testing.assert_allclose(found.affine, OBLIQUE, atol=1e-6)
    np.testing.assert_allclose(found.header.get_zooms(), (0.8, 1.25, 3), atol=1e-6)
    # Both of NIfTI's descriptions of the grid, since readers differ in which they take.
    for affine, code in (found.header.get_sform(coded=True), found.header.get_qform(coded=True)):
        assert code == 1
        np.testing.assert_allclose(affine, OBLIQUE, atol=1e-5)


@pytest.mark.parametrize(("shape", "affine"), [((5, 4), FLAT), ((5, 4, 1), OBLIQUE), ((1, 4, 5), OBLIQUE)])
def test_a_plane_and_a_volume_of_one_slice_keep_their_axes(
    tmp_path: Path, shape: tuple[int, ...], affine: np.ndarray
) -> None:
    data = case(shape, affine)
    SaveNiftid("map", tmp_path, "map", "float32")(data)
    found = nibabel.load(tmp_path / "scan_map.nii.gz")
    assert found.shape == shape
    assert np.array_equal(np.asarray(found.dataobj), data["map"][0].numpy())
    expected = np.eye(4)
    rank = len(affine) - 1
    expected[:rank, :rank], expected[:rank, 3] = affine[:rank, :rank], affine[:rank, rank]
    np.testing.assert_allclose(found.affine, expected, atol=1e-6)


def test_a_disk_that_fills_up_leaves_the_old_file_or_none(tmp_path: Path, full_disk: Callable) -> None:
    save = SaveNiftid("map", tmp_path, "seg", "float32")
    save(case((5, 4, 3), OBLIQUE))
    old = (tmp_path / "scan_seg.nii.gz").read_bytes()
    for name in ("scan", "other"):
        with full_disk(1000), pytest.raises(BadInput, match=rf"{name}_seg\.nii\.gz: can't be written"):
            save(case((20, 20, 20), OBLIQUE, f"/data/{name}.nii.gz"))
    assert [path.name for path in tmp_path.iterdir()] == ["scan_seg.nii.gz"]
    assert (tmp_path / "scan_seg.nii.gz").read_bytes() == old
