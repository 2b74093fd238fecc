from __future__ import annotations

from pathlib import Path

import itk
import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from common.data.grids import grid_difference, read_grid
from common.errors import BadInput, find_bad_input
from common.transforms import LoadCased, preprocessing
from common.transforms.saving import SaveNiftid

LABELS = {"0": "background", "1": "lumen", "2": "wall"}
TARGETS = [
    {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": 0, "scale": 1.0},
    {"name": "severity", "unit": "", "kind": "mean", "structure": 1},
]
KEYS = ("image", "label", "thickness", "severity")


def write(path: Path, array: np.ndarray, affine=None) -> str:
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine), path)
    return str(path)


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return {
        "image": generator.normal(size=(6, 5, 4)).astype(np.float32),
        "label": generator.integers(0, 3, (6, 5, 4)).astype(np.uint8),
        "thickness": generator.random((6, 5, 4)).astype(np.float32),
    }


@pytest.fixture
def case(tmp_path, arrays):
    return {key: write(tmp_path / f"{key}.nii.gz", array) for key, array in arrays.items()} | {"severity": 0.25}


@pytest.fixture
def load():
    return LoadCased(KEYS, labels=LABELS, channels=1, targets=TARGETS)


def test_loads_what_was_written(load, case, arrays):
    loaded = load({**case, "annotated": [1, 2], "image_path": "elsewhere"})
    for key in ("image", "label", "thickness"):
        assert isinstance(loaded[key], MetaTensor)
        np.testing.assert_array_equal(loaded[key].numpy(), arrays[key][None])
        assert loaded[key].meta["filename_or_obj"] == case[key]
    assert loaded["image"].dtype == loaded["thickness"].dtype == torch.float32
    assert loaded["label"].dtype == torch.uint8
    assert loaded["severity"] == torch.tensor(0.25)
    assert loaded["annotated"] == [1, 2]
    assert loaded["image_path"] == "elsewhere"
    assert loaded["image"].pixdim.tolist() == [1, 2, 3]


def test_a_label_holds_what_its_case_is_annotated_for(load, case):
    with pytest.raises(BadInput, match=r"label.nii.gz holds the ids \[0, 1, 2\], but .* `annotated` is \[2\]"):
        load({**case, "annotated": [2]})
    assert load({**case, "annotated": [2], "completed": case["label"]})["annotated"] == [2]


def test_an_image_alone_is_enough(load, case):
    loaded = load({"image": case["image"]})
    assert set(loaded) == {"image", "severity"}
    assert torch.isnan(loaded["severity"])
    # Nothing but the image is touched where only that is asked for.
    assert LoadCased(("image",))({"image": case["image"], "label": "absent"})["label"] == "absent"


def test_a_labelled_case_without_its_map_has_it_missing_everywhere(case):
    target = {**TARGETS[0], "missing": -1}
    load = LoadCased(("image", "label", "thickness"), targets=[target])
    loaded = load({"image": case["image"], "label": case["label"]})
    assert (loaded["thickness"] == -1).all()
    assert loaded["thickness"].shape == loaded["label"].shape


def test_keys_that_must_be_there(case):
    load = LoadCased(("image", "label"), allow_missing_keys=False)
    with pytest.raises(BadInput, match="image has no `label`"):
        load({"image": case["image"]})
    with pytest.raises(BadInput, match="no `image`"):
        load({"label": case["label"]})
    with pytest.raises(BadInput, match="neither"):
        LoadCased(("image", "thicknes"), targets=TARGETS)


def test_an_image_of_more_axes_than_the_network_has(arrays, tmp_path):
    path = write(tmp_path / "volume.nii.gz", arrays["image"])
    assert LoadCased(["image"], dimensions=3)({"image": path})["image"].ndim == 4
    with pytest.raises(RuntimeError) as caught:
        preprocessing(["image"], spacing=[1.0, 1.0])({"image": path})
    message = find_bad_input(caught.value)
    assert "volume.nii.gz has the shape (6, 5, 4); the network takes images of 2 dimensions" in message


