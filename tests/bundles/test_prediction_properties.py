"""What holds for a prediction of any volume, through a bundle's own inference.

In place of a trained network one that tells light voxels from dark ones, so that the truth is known. The volumes are
drawn by Hypothesis (MacIver et al., Journal of Open Source Software 2019), always the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from bundle_runs import config
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from nibabel.affines import rescale_affine
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from scipy import ndimage
from torch import nn

from common.engines import predict
from common.errors import BadInput

NETWORK_SPACING = 1.0  # mm
Predict = Callable[[nibabel.Nifti1Image], tuple[nibabel.Nifti1Image, dict[str, Any]]]
repeatable = settings(derandomize=True, deadline=None, max_examples=25, database=None)


class Threshold(nn.Module):
    """Class 1 where the last channel is above zero, as normalised."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([-image[:, -1:], image[:, -1:]], dim=1)


@pytest.fixture(scope="module")
def inference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Predict]:
    """A bundle's inference on a volume of so many dimensions and channels: label map and numbers."""

    def make(dimensions: int = 3, channels: int = 1, suffix: str = ".nii.gz") -> Predict:
        folder = tmp_path_factory.mktemp("inference")
        parser = ConfigParser()
        parser.read_config(config("teacher", "inference.json"))
        parser.update({"labels": {"0": "dark", "1": "light"}, "channels": channels, "intensity": {"kind": "zscore"}})
        parser.update({"spatial_dims": dimensions, "spacing": [NETWORK_SPACING] * dimensions})
        parser.update({"patch_size": [24] * dimensions, "device": "cpu", "amp": False, "network": Threshold()})
        parser.update({"output_dir": str(folder / "out"), "dataset#data": []})
        evaluator = parser.get_parsed_content("evaluator")
        preprocessing = parser.get_parsed_content("preprocessing")

        def call(image: nibabel.Nifti1Image) -> tuple[nibabel.Nifti1Image, dict[str, Any]]:
            path = folder / f"a{suffix}"
            nibabel.save(image, path)
            cases = [{"image": str(path)}]
            evaluator.data_loader = DataLoader(Dataset(cases, preprocessing), batch_size=1)
            predict(evaluator, cases)
            return nibabel.load(folder / "out" / "a_seg.nii.gz"), json.loads((folder / "out" / "a.json").read_text())

        return call

    return make


@st.composite
def affines(draw: st.DrawFn, shape: tuple[int, ...]) -> np.ndarray:
    """Any orientation, flips, voxel size and place; oblique, too."""
    codes = [draw(st.sampled_from(pair)) for pair in draw(st.permutations(["RL", "AP", "SI"]))]
    sides = [draw(st.sampled_from([0.3, 0.7, 1.0, 1.25, 2.0, 5.0])) for _ in range(3)]
    angle = np.deg2rad(draw(st.sampled_from([0, 0, 5, 30])))
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    flipped = inv_ornt_aff(ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes)), (*shape, 1, 1)[:3])
    affine = turned @ rescale_affine(flipped, (*shape, 1, 1)[:3], sides)
    affine[:3, 3] = [draw(st.sampled_from([0.0, -120.5, 1000.0])) for _ in range(3)]
    return affine


@st.composite
def masks(draw: st.DrawFn, dimensions: int = 3) -> np.ndarray:
    """An ellipsoid or a box somewhere in a volume of odd or even, long or single-slice shape; not all of it."""
    shape = tuple(draw(st.integers(1, 14)) for _ in range(dimensions))
    assume(np.prod(shape) > 1)
    sizes = np.array(shape).reshape(-1, *[1] * dimensions)
    centre, radii = (sizes * np.array([draw(st.floats(0, 1)) for _ in shape]).reshape(sizes.shape) for _ in range(2))
    away = np.abs(np.indices(shape) + 0.5 - centre) / (radii + 0.51)
    mask = away.max(0) <= 1 if draw(st.booleans()) else (away**2).sum(0) <= 1
    assume(mask.any() and not mask.all())
    return mask


def make_image(mask: np.ndarray, affine: np.ndarray, dark: float = -900, light: float = 60) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image(np.where(mask, light, dark).astype(np.float32), affine)


def labels_of(image: nibabel.Nifti1Image) -> np.ndarray:
    return np.asarray(image.dataobj)


