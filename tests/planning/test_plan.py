from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from common.errors import BadInput
from common.planning.plan import add_arguments, main, make_plan

KEYS = [
    *("spatial_dims", "channels", "labels", "targets", "spacing", "patch_size", "batch_size", "intensity"),
    *("features", "kernel_sizes", "strides", "thick_axis", "familiar"),
]


def total_stride(strides: Sequence[Sequence[int]]) -> list[int]:
    return [math.prod(axis) for axis in zip(*strides, strict=True)]


def write(path: Path, array: np.ndarray, affine: np.ndarray) -> str:
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return f"{path.parent.name}/{path.name}"


# Stored as (z, x, y): slices of 6 mm first, then x to the left, then y.
SLICES_FIRST = np.array([[0, -1.5, 0, 0], [0, 0, 1.0, 0], [6.0, 0, 0, 0], [0, 0, 0, 1.0]])


def make_datalist(folder: Path, modality: str | dict[str, str] = "MR", **extra: Any) -> Path:
    """Two cases, lumen of 100 and wall of 50, thickness 3 in the wall (with some missing), severity a case."""
    entries = []
    for index in range(2):
        label = np.zeros((10, 40, 48), np.uint8)
        label[2:8, 10:30, 10:40] = 2
        label[3:7, 14:26, 14:36] = 1
        image = np.choose(label, [-1000, 100, 50]).astype(np.int16)
        thickness = np.where(label == 2, 3.0, 0).astype(np.float32)
        thickness[2] = 0
        entries.append(
            {
                "image": write(folder / f"images/{index}.nii.gz", image, SLICES_FIRST),
                "label": write(folder / f"labels/{index}.nii.gz", label, SLICES_FIRST),
                "thickness": write(folder / f"thickness/{index}.nii.gz", thickness, SLICES_FIRST),
                "severity": 4.0 + 2 * index,
                "patient": 7,
                "group": "NOR",
            }
        )
    content = {
        "modality": {"0": modality} if isinstance(modality, str) else modality,
        "labels": {"0": "background", "1": "lumen", "2": "wall"},
        "training": entries,
        "unlabeled": [{"image": "images/not_there.nii.gz"}],
        **extra,
    }
    path = folder / "datalist.json"
    path.write_text(json.dumps(content))
    return path


def test_plan_of_reoriented_images(tmp_path: Path) -> None:
    plan = make_plan(make_datalist(tmp_path))
    assert list(plan) == [*KEYS, "edge_kernel"]
    assert plan == json.loads(json.dumps(plan))
    assert (plan["spatial_dims"], plan["channels"]) == (3, 1)
    assert plan["spacing"] == [1.5, 1.0, 6.0]
    assert plan["patch_size"] == [40, 48, 10]
    assert plan["kernel_sizes"][0] == plan["edge_kernel"] == [3, 3, 1]
    assert plan["strides"][:2] == [[1, 1, 1], [2, 2, 1]]
    assert plan["thick_axis"] == 2
    assert plan["familiar"]["cases"] == 2
    assert plan["familiar"]["spacing"] == [[1.5, 1.5], [1.0, 1.0], [6.0, 6.0]]
    assert plan["familiar"]["extent"] == [[60.0, 60.0], [48.0, 48.0], [60.0, 60.0]]
    assert plan["familiar"]["intensity"] == [
        {"kind": "zscore", "low": [-1000, -1000], "high": [100, 100], "middle": [0, 0]}
    ]
    assert plan["intensity"] == {"kind": "zscore"}
    assert plan["batch_size"] == 2
    assert len(plan["features"]) == len(plan["strides"]) == len(plan["kernel_sizes"])
    assert plan["features"][0] == 32