def rotated(degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return affine @ np.diag([0.7, 1.3, 2.1, 1.0])


def test_a_sheared_grid_is_refused_and_an_oblique_one_is_not(arrays, tmp_path):
    """The product of a sheared voxel's sides is not its volume."""
    load = LoadCased(["image"])
    straight = write(tmp_path / "oblique.nii.gz", arrays["image"], rotated(20.0))
    assert load({"image": straight})["image"].shape == (1, 6, 5, 4)
    assert read_grid(straight).shape == (6, 5, 4)
    tilted = rotated(20.0)
    tilted[1, 2] += 2.1 * np.tan(np.deg2rad(15.0))
    sheared = write(tmp_path / "tilted.nii.gz", arrays["image"], tilted)
    for read in (read_grid, lambda path: load({"image": path})):
        with pytest.raises(BadInput, match=r"tilted\.nii\.gz: its axes are 1\d\.\d degrees from right angles"):
            read(sheared)
    image = nibabel.load(straight)
    image.header["srow_y"] = 0
    image.header["qform_code"] = 0
    image.header["pixdim"][1:4] = np.linalg.norm(image.header.get_sform()[:3, :3], axis=0)
    (tmp_path / "flat.nii").write_bytes(image.header.binaryblock + bytes(4) + arrays["image"].tobytes("F"))
    with pytest.raises(BadInput, match=r"flat\.nii: its axes are 90\.0 degrees from right angles"):
        read_grid(tmp_path / "flat.nii")


@pytest.mark.parametrize("angles", [(30, 0, 0), (0, 50, 0), (40, 35, 20), (85, 0, 0), (90, 0, 0), (0, 0, 25)])
def test_a_tilted_slice_has_the_pixels_of_its_header(angles, tmp_path):
    """Not their shadow on the plane of the first two axes, nor a shear: as in a short axis of the heart."""
    turns = []
    for axis, angle in enumerate(np.radians(angles)):
        turn = np.eye(3)
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[second, first], turn[first, second] = np.sin(angle), -np.sin(angle)
        turns.append(turn)
    affine = np.eye(4)
    affine[:3, :3] = turns[2] @ turns[1] @ turns[0] @ np.diag([1.5, 0.75, 8.0])
    path = tmp_path / "slice.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((6, 5), np.float32), affine), path)
    loaded = LoadCased(("image",))({"image": str(path)})["image"]
    assert loaded.affine.shape == (3, 3)
    assert np.linalg.norm(loaded.affine[:2, :2], axis=0) == pytest.approx([1.5, 0.75], rel=1e-5)
    assert float(loaded.affine[:2, 0] @ loaded.affine[:2, 1]) == pytest.approx(0, abs=1e-5)
    # A label of the same header fits, whether or not the image is loaded; so does what is written of a prediction.
    label = tmp_path / "label.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones((6, 5), np.uint8), affine), label)
    together = LoadCased(("image", "label"))({"image": str(path), "label": str(label)})
    alone = LoadCased(("label",))({"image": str(path), "label": str(label)})["label"]
    assert torch.equal(alone.affine, together["label"].affine)
    SaveNiftid("image", tmp_path / "out", "seg", "uint8")({"image": together["image"]})
    written = nibabel.load(tmp_path / "out" / "slice_seg.nii.gz")
    np.testing.assert_allclose(written.affine, affine, atol=1e-5)
    assert grid_difference(read_grid(path), read_grid(tmp_path / "out" / "slice_seg.nii.gz")) is None


def test_absent_truncated_and_damaged_files(load, case, tmp_path):
    with pytest.raises(BadInput, match=r"none\.nii\.gz does not exist"):
        load({"image": str(tmp_path / "none.nii.gz")})
    generator = np.random.default_rng(0)
    path = Path(write(tmp_path / "large.nii.gz", generator.normal(size=(20, 20, 20))))
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(BadInput, match=r"large\.nii\.gz can't be read"):
        load({"image": str(path)})
    path = tmp_path / "text.nii"
    path.write_text("this is no image")
    with pytest.raises(BadInput, match=r"text\.nii can't be opened"):
        load({"image": str(path)})


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
def test_itk_formats_equal_nifti_and_are_checked_too(load, tmp_path, arrays, suffix):
    image = itk.image_from_array(np.ascontiguousarray(arrays["image"].T))
    image.SetSpacing((1.0, 2.0, 3.0))
    image.SetOrigin((4.0, 5.0, 6.0))
    for name in (f"a.{suffix}", "a.nii.gz"):
        itk.imwrite(image, str(tmp_path / name))
    ours, nifti = (load({"image": str(tmp_path / name)})["image"] for name in (f"a.{suffix}", "a.nii.gz"))
    np.testing.assert_array_equal(ours.numpy(), arrays["image"][None])
    torch.testing.assert_close(ours.as_tensor(), nifti.as_tensor())
    torch.testing.assert_close(ours.affine, nifti.affine, check_dtype=False)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match=rf"a\.{suffix} can't be read"):
        load({"image": str(path)})


def write_series(folder: Path, volume: np.ndarray, uid: str, spacing: float = 2.5) -> None:
    folder.mkdir(exist_ok=True)
    for index, pixels in enumerate(volume):
        image = itk.image_from_array(np.ascontiguousarray(pixels[None]))
        image.SetSpacing((0.5, 0.75, spacing))
        image.SetOrigin((1.0, 2.0, 3.0 + spacing * index))
        tags = image.GetMetaDataDictionary()
        tags["0020|000e"] = uid
        tags["0020|000d"] = "1.2.3"
        tags["0008|0060"] = "CT"
        tags["0020|0013"] = str(index + 1)
        writer = itk.ImageFileWriter.New(image, FileName=str(folder / f"{uid}-{index}.dcm"))
        gdcm = itk.GDCMImageIO.New()
        gdcm.KeepOriginalUIDOn()
        writer.SetImageIO(gdcm)
        writer.Update()


