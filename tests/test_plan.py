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
from common.plan import (
    Topology,
    add_arguments,
    estimate_feature_maps,
    main,
    make_plan,
    parse_memory,
    plan_features,
    plan_patch,
    plan_spacing,
    plan_topology,
)

KEYS = [
    *("spatial_dims", "channels", "labels", "targets", "spacing", "patch_size", "batch_size", "intensity"),
    *("features", "kernel_sizes", "strides", "thick_axis"),
]


def total_stride(strides: Sequence[Sequence[int]]) -> list[int]:
    return [math.prod(axis) for axis in zip(*strides, strict=True)]


@pytest.mark.parametrize(
    ("spacing", "median", "outputs", "cases", "patch", "batch"),
    [
        # What nnU-Net plans for the Medical Segmentation Decathlon and ACDC, axes in the order x, y, z.
        ((1, 1, 1), (140, 171, 137), 4, 484, (128, 128, 128), 2),
        ((1, 1, 1), (35, 50, 36), 3, 260, (40, 56, 40), 9),
        ((1.25, 1.25, 1.37), (320, 232, 115), 2, 20, (192, 160, 80), 2),
        ((0.625, 0.625, 3.6), (319, 320, 20), 3, 32, (256, 320, 20), 2),
        ((0.8, 0.8, 1.5), (512, 512, 150), 3, 303, (192, 192, 64), 2),
        ((0.793, 0.793, 1.6), (512, 512, 187), 2, 41, (160, 192, 64), 2),
        ((1.5625, 1.5625, 5), (208, 237, 18), 4, 200, (224, 256, 20), 4),
    ],
)
def test_published_plans(
    spacing: tuple[float, ...],
    median: tuple[int, ...],
    outputs: int,
    cases: int,
    patch: tuple[int, ...],
    batch: int,
) -> None:
    topology, batch_size = plan_patch(spacing, median, cases * math.prod(median), outputs)
    assert (topology.patch_size, batch_size) == (patch, batch)


def test_two_dimensions() -> None:
    topology, batch_size = plan_patch((0.8, 0.8), (512, 512), 1e10, outputs=2)
    assert topology.patch_size == (512, 512)
    assert topology.strides == ((1, 1), *[(2, 2)] * 7)
    assert batch_size == 12