def test_single_slices_in_three_dimensions(tmp_path: Path) -> None:
    """nnU-Net plans no 3D network for them, either."""
    entries = [
        {
            key: write(tmp_path / f"{key}s/{index}.nii.gz", np.full((40, 48, 1), index + 1, np.uint8), np.eye(4))
            for key in ("image", "label")
        }
        for index in range(3)
    ]
    path = tmp_path / "datalist.json"
    labels = {"0": "background", "1": "a", "2": "b", "3": "c"}
    path.write_text(json.dumps({"modality": {"0": "MR"}, "labels": labels, "training": entries}))
    with pytest.raises(BadInput, match="single slices in files of three dimensions"):
        make_plan(path)


def test_of_equally_thick_axes_the_last_is_the_thick_one(tmp_path: Path) -> None:
    """nnU-Net's arrays run z, y, x, and it takes the first: a flat patch of cubes is augmented in plane."""
    image = np.random.default_rng(0).normal(size=(160, 160, 20)).astype(np.float32)
    label = (image > 0).astype(np.uint8)
    entry = {
        "image": write(tmp_path / "images/a.nii.gz", image, np.eye(4)),
        "label": write(tmp_path / "labels/a.nii.gz", label, np.eye(4)),
    }
    path = tmp_path / "datalist.json"
    content = {"modality": {"0": "MR"}, "labels": {"0": "background", "1": "a"}, "training": [entry]}
    path.write_text(json.dumps(content))
    plan = make_plan(path, width=8)
    assert max(plan["patch_size"]) > 3 * plan["patch_size"][2]
    assert plan["thick_axis"] == 2


def test_images_without_labels_are_looked_at_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """They decide nothing, but a student learns from them."""
    path = make_datalist(tmp_path)
    before = make_plan(path)
    image = np.ones((10, 40, 48), np.int16)
    coarse = SLICES_FIRST @ np.diag([4.0, 1.0, 1.0, 1.0])
    (tmp_path / "images" / "broken.nii.gz").write_bytes(b"no image")
    content = json.loads(path.read_text())
    content["unlabeled"] = [
        {"image": write(tmp_path / "images/like.nii.gz", image, SLICES_FIRST)},
        {"image": write(tmp_path / "images/turned.nii.gz", image.transpose(1, 2, 0), np.diag([1.5, 1.0, 6.0, 1.0]))},
        {"image": write(tmp_path / "images/coarse.nii.gz", image, coarse)},
        {"image": "images/broken.nii.gz"},
        {"image": write(tmp_path / "images/flat.nii.gz", image[0], np.diag([1.5, 1.0, 6.0, 1.0]))},
    ]
    content["validation"] = [{"image": "images/nowhere.nii.gz", "label": "labels/nowhere.nii.gz"}]
    path.write_text(json.dumps(content))
    assert make_plan(path) == before
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert main(parser.parse_args(["--datalist", str(path), "--output", str(tmp_path / "plan.json")])) == 0
    printed = capsys.readouterr()
    text = printed.out + printed.err
    for words in (
        "mixed orientations",
        "turned",
        "coarse: voxels of 1.5 x 1 x 24 mm",
        "broken.nii.gz can't be opened as an image",
        "`unlabeled`: flat has 2 dimensions and 1 channel(s), the training cases 3 and 1",
        "nowhere.nii.gz",
    ):
        assert words in text
    assert "like" not in text.replace("looks like", "")


def test_width_and_spacing_are_taken(tmp_path: Path) -> None:
    plan = make_plan(make_datalist(tmp_path), width=8, max_width=16, spacing=(3, 2, 6))
    assert plan["spacing"] == [3, 2, 6]
    assert plan["patch_size"][:2] == [20, 24]
    assert plan["features"][:3] == [8, 16, 16]
    assert plan["thick_axis"] is None
    isotropic = make_plan(tmp_path / "datalist.json", width=8, spacing=(3, 3, 3))
    assert list(isotropic)[: len(KEYS)] == KEYS
    assert "edge_kernel" not in isotropic
    with pytest.raises(BadInput, match="3 positive numbers"):
        make_plan(tmp_path / "datalist.json", spacing=(1, 1))
    with pytest.raises(BadInput, match="max width"):
        make_plan(tmp_path / "datalist.json", width=32, max_width=16)


