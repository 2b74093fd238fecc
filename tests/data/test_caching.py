from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose

from common.data import CachedDataset, make_loader
from common.data.studies import MeasuredDataset
from common.transforms import chain, crop, preprocessing, supervised_augmentation

LABELS = {"0": "background", "1": "tumour"}


@pytest.fixture
def case(tmp_path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(12, 14, 10)).astype(np.float32)
    write(tmp_path / "image.nii.gz", image)
    write(tmp_path / "label.nii.gz", (image > 1).astype(np.uint8))
    return {"image": str(tmp_path / "image.nii.gz"), "label": str(tmp_path / "label.nii.gz"), "volume": 3.5}


def write(path: Path, voxels: np.ndarray) -> None:
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)


def transforms(spacing: float = 1.0) -> Compose:
    prepared = preprocessing(("image", "label"), LABELS, 1, spacing=[spacing] * 3)
    return chain(prepared, crop([8, 8, 8], 2), supervised_augmentation([8, 8, 8]))


def cached(cases: list[dict[str, Any]], folder: Path | None, transform: Compose | None = None) -> CachedDataset:
    return CachedDataset(cases, transform or transforms(), folder, copy_cache=False, progress=False)


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_patches_are_those_of_a_cache_in_memory(case, tmp_path):
    batches = []
    for folder in (None, tmp_path / "cache", tmp_path / "cache"):
        loader = make_loader(cached([case], folder), 4, seed=3, iterations=2)
        batches.append(list(loader))
    for other in batches[1:]:
        for expected, found in zip(batches[0], other, strict=True):
            assert (
                expected.keys() == found.keys() == {"image", "label", "volume", "label_cls_indices"} & expected.keys()
            )
            for key in ("image", "label", "volume"):
                assert torch.equal(found[key], expected[key])
                assert found[key].dtype == expected[key].dtype


def test_a_case_is_prepared_once_wherever_it_lies(case, tmp_path):
    folder = tmp_path / "cache"
    cached([case], folder)
    ((name, written),) = files(folder).items()
    moved = {**case, "image": str(tmp_path / "moved.nii.gz")}
    Path(case["image"]).rename(moved["image"])
    again = cached([moved], folder)
    assert files(folder) == {name: written}
    assert again[0][0]["image"].shape == (1, 8, 8, 8)


@pytest.mark.parametrize("what", ["image", "label", "number", "setting"])
def test_whatever_changes_is_prepared_anew(what, case, tmp_path):
    folder = tmp_path / "cache"
    before = cached([case], folder)._cache[0]
    transform = transforms()
    if what == "number":
        case["volume"] = 4.0
    elif what == "setting":
        transform = transforms(2.0)
    else:
        voxels = np.asarray(nib.load(case[what]).dataobj).copy()
        voxels[3, 4, 5] = 1 - voxels[3, 4, 5]
        write(Path(case[what]), voxels)
    after = cached([case], folder, transform)._cache[0]
    assert len(files(folder)) == 2
    expected = cached([case], None, transform)._cache[0]
    assert torch.equal(after["image"], expected["image"].as_tensor())
    assert torch.equal(after["label"], expected["label"].as_tensor())
    assert after["volume"] == expected["volume"]
    assert not all(
        torch.equal(after[key], before[key]) if isinstance(after[key], torch.Tensor) else after[key] == before[key]
        for key in ("image", "label", "volume")
    )


def test_a_damaged_file_is_written_again(case, tmp_path, caplog):
    folder = tmp_path / "cache"
    expected = cached([case], folder)._cache[0]["image"].clone()
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no archive"):
        path.write_bytes(damaged)
        assert torch.equal(cached([case], folder)._cache[0]["image"], expected)
        assert "prepared anew" in caplog.text
        caplog.clear()
        assert path.read_bytes() == whole


def test_changes_of_an_item_stay_out_of_the_file(case, tmp_path):
    dataset = cached([case], tmp_path / "cache")
    dataset._cache[0]["image"].zero_()
    assert cached([case], tmp_path / "cache")._cache[0]["image"].any()


def test_texts_are_the_entrys_own(case, tmp_path):
    folder = tmp_path / "cache"
    for patient in ("one", "other"):
        assert cached([{**case, "patient": patient}], folder)._cache[0]["patient"] == patient


def test_a_folder_of_slices_is_known_by_its_files(case, tmp_path):
    from common.data.caching import _describe_entry

    series = tmp_path / "series"
    series.mkdir()
    for number in range(2):
        (series / f"{number}.dcm").write_bytes(bytes([number]))
    before = _describe_entry({"image": str(series)})
    (series / "1.dcm").write_bytes(b"other")
    assert _describe_entry({"image": str(series)}) != before
    series.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "1.dcm").write_bytes(bytes([1]))
    assert _describe_entry({"image": str(tmp_path / "elsewhere")}) == before


def test_the_dual_decoders_cases_are_cached_alike(case, tmp_path):
    dataset = MeasuredDataset(
        [case],
        [],
        str(tmp_path),
        transform=transforms(),
        cache_dir=tmp_path / "cache",
        copy_cache=False,
        progress=False,
    )
    assert len(dataset) == len(files(tmp_path / "cache")) == 1


def test_without_a_folder_nothing_is_written(case, tmp_path):
    before = set(tmp_path.rglob("*"))
    cached([case], None)
    assert set(tmp_path.rglob("*")) == before
