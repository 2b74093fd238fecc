from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Invertd, RandGaussianNoised, SpatialResample

from common.errors import BadInput
from common.transforms import air, chain, preprocessing
from common.transforms.preprocessing import Spacingd

LABELS = {"0": "background", "1": "lumen", "2": "wall"}
TARGETS = [
    {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": -1},
    {"name": "volume", "unit": "mL", "kind": "sum"},
]
# Left-anterior-superior, with the first two axes exchanged: nothing here is in the order that the network sees.
AFFINE = np.array([[0.0, -1.5, 0.0, 20.0], [2.0, 0.0, 0.0, -7.0], [0.0, 0.0, 3.0, 5.0], [0.0, 0.0, 0.0, 1.0]])


def write(path: Path, array: np.ndarray, affine=AFFINE) -> str:
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return str(path)


@pytest.fixture
def case(tmp_path):
    label = np.zeros((12, 16, 8), np.uint8)
    label[2:6, 3:12, 2:6] = 1
    label[6:10, 3:7, 2:6] = 2
    image = label * 100.0 + np.random.default_rng(0).normal(size=label.shape)
    return {
        "image": write(tmp_path / "image.nii.gz", image.astype(np.float32)),
        "label": write(tmp_path / "label.nii.gz", label),
        "thickness": write(tmp_path / "thickness.nii.gz", np.where(label == 2, 1.75, -1).astype(np.float32)),
        "volume": 3,
    }


def test_orientation_spacing_and_types(case):
    transform = preprocessing(
        ("image", "label", "thickness", "volume"), LABELS, 1, TARGETS, spacing=(1.5, 1.0, 3.0), intensity=None
    )
    done = transform(case)
    # RAS: the file's second axis runs right to left with 1.5 mm, its first to the front with 2 mm, now 1 mm.
    assert done["image"].shape == done["label"].shape == done["thickness"].shape == (1, 16, 23, 8)
    assert done["image"].pixdim.tolist() == [1.5, 1.0, 3.0]
    assert [value.dtype for value in (done["image"], done["label"], done["thickness"], done["volume"])] == [
        torch.float32,
        torch.uint8,
        torch.float32,
        torch.float32,
    ]
    assert done["label"].unique().tolist() == [0, 1, 2]
    # Nearest: no value in between, and the map still agrees with the label.
    assert done["thickness"].unique().tolist() == [-1, 1.75]
    assert torch.equal(done["thickness"] > 0, done["label"] == 2)
    assert abs(float(done["image"].mean())) < 1e-4
    assert abs(float(done["image"].std()) - 1) < 1e-2
    assert done["volume"] == 3


def test_no_spacing_keeps_voxels(case):
    done = preprocessing(("image", "label"), LABELS)(case)
    expected = np.flip(nibabel.load(case["label"]).get_fdata().transpose(1, 0, 2), 0)
    np.testing.assert_array_equal(done["label"][0].numpy(), expected)


@pytest.mark.parametrize("spacing", [None, (1.0, 1.5, 2.0)])
def test_a_prediction_returns_to_the_files_grid(case, spacing):
    transform = preprocessing(("image", "label"), LABELS, spacing=spacing)
    done = transform(case)
    done["pred"] = done["label"].clone().to(torch.float32)
    done["pred"].applied_operations = []
    back = Invertd("pred", transform=transform, orig_keys="image", nearest_interp=True)(done)["pred"]
    original = nibabel.load(case["label"])
    assert back.shape[1:] == original.shape
    np.testing.assert_allclose(back.affine, original.affine, atol=1e-5)
    agreement = (back[0].numpy() == original.get_fdata()).mean()
    assert agreement == 1 if spacing is None else agreement > 0.93


def test_only_the_image_and_other_entries_as_monai_label_gives_them(case):
    transform = preprocessing(labels=LABELS, spacing=(2, 2, 2))
    done = transform({"image": case["image"], "image_path": "somewhere", "image_count": 3, "image_meta": {"a": 1}})
    assert done["image_path"] == "somewhere"
    assert done["image_count"] == 3
    assert done["image"].pixdim.tolist() == [2, 2, 2]
    assert "label" not in done


def test_it_warns_of_nothing(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preprocessing(("image", "label"), LABELS, spacing=(2, 2, 2))


def test_two_dimensions(tmp_path):
    image = np.random.default_rng(0).normal(size=(10, 12)).astype(np.float32)
    affine = np.diag([-1.0, 2.0, 1.0, 1.0])
    case = {
        "image": write(tmp_path / "a.nii.gz", image, affine),
        "label": write(tmp_path / "b.nii.gz", (image > 0).astype(np.uint8), affine),
    }
    transform = preprocessing(("image", "label"), spacing=(1.0, 1.0))
    done = transform(case)
    assert done["image"].shape == done["label"].shape == (1, 10, 23)
    assert torch.equal(done["label"][0, :, 0], torch.from_numpy(np.flip((image > 0)[:, 0], 0).copy()))


@pytest.mark.parametrize("orientation", ["LPS", "RAI"])
def test_axes_run_where_they_are_asked_to(orientation, tmp_path):
    image = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    intensity = {"kind": "ct", "lower": 0, "upper": 23, "mean": 0, "std": 1}
    prepare = preprocessing(intensity=intensity, orientation=orientation)
    done = prepare({"image": write(tmp_path / "a.nii.gz", image, np.eye(4))})["image"]
    turned = [axis for axis in range(3) if orientation[axis] != "RAS"[axis]]
    np.testing.assert_allclose(done[0], np.flip(image, turned), atol=1e-4)


def test_zscore_is_a_channel(tmp_path):
    image = np.random.default_rng(0).normal(size=(6, 5, 4, 2)).astype(np.float32) * (1, 50) + (0, 1000)
    done = preprocessing(channels=2)({"image": write(tmp_path / "a.nii.gz", image.astype(np.float32))})["image"]
    np.testing.assert_allclose(done.mean((1, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(done.std((1, 2, 3), correction=0), 1, atol=1e-3)


def test_zscore_of_the_nonzero_part_leaves_the_rest_at_zero(tmp_path):
    image = np.zeros((4, 4, 4), np.float32)
    image[1, 1] = [0, 10, 20, 30]
    path = write(tmp_path / "a.nii.gz", image, np.eye(4))
    done = preprocessing(intensity={"kind": "zscore", "nonzero": True})({"image": path})["image"][0]
    spread = (200 / 3) ** 0.5  # of 10, 20 and 30
    np.testing.assert_allclose(done[1, 1], [0, -10 / spread, 0, 10 / spread], atol=1e-5)
    assert np.count_nonzero(done) == 2


def test_each_channel_in_its_own_way(tmp_path):
    image = np.zeros((2, 2, 2, 2), np.float32)
    image[..., 0].flat = [-2000, -100, 0, 40, 100, 200, 300, 4000]
    image[..., 1].flat = [0, 2] * 4
    intensity = [{"kind": "ct", "lower": -100, "upper": 300, "mean": 40, "std": 20}, {"kind": "zscore"}]
    path = write(tmp_path / "a.nii.gz", image, np.eye(4))
    done = preprocessing(channels=2, intensity=intensity)({"image": path})["image"]
    np.testing.assert_allclose(done[0].flatten(), [-7, -7, -2, 0, 3, 8, 13, 13], atol=1e-5)
    np.testing.assert_allclose(done[1].flatten(), [-1, 1] * 4, atol=1e-5)
    assert done.affine.shape == (4, 4)
    with pytest.raises(BadInput, match="describes 2 channels; the network takes 1"):
        preprocessing(channels=1, intensity=intensity)


def test_ct_clips_then_normalises(tmp_path):
    image = np.zeros((2, 2, 2), np.float32)
    image.flat = [-2000, -100, 0, 40, 100, 200, 300, 4000]
    intensity = {"kind": "ct", "lower": -100, "upper": 300, "mean": 40, "std": 20}
    done = preprocessing(intensity=intensity)({"image": write(tmp_path / "a.nii.gz", image, np.eye(4))})["image"]
    np.testing.assert_allclose(done.flatten(), [-7, -7, -2, 0, 3, 8, 13, 13], atol=1e-5)


def test_air_of_a_ct_is_below_900_hu(tmp_path):
    intensity = {"kind": "ct", "lower": -1000, "upper": 300, "mean": 40, "std": 20}
    image = np.full((4, 4, 4), -901, np.float32)
    image[0, 0, 0] = -899
    done = preprocessing(intensity=intensity)({"image": write(tmp_path / "a.nii.gz", image, np.eye(4))})["image"]
    assert np.argwhere(np.asarray(done[0]) > air(intensity)).tolist() == [[0, 0, 0]]
    assert air([intensity]) == air(intensity, [{"name": "thickness", "kind": "dense"}]) == air(intensity)
    assert air({**intensity, "lower": -160}) is None, "fat and air look alike"
    assert air(intensity, [{"name": "volume", "kind": "sum"}]) is None, "every voxel counts"


@pytest.mark.parametrize("intensity", [None, {"kind": "zscore"}, [{"kind": "zscore"}] * 2])
def test_of_other_images_nobody_knows_what_air_is(intensity):
    assert air(intensity) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"intensity": {"kind": "mri"}}, 'expected "zscore" or "ct"'),
        ({"orientation": "PRS"}, "expected one letter an axis"),
        ({"intensity": {"kind": "ct", "lower": 0}}, "upper"),
        ({"intensity": {"kind": "ct", "lower": 2, "upper": 1, "mean": 0, "std": 1}}, "must be below"),
        ({"spacing": (1, 0, 1)}, "positive number of mm"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(BadInput, match=message):
        preprocessing(**arguments)


def test_voxels_that_are_much_larger_than_wanted_come_of_a_wrong_header(tmp_path):
    values = np.zeros((4, 4, 4), np.float32)
    transform = preprocessing(spacing=(1.0, 1.0, 1.0))
    assert transform({"image": write(tmp_path / "a.nii", values, np.diag([9.0, 9.0, 9.0, 1.0]))})["image"].shape[1] > 20
    path = write(tmp_path / "b.nii", values, np.diag([0.5, 0.5, 9000.0, 1.0]))
    with pytest.raises(BadInput, match=r"b\.nii: its voxels are 0\.5 x 0\.5 x 9000 mm large, the network's 1 x 1 x 1"):
        transform.transforms[2](transform.transforms[0]({"image": path}))


def test_chain_is_flat_so_that_the_deterministic_part_is_cached(case):
    transform = chain(preprocessing(("image", "label"), LABELS), None, RandGaussianNoised("image", prob=1.0))
    assert isinstance(transform.transforms[-1], RandGaussianNoised)
    dataset = CacheDataset([case], transform, progress=False)
    assert isinstance(dataset._cache[0]["image"], torch.Tensor)


@pytest.mark.parametrize("dims", [2, 3])
def test_going_back_in_slabs_is_going_back(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a whole the sampling grid of a large volume takes several times its memory."""
    affine = np.eye(dims + 1)
    affine[:2, :2] = [[1.4, 0.3], [-0.2, 1.7]]
    affine[0, -1] = 11.0
    image = MetaTensor(torch.rand(1, *(23, 17, 9)[:dims]), affine, meta={"filename_or_obj": "scan.nii"})
    spacing = Spacingd("image", pixdim=(0.9, 2.5, 1.3)[:dims], mode="bilinear", dtype=np.float32)
    done = spacing({"image": image})["image"]
    whole = spacing.inverse({"image": done.clone()})["image"]
    module = sys.modules["common.transforms.preprocessing"]
    monkeypatch.setattr(module, "VOXELS_RESAMPLED_AT_ONCE", 5 * 17 * 9 ** (dims - 2))
    sizes = []
    resample = SpatialResample.__call__

    def spy(self: SpatialResample, image: MetaTensor, affine: Any, size: Any, **settings: Any) -> MetaTensor:
        sizes.append(list(size))
        return resample(self, image, affine, size, **settings)

    monkeypatch.setattr(SpatialResample, "__call__", spy)
    slabs = spacing.inverse({"image": done.clone()})["image"]
    assert [size[0] for size in sizes] == [5, 5, 5, 5, 3]
    torch.testing.assert_close(slabs.as_tensor(), whole.as_tensor(), rtol=1e-5, atol=1e-5)
    assert slabs.shape == image.shape
    assert torch.allclose(slabs.affine, whole.affine, atol=1e-12)
    assert slabs.applied_operations == whole.applied_operations == []
    assert slabs.meta["filename_or_obj"] == "scan.nii"
    assert set(slabs.meta) == set(whole.meta)


def test_a_grid_that_did_not_change_is_not_resampled_on_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["common.transforms.preprocessing"], "VOXELS_RESAMPLED_AT_ONCE", 1)
    image = MetaTensor(torch.rand(1, 9, 8, 7), np.diag([1.5, 1.5, 2.0, 1.0]))
    spacing = Spacingd("image", pixdim=(1.5, 1.5, 2.0), mode="bilinear", dtype=np.float32)
    restored = spacing.inverse(spacing({"image": image}))["image"]
    assert torch.equal(restored.as_tensor(), image.as_tensor())