def test_ct_intensities_come_from_the_foreground(tmp_path: Path) -> None:
    intensity = make_plan(make_datalist(tmp_path, modality="CT"))["intensity"]
    assert intensity["kind"] == "ct"
    assert (intensity["lower"], intensity["upper"]) == (50, 100)
    share = 4 * 12 * 22 / (6 * 20 * 30)
    assert intensity["mean"] == pytest.approx(50 + 50 * share, abs=0.6)
    assert intensity["std"] == pytest.approx(50 * math.sqrt(share * (1 - share)), abs=0.4)


def test_skull_stripped_images_are_planned_by_their_nonzero_part(tmp_path: Path) -> None:
    """A box of 20 x 30 x 6 voxels of 40 x 48 x 10 holds everything: less than three quarters."""
    path = make_datalist(tmp_path)
    for index in range(2):
        image = np.zeros((10, 40, 48), np.int16)
        image[2:8, 10:30, 10:40] = 7
        image[2, 10, 10] = 9
        write(tmp_path / f"images/{index}.nii.gz", image, SLICES_FIRST)
    plan = make_plan(path)
    assert plan["intensity"] == {"kind": "zscore", "nonzero": True}
    assert plan["patch_size"] == [20, 32, 6]


def test_channels_of_different_kinds_are_normalised_each_in_its_way(tmp_path: Path) -> None:
    path = make_datalist(tmp_path, {"0": "CT", "1": "PET"})
    for index in range(2):
        label = np.asarray(nib.load(tmp_path / f"labels/{index}.nii.gz").dataobj)
        channels = [np.choose(label, [-1000, 100, 50]), np.choose(label, [0, 3, 5])]
        write(tmp_path / f"images/{index}.nii.gz", np.stack(channels, -1).astype(np.int16), SLICES_FIRST)
    ct, pet = make_plan(path)["intensity"]
    assert (ct["kind"], ct["lower"], ct["upper"]) == ("ct", 50, 100)
    assert pet == {"kind": "zscore"}


def test_targets_are_found(tmp_path: Path) -> None:
    dense, number = make_plan(make_datalist(tmp_path))["targets"]
    assert dense == {"name": "thickness", "unit": "", "kind": "dense", "missing": 0, "structure": 2, "scale": 3.0} | {
        "range": [3.0, 3.0]
    }
    assert number == {"name": "severity", "unit": "", "kind": "mean", "structure": [1, 2], "scale": 5.0} | {
        "range": [4.0, 6.0]
    }


def test_a_range_is_that_of_the_structure(tmp_path: Path) -> None:
    """As in the evaluation, what a map holds elsewhere says nothing."""
    path = make_datalist(tmp_path)
    for index in range(2):
        file = tmp_path / f"thickness/{index}.nii.gz"
        thickness = np.asarray(nib.load(file).dataobj).copy()
        thickness[0, 0, 0], thickness[5, 11, 11] = 99.0, 2.0 + index / 2
        write(file, thickness, SLICES_FIRST)
    (target, _) = make_plan(path)["targets"]
    assert (target["structure"], target["range"]) == (2, [2.0, 3.0])
    given = [{"name": "thickness", "unit": "mm", "structure": 2, "range": [0.5, 6]}]
    assert make_plan(make_datalist(tmp_path, targets=given))["targets"][0]["range"] == [0.5, 6]
    with pytest.raises(BadInput, match=r"thickness has the range \[1\]; expected two numbers"):
        make_plan(make_datalist(tmp_path, targets=[{**given[0], "range": [1]}]))