def layer(mask: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mask without, and with, one layer of voxels: the file's or the network's, whichever are larger."""
    steps = np.maximum(np.ceil(NETWORK_SPACING / spacing), 1).astype(int)
    box = np.ones(2 * steps + 1, bool)
    return ndimage.binary_erosion(mask, box, border_value=1), ndimage.binary_dilation(mask, box)


@pytest.mark.parametrize("dimensions", [3, 2])
def test_a_prediction_lies_on_its_file_s_grid_and_keeps_the_volume(
    dimensions: int, inference: Callable[..., Predict]
) -> None:
    run = inference(dimensions)

    @repeatable
    @given(st.data())
    def check(data: st.DataObject) -> None:
        mask = data.draw(masks(dimensions))
        affine = data.draw(affines(mask.shape)) if dimensions == 3 else np.diag([-0.8, 2.5, 1.0, 1.0])
        found, numbers = run(make_image(mask, affine))
        assert np.squeeze(labels_of(found)).shape == np.squeeze(mask).shape
        np.testing.assert_allclose(found.affine, affine, atol=1e-4)
        labels = labels_of(found).reshape(mask.shape) == 1
        spacing = np.linalg.norm(affine[:3, :dimensions], axis=0)
        inner, outer = layer(mask, spacing)
        assert not (inner & ~labels).any()
        assert not (labels & ~outer).any()
        what, unit = ("volumes", 1000) if dimensions == 3 else ("areas", 1)
        assert numbers[what]["light"]["value"] == pytest.approx(labels.sum() * spacing.prod() / unit, rel=1e-4)
        if np.allclose(spacing, NETWORK_SPACING) and np.allclose(np.abs(affine[:3, :3]).max(0), spacing):
            assert np.array_equal(labels, mask)  # nothing was resampled

    check()


def test_a_turned_file_gives_the_turned_prediction(inference: Callable[..., Predict]) -> None:
    run = inference(suffix=".nii")

    @repeatable
    @given(st.data())
    def check(data: st.DataObject) -> None:
        shape = tuple(data.draw(st.integers(1, 12)) for _ in range(3))
        assume(np.prod(shape) > 2)
        values = np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=shape).astype(np.float32)
        straight = nibabel.Nifti1Image(values, data.draw(affines(shape)))
        codes = [data.draw(st.sampled_from(pair)) for pair in data.draw(st.permutations(["RL", "AP", "SI"]))]
        turned = straight.as_reoriented(ornt_transform(io_orientation(straight.affine), axcodes2ornt(codes)))
        expected, _ = run(straight)
        expected = nibabel.Nifti1Image(labels_of(expected), expected.affine)
        found, _ = run(turned)
        assert found.shape == turned.shape
        np.testing.assert_allclose(found.affine, turned.affine, atol=1e-4)
        back = found.as_reoriented(ornt_transform(axcodes2ornt(codes), io_orientation(straight.affine)))
        assert np.array_equal(labels_of(back), labels_of(expected))

    check()


def test_a_channel_axis_is_no_axis_of_the_prediction(inference: Callable[..., Predict]) -> None:
    runs = {channels: inference(channels=channels) for channels in (1, 2, 3)}

    @repeatable
    @given(st.data(), st.sampled_from(list(runs)))
    def check(data: st.DataObject, channels: int) -> None:
        mask = data.draw(masks())
        affine = data.draw(affines(mask.shape))
        image = make_image(mask, affine)
        other = np.random.default_rng(0).normal(size=(*mask.shape, channels - 1))
        stacked = np.concatenate([other, image.get_fdata()[..., None]], axis=-1).astype(np.float32)
        found, _ = runs[channels](nibabel.Nifti1Image(stacked, affine))
        alone, _ = runs[1](image)
        assert found.shape == mask.shape
        assert np.array_equal(labels_of(found), labels_of(alone))
        with pytest.raises(BadInput, match=rf"has {channels} channel\(s\); the network takes {channels % 3 + 1}"):
            runs[channels % 3 + 1](nibabel.Nifti1Image(stacked, affine))

    check()


def test_extreme_intensities(inference: Callable[..., Predict]) -> None:
    run = inference()
    ends = st.floats(-3.4e38, 3.4e38) | st.floats(-9e13, 9e13)

    @repeatable
    @example(-32768.0, 32767.0)
    @example(-3.4e38, 3.4e38)
    @example(-9e13, 9e13)
    @example(0.0, 1e-9)
    @example(3.0e38, 3.4e38)
    @given(ends, ends)
    def check(one: float, other: float) -> None:
        dark, light = sorted([one, other])
        assume(light - dark > max(1e-15, 1e-3 * abs(dark), 1e-3 * abs(light)))  # else it is one intensity in float32
        mask = np.zeros((7, 6, 5), bool)
        mask[2:5, 1:4, 1:4] = True
        image = make_image(mask, np.eye(4), dark, light)
        if max(abs(dark), abs(light)) > 1.01e14:
            with pytest.raises(BadInput, match=r"a\.nii\.gz has intensities up to .*, which can't be normalised"):
                run(image)
            return
        found, _ = run(image)
        assert np.array_equal(labels_of(found) == 1, mask)

    check()
