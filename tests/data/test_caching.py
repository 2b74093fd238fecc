from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset
from monai.transforms import Compose, DeleteItemsd, Transform

from common.data import CachedDataset, make_loader
from common.data.caching import _describe_entry
from common.data.studies import MeasuredDataset
from common.errors import BadInput
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


def test_texts_are_what_they_are_and_not_files(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = {"patient": "image.nii.gz", "empty": "", "report": "long " * 1000, "folder": "."}
    folder = tmp_path / "cache"
    for _ in range(2):
        item = cached([{**case, **texts, "annotated": [1]}], folder)._cache[0]
        assert {key: item[key] for key in texts} == texts
        assert item["annotated"] == [1]
        (tmp_path / "something else").touch()
    assert len(files(folder)) == 1
    cached([{**case, **texts, "patient": "another"}], folder)
    assert len(files(folder)) == 2


def test_a_key_that_a_transform_takes_away_stays_away(case, tmp_path):
    transform = chain(preprocessing(("image", "label"), LABELS, 1), DeleteItemsd("volume"))
    for _ in range(2):
        assert "volume" not in cached([case], tmp_path / "cache", transform)._cache[0]


def test_what_cant_be_kept_is_refused(case, tmp_path):
    class Strange(Transform):
        def __call__(self, data):
            return {**data, "strange": object()}

    with pytest.raises(BadInput, match=r"'strange'.*cache_dir to null"):
        cached([case], tmp_path / "cache", chain(preprocessing(("image", "label"), LABELS, 1), Strange()))


def test_headers_whose_voxels_lie_elsewhere_are_not_kept(case, tmp_path):
    """Whatever happens to the other file, the header is the same."""
    folder, image = tmp_path / "cache", itk.imread(case["image"])
    for value in (1.0, 500.0):
        array = np.full((10, 14, 12), value, np.float32)
        array[0] = 0
        other = itk.image_from_array(array)
        other.CopyInformation(image)
        itk.imwrite(other, tmp_path / "a.mhd")
        transform = preprocessing(("image",), intensity={"kind": "ct", "lower": 0, "upper": 999, "mean": 0, "std": 1})
        found = cached([{"image": str(tmp_path / "a.mhd")}], folder, chain(transform))._cache[0]["image"]
        assert found.max() == value
    assert not folder.exists() or not files(folder)


def test_a_file_that_another_process_has_written_is_left_alone(case, tmp_path, monkeypatch):
    """It may have mapped it."""
    folder = tmp_path / "cache"
    cached([case], folder)
    (path,) = folder.iterdir()
    written, content = path.stat().st_mtime_ns, path.read_bytes()
    path.unlink()
    prepare = CacheDataset._load_cache_item

    def meanwhile(self, index):
        done = prepare(self, index)
        path.write_bytes(content)
        os.utime(path, ns=(written, written))
        return done

    monkeypatch.setattr(CacheDataset, "_load_cache_item", meanwhile)
    cached([case], folder)
    assert files(folder) == {path.name: written}


def test_a_folder_of_slices_is_known_by_its_files(case, tmp_path):
    series = tmp_path / "series"
    series.mkdir()
    for number in range(2):
        (series / f"{number}.dcm").write_bytes(bytes([number]))
    before = _describe_entry({"image": str(series)}, ["image"])
    (series / "1.dcm").write_bytes(b"other")
    assert _describe_entry({"image": str(series)}, ["image"]) != before
    series.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "1.dcm").write_bytes(bytes([1]))
    assert _describe_entry({"image": str(tmp_path / "elsewhere")}, ["image"]) == before


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