def test_dicom_series(load, tmp_path):
    volume = np.random.default_rng(0).integers(0, 1000, (4, 6, 5)).astype(np.int16)
    write_series(tmp_path / "series", volume, "1.2.3.4")
    label = write(
        tmp_path / "label.nii.gz",
        np.zeros((5, 6, 4), np.uint8),
        np.array([[-0.5, 0, 0, -1], [0, -0.75, 0, -2], [0, 0, 2.5, 3], [0, 0, 0, 1]]),
    )
    loaded = load({"image": str(tmp_path / "series"), "label": label})
    np.testing.assert_array_equal(loaded["image"].numpy()[0], volume.T)
    assert loaded["image"].pixdim.tolist() == [0.5, 0.75, 2.5]
    assert loaded["image"].meta["filename_or_obj"] == str(tmp_path / "series")

    from common.data import check_cases

    check_cases([{"image": str(tmp_path / "series"), "label": label}], channels=1, patch_size=(4, 4, 4))

    write_series(tmp_path / "series", volume[:2], "1.2.3.5")
    # By their files, not by their numbers, which lead to a patient.
    with pytest.raises(BadInput, match=r"2 DICOM series: that of 1\.2\.3\.\d-0\.dcm \([24] files\), that of [^:]*$"):
        load({"image": str(tmp_path / "series")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="without a DICOM series"):
        load({"image": str(tmp_path / "empty")})


def test_nan_is_refused_and_counted(load, case, arrays, tmp_path):
    arrays["image"][0, 0, :3] = np.nan, np.inf, -np.inf
    with pytest.raises(BadInput, match=r"bad\.nii\.gz has 3 NaN or infinite voxels of 120"):
        load({**case, "image": write(tmp_path / "bad.nii.gz", arrays["image"])})
    arrays["thickness"][0, 0, 0] = np.nan
    with pytest.raises(BadInput, match=r"thickness .*has 1 NaN"):
        load({**case, "thickness": write(tmp_path / "bad.nii.gz", arrays["thickness"])})


def test_intensities_that_no_scanner_gives(load, arrays, tmp_path):
    """Their squares have no sum, and all of the image would be background."""
    image = arrays["image"] * np.float32(1e30)
    with pytest.raises(BadInput, match=r"large\.nii has intensities up to \d\.\d+e\+30, which can't be normalised"):
        load({"image": write(tmp_path / "large.nii", image)})


def test_channels(load, tmp_path, arrays):
    two = write(tmp_path / "two.nii.gz", np.stack([arrays["image"], 2 * arrays["image"]], -1))
    with pytest.raises(BadInput, match=r"two\.nii\.gz has 2 channel\(s\); the network takes 1"):
        load({"image": two})
    one = write(tmp_path / "one.nii.gz", arrays["image"])
    for image in (two, [one, one]):
        assert LoadCased(("image",), channels=2)({"image": image})["image"].shape == (2, 6, 5, 4)


def test_label_ids(load, case, arrays, tmp_path):
    arrays["label"][0, 0, 0] = 7
    bad = write(tmp_path / "bad.nii.gz", arrays["label"])
    with pytest.raises(BadInput, match=r"ids \[0, 1, 2, 7\]; \[7\] are not in `labels` \(0 background, 1 lumen"):
        load({**case, "label": bad})
    assert LoadCased()({**case, "label": bad})["label"].max() == 7
    with pytest.raises(BadInput, match="not whole numbers"):
        load({**case, "label": write(tmp_path / "bad.nii.gz", arrays["label"] * np.float32(0.5))})
    with pytest.raises(BadInput, match="from -1 to"):
        load({**case, "label": write(tmp_path / "bad.nii.gz", arrays["label"].astype(np.int16) - 1)})
    ids = np.where(arrays["label"] == 1, 300, 0).astype(np.uint16)
    assert LoadCased()({**case, "label": write(tmp_path / "many.nii.gz", ids)})["label"].dtype == torch.int16


@pytest.mark.parametrize("key", ["label", "thickness"])
def test_other_grids(load, case, arrays, tmp_path, key):
    small = write(tmp_path / "small.nii.gz", arrays[key][1:])
    with pytest.raises(BadInput, match=rf"{key} .*small\.nii\.gz are not on one grid: their shapes differ"):
        load({**case, key: small})
    flipped = write(tmp_path / "flipped.nii.gz", arrays[key], np.diag([-1.0, 2.0, 3.0, 1.0]))
    with pytest.raises(BadInput, match="corners lie up to 10 mm apart"):
        load({**case, key: flipped})


def test_case_level_target_that_is_no_number(load, case):
    with pytest.raises(BadInput, match="`severity` is 'bad'"):
        load({**case, "severity": "bad"})