def test_described_targets_are_kept_and_completed(tmp_path: Path) -> None:
    described = [{"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": 0}]
    completed = {**described[0], "scale": 3.0, "range": [3.0, 3.0]}
    assert make_plan(make_datalist(tmp_path, targets=described))["targets"] == [completed]
    whole = [{**completed, "scale": 9.5}]
    assert make_plan(make_datalist(tmp_path, targets=whole))["targets"] == whole
    assert make_plan(make_datalist(tmp_path, targets=[]))["targets"] == []
    for wrong, message in (
        ([{"name": "thickness", "kind": "map"}], "kind 'map'"),
        ([{"name": "thickness", "structure": 9, "scale": 1}], "structure 9"),
        (["thickness"], "found 'thickness'"),
    ):
        with pytest.raises(BadInput, match=message):
            make_plan(make_datalist(tmp_path, targets=wrong))


def test_bad_data_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="`training` is empty"):
        make_plan(make_datalist(tmp_path, training=[]))
    with pytest.raises(BadInput, match="`labels`"):
        make_plan(make_datalist(tmp_path, labels={"0": "background", "2": "wall"}))
    with pytest.raises(BadInput, match="names 2 channel"):
        make_plan(make_datalist(tmp_path, {"0": "T1", "1": "T2"}))
    with pytest.raises(BadInput, match=r"\[2\] are not in `labels`"):
        make_plan(make_datalist(tmp_path, labels={"0": "background", "1": "lumen"}))
    path = make_datalist(tmp_path)
    write(tmp_path / "thickness/1.nii.gz", np.ones((10, 40, 47), np.float32), SLICES_FIRST)
    with pytest.raises(BadInput, match="not on one grid"):
        make_plan(path)


def test_channels_must_agree(tmp_path: Path) -> None:
    path = make_datalist(tmp_path)
    write(tmp_path / "images/1.nii.gz", np.zeros((10, 40, 48, 2), np.int16), SLICES_FIRST)
    with pytest.raises(BadInput, match=r"1 \(0\), 2 \(1\)"):
        make_plan(path)


def test_two_dimensional_images(tmp_path: Path) -> None:
    entries = []
    for index in range(3):
        image, label = np.zeros((64, 96), np.int16), np.zeros((64, 96), np.uint8)
        label[20:40, 20:40] = 1
        affine = np.diag([0.5, 0.25, 1, 1])
        entries.append(
            {
                "image": write(tmp_path / f"images/{index}.nii.gz", image, affine),
                "label": write(tmp_path / f"labels/{index}.nii.gz", label, affine),
            }
        )
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"labels": {"0": "background", "1": "lesion"}, "training": entries}))
    plan = make_plan(path)
    assert (plan["spatial_dims"], plan["spacing"], plan["thick_axis"]) == (2, [0.5, 0.25], None)
    assert plan["patch_size"] == [64, 96]
    assert all(len(stage) == 2 for stage in plan["strides"] + plan["kernel_sizes"])


@pytest.mark.parametrize(
    ("side", "stages"), [(7, [[0], []]), (12, [[0, 1], [0]]), (28, [[1, 2], [1]]), (32, [None, None])]
)
def test_shallow_networks_say_where_to_align_and_attend(side: int, stages: list[Any], tmp_path: Path) -> None:
    """The configs' own stages are those of four and more."""
    label = np.ones((side, side), np.uint8)
    entry = {key: write(tmp_path / f"files/{key}.nii.gz", label, np.eye(4)) for key in ("image", "label")}
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"labels": {"0": "background", "1": "lesion"}, "training": [entry]}))
    plan = make_plan(path)
    assert [plan.get(key) for key in ("alignment_stages", "attention_stages")] == stages