def test_topology_of_thick_slices() -> None:
    topology = plan_topology((1.5, 1.5, 10), (160, 150, 10))
    assert topology.patch_size == (160, 160, 10)
    # 1.5 -> 3 -> 6 mm: only then is 10 mm within a factor of two, for kernels and poolings alike.
    assert topology.kernel_sizes == ((3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert topology.strides == ((1, 1, 1), (2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 1), (2, 2, 1))
    assert topology.divisor == (32, 32, 2)


def test_topology_keeps_four_voxels_and_pads() -> None:
    topology = plan_topology((1, 1, 1), (36, 50, 35))
    assert topology.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    assert topology.patch_size == (40, 56, 40)
    assert plan_topology((1, 1, 1), (7, 7, 7)).strides == ((1, 1, 1),)
    # An axis alone is pooled with twelve voxels, not with eight.
    assert plan_topology((1, 1, 1), (11, 4, 4)).strides == ((1, 1, 1),)
    assert plan_topology((1, 1, 1), (12, 4, 4)).strides == ((1, 1, 1), (2, 1, 1))


def test_axis_order_does_not_matter() -> None:
    one, _ = plan_patch((0.7, 0.7, 4), (300, 260, 30), 1e12, outputs=3)
    other, _ = plan_patch((4, 0.7, 0.7), (30, 300, 260), 1e12, outputs=3)
    assert other.patch_size == (one.patch_size[2], *one.patch_size[:2])
    assert other.strides == tuple((z, x, y) for x, y, z in one.strides)
    assert other.kernel_sizes == tuple((z, x, y) for x, y, z in one.kernel_sizes)


def test_feature_maps_by_hand() -> None:
    topology = Topology(strides=((1, 1), (2, 2)), kernel_sizes=((3, 3), (3, 3)), patch_size=(8, 8))
    # Down: 2 x 4 x 64 + 2 x 8 x 16; up: (2 + 1) x 4 x 64; out: 3 x 64.
    assert estimate_feature_maps(topology, [4, 8], outputs=3) == 512 + 256 + 768 + 192


def test_features_double_to_the_cap() -> None:
    assert plan_features(6, 32, 320) == [32, 64, 128, 256, 320, 320]


def test_memory_and_width_scale_the_patch() -> None:
    arguments = ((1, 1, 1), (300, 300, 300), 1e12, 2)
    patches = [math.prod(plan_patch(*arguments, memory=memory)[0].patch_size) for memory in (2, 8, 24)]
    assert patches == sorted(set(patches))
    narrow = math.prod(plan_patch(*arguments, width=16)[0].patch_size)
    assert narrow > patches[1]
    with pytest.raises(BadInput, match="no patch fits"):
        plan_patch(*arguments, memory=1e-9)


def test_spacing_is_the_median_or_a_low_percentile_of_thick_slices() -> None:
    fine = np.array([[1.0, 1.0, 2.0], [1.2, 1.0, 2.0], [1.4, 1.0, 9.0]])
    shapes = np.array([[100, 100, 80]] * 3)
    np.testing.assert_allclose(plan_spacing(fine, shapes), [1.2, 1.0, 2.0])
    thick = np.array([[1.5, 1.5, z] for z in (5, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10)])
    flat = np.array([[200, 200, 12]] * 11)
    np.testing.assert_allclose(plan_spacing(thick, flat), [1.5, 1.5, 10.0])
    # Two of twelve with slices of 5 mm: the 10th percentile lies a tenth of the way from 5 to 10.
    thick = np.vstack([thick, thick[:1]])
    flat = np.array([[200, 200, 12]] * 12)
    np.testing.assert_allclose(plan_spacing(thick, flat), [1.5, 1.5, 5.5])
    # As many slices as pixels: not the case the rule is for.
    np.testing.assert_allclose(plan_spacing(thick, np.array([[200, 200, 200]] * 12)), [1.5, 1.5, 10.0])
    mixed = np.array([[1.0, 1.0, 0.5]] * 3 + [[1.0, 1.0, 8.0]] * 4)
    np.testing.assert_allclose(plan_spacing(mixed, np.array([[200, 200, 12]] * 7)), [1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("text", "value"), [("8GB", 8), ("11", 11), ("512 MB", 0.5), ("24gib", 24), (6.5, 6.5), (None, None)]
)
def test_memory_is_read(text: str | float | None, value: float | None) -> None:
    assert parse_memory(text) == value


@pytest.mark.parametrize("text", ["much", "-8GB", "0", "8TB"])
def test_odd_memory_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="8GB"):
        parse_memory(text)


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
    assert list(plan) == KEYS
    assert plan == json.loads(json.dumps(plan))
    assert (plan["spatial_dims"], plan["channels"]) == (3, 1)
    assert plan["spacing"] == [1.5, 1.0, 6.0]
    assert plan["patch_size"] == [40, 48, 10]
    assert plan["kernel_sizes"][0] == [3, 3, 1]
    assert plan["strides"][:2] == [[1, 1, 1], [2, 2, 1]]
    assert plan["thick_axis"] == 2
    assert plan["intensity"] == {"kind": "zscore"}
    assert plan["batch_size"] == 2
    assert len(plan["features"]) == len(plan["strides"]) == len(plan["kernel_sizes"])
    assert plan["features"][0] == 32


def test_width_and_spacing_are_taken(tmp_path: Path) -> None:
    plan = make_plan(make_datalist(tmp_path), width=8, max_width=16, spacing=(3, 2, 6))
    assert plan["spacing"] == [3, 2, 6]
    assert plan["patch_size"][:2] == [20, 24]
    assert plan["features"][:3] == [8, 16, 16]
    assert plan["thick_axis"] is None
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


def test_targets_are_found(tmp_path: Path) -> None:
    dense, number = make_plan(make_datalist(tmp_path))["targets"]
    assert dense == {"name": "thickness", "unit": "", "kind": "dense", "missing": 0, "structure": 2, "scale": 3.0}
    assert number == {"name": "severity", "unit": "", "kind": "mean", "structure": [1, 2], "scale": 5.0}


def test_described_targets_are_kept_and_completed(tmp_path: Path) -> None:
    described = [{"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": 0}]
    assert make_plan(make_datalist(tmp_path, targets=described))["targets"] == [{**described[0], "scale": 3.0}]
    whole = [{**described[0], "scale": 9.5}]
    assert make_plan(make_datalist(tmp_path, targets=whole))["targets"] == whole
    assert make_plan(make_datalist(tmp_path, targets=[]))["targets"] == []
    with pytest.raises(BadInput, match="kind"):
        make_plan(make_datalist(tmp_path, targets=[{"name": "thickness", "kind": "map"}]))


def test_bad_data_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="`training` is empty"):
        make_plan(make_datalist(tmp_path, training=[]))
    with pytest.raises(BadInput, match="`labels`"):
        make_plan(make_datalist(tmp_path, labels={"0": "background", "2": "wall"}))
    with pytest.raises(BadInput, match="names 2 channel"):
        make_plan(make_datalist(tmp_path, {"0": "T1", "1": "T2"}))
    with pytest.raises(BadInput, match="expected 0 to 1"):
        make_plan(make_datalist(tmp_path, labels={"0": "background", "1": "lumen"}))
    path = make_datalist(tmp_path)
    write(tmp_path / "thickness/1.nii.gz", np.ones((10, 40, 47), np.float32), SLICES_FIRST)
    with pytest.raises(BadInput, match="1: thickness"):
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


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return main(parser.parse_args(arguments))


def test_command_writes_the_plan_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = make_datalist(tmp_path), tmp_path / "plans/plan.json"
    assert run("--datalist", str(path), "--output", str(output), "--memory", "6GB", "--width", "16") == 0
    assert json.loads(output.read_text()) == make_plan(path, width=16, memory=6)
    printed = capsys.readouterr().out
    for part in ("1.5 x 1 x 6 mm chosen", "40 x 48 x 10 voxels", "6 GB", "flat along axis 2", "target thickness"):
        assert part in printed
    with pytest.raises(BadInput, match="not the datalist"):
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