@pytest.mark.parametrize(
    ("targets", "shape", "stage"),
    [
        ([{"unit": "mm", "scale": 16}], (32, 32), 1),
        ([{"unit": "mm", "scale": 15.9}], (32, 32), None),
        ([{"unit": "cm", "scale": 1.6}], (32, 32), 1),
        ([{"unit": "", "scale": 16}], (32, 32), None),
        ([{"unit": "HU", "scale": 16}], (32, 32), None),
        ([{"unit": "mm", "scale": 16}, {"unit": "mm", "scale": 2}], (32, 32), None),
        ([{"unit": "mm", "scale": 16}, {"unit": "mL", "kind": "sum", "scale": 16}], (32, 32), None),
        ([], (32, 32), None),
        # A network of two stages has no half resolution to end at.
        ([{"unit": "mm", "scale": 16}], (12, 12), None),
        # Slices of 10 mm aren't halved; of the two axes that are the coarser one counts, 3 mm and so 6 mm.
        ([{"unit": "mm", "scale": 24}], (32, 32, 8), 1),
        ([{"unit": "mm", "scale": 23.9}], (32, 32, 8), None),
    ],
)
def test_thick_structures_are_measured_at_half_resolution(
    targets: list[dict[str, Any]], shape: tuple[int, ...], stage: int | None, tmp_path: Path
) -> None:
    """Voxels of 2 mm, of half the resolution 4 mm: four of them are 16 mm."""
    label = np.ones(shape, np.uint8)
    affine = np.diag([2.0, 2.0, 1.0, 1.0] if len(shape) == 2 else [2.0, 3.0, 10.0, 1.0])
    entry: dict[str, Any] = {key: write(tmp_path / f"files/{key}.nii.gz", label, affine) for key in ("image", "label")}
    described = [{"name": f"target{number}", **target} for number, target in enumerate(targets)]
    entry |= {target["name"]: 12.0 if target.get("kind") else entry["label"] for target in described}
    path = tmp_path / "datalist.json"
    labels = {"0": "background", "1": "lesion"}
    path.write_text(json.dumps({"labels": labels, "targets": described, "training": [entry]}))
    plan = make_plan(path)
    assert (plan.get("regression_stage"), plan.get("regression_width")) == (stage, stage and 0.5)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return main(parser.parse_args(arguments))


def test_command_writes_the_plan_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = make_datalist(tmp_path), tmp_path / "plans/plan.json"
    assert run("--datalist", str(path), "--output", str(output), "--memory", "6GB", "--width", "16") == 0
    assert json.loads(output.read_text()) == make_plan(path, width=16, memory=6)
    printed = capsys.readouterr().out
    for part in (
        "1.5 x 1 x 6 mm chosen",
        "40 x 48 x 10 voxels",
        "6 GB",
        "flat along axis 2",
        "edge kernel: 3 x 3 x 1",
        "chosen: the median",
    ):
        assert part in printed
    assert "target thickness: dense, no unit given, structure 2, scale 3; values 3 to 3 in 2 cases, means 3" in printed
    assert "target severity: mean, no unit given, structure [1, 2], scale 5; 4 to 6 in 2 cases" in printed
    assert "warning: target severity: no unit given" in printed
    with pytest.raises(BadInput, match="exists already"):
        run("--datalist", str(path), "--output", str(path))


def real_data(name: str) -> Path:
    path = Path(os.environ["BUNDLES_DATA"]) / name / "datalist_full.json"
    if not path.is_file():
        pytest.skip(f"{path} not found")
    return path


@pytest.mark.skipif("BUNDLES_DATA" not in os.environ, reason="needs real data: set BUNDLES_DATA to its folder")
def test_hippocampus_as_nnunet_plans_it() -> None:
    plan = make_plan(real_data("hippocampus"))
    assert plan["patch_size"] == [40, 56, 40]
    assert plan["strides"] == [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert plan["features"] == [32, 64, 128, 256]
    assert plan["thick_axis"] is None


@pytest.mark.skipif("BUNDLES_DATA" not in os.environ, reason="needs real data: set BUNDLES_DATA to its folder")
def test_cardiac_is_anisotropic() -> None:
    plan = make_plan(real_data("cardiac_wall"))
    assert plan["kernel_sizes"][0] == [3, 3, 1]
    assert plan["strides"][1] == [2, 2, 1]
    assert plan["thick_axis"] == 2
    (target,) = plan["targets"]
    assert target["structure"] == 2
    assert 5 < target["scale"] < 20
    assert total_stride(plan["strides"])[2] <= 2
