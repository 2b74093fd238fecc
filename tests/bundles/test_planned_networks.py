"""The configs as they are with a plan made of the data: images of two dimensions, and stacks of thick slices."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from bundle_runs import BUNDLES, PARENT

from common.__main__ import main

SPACING = (0.8, 1.0, 5.0)
SHAPE = (28, 26, 6)


def draw_ring(folder: Path, name: str, dimensions: int, labeled: bool, rng: np.random.Generator) -> dict[str, str]:
    """A ring or a tube whose wall is as thick everywhere: image, and where it is labelled label and thickness map."""
    radius, wall = rng.uniform(4, 6), rng.uniform(2, 3)
    spacing, shape = SPACING[:dimensions], SHAPE[:dimensions]
    axes = [(np.arange(side) - (side - 1) / 2) * size for side, size in zip(shape, spacing, strict=True)]
    distance = np.hypot(*np.meshgrid(*axes, indexing="ij")[:2])
    label = np.where(distance < radius, 1, np.where(distance < radius + wall, 2, 0)).astype(np.uint8)
    maps = {"image": (label == 2) + rng.normal(0, 0.2, shape).astype(np.float32)}
    if labeled:
        maps |= {"label": label, "thickness": np.where(label == 2, wall, 0).astype(np.float32)}
    for key, array in maps.items():
        affine = np.diag([*spacing, *[1] * (4 - dimensions)])
        nibabel.save(nibabel.Nifti1Image(array, affine), folder / f"{name}_{key}.nii.gz")
    return {key: f"{name}_{key}.nii.gz" for key in maps}


@pytest.fixture(scope="module", params=[2, 3])
def rings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("rings"), np.random.default_rng(0)
    thickness = {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": 0, "inner": [1]}
    content: dict[str, Any] = {"labels": {"0": "background", "1": "lumen", "2": "wall"}, "targets": [thickness]}
    for section in ("training", "unlabeled", "validation"):
        names = [f"{section}_{index}" for index in range(2)]
        content[section] = [draw_ring(folder, name, request.param, section != "unlabeled", rng) for name in names]
    (folder / "datalist.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def plan(rings: Path) -> Path:
    """In place of the volumes' plan."""
    path = rings / "plan.json"
    assert main(["plan", "--datalist", str(rings / "datalist.json"), "--output", str(path), "--width", "4"]) == 0
    return path


def test_three_stages(rings: Path, plan: Path, workflow: Callable[..., None], tmp_path: Path) -> None:
    planned = json.loads(plan.read_text())
    thick = planned["spatial_dims"] == 3
    assert planned.get("edge_kernel") == ([3, 3, 1] if thick else None)
    assert planned["thick_axis"] == (2 if thick else None)
    (target,) = planned["targets"]
    assert 2 < target["range"][0] < target["range"][1] < 3
    found = {}
    for bundle in BUNDLES:
        model = tmp_path / bundle / "models" / "model.pt"
        weights = {"ckpt_dir": str(model.parent)}
        stage = PARENT.get(bundle)
        parent = {f"{stage}_path": str(tmp_path / stage / "models" / "model.pt")} if stage else {}
        places = {name: tmp_path / bundle / name for name in ("train", "measured", "predicted")}
        settings = {"dataset_dir": str(rings), "output_dir": str(places["train"]), **weights, **parent}
        # One database: it takes MLflow longer to make one than this test needs for all else.
        workflow(bundle, **settings, tracking_uri=f"sqlite:///{tmp_path / 'mlruns.db'}")
        state = torch.load(model, weights_only=True)["model"]
        assert all(torch.isfinite(value).all() for value in state.values())
        kernels = [value for key, value in state.items() if key.endswith("conv.weight")]
        assert {kernel.ndim for kernel in kernels} == {2 + planned["spatial_dims"]}
        assert any(kernel.shape[2:] == (3, 3, 1) for kernel in kernels) == thick

        names = ("train.json", "evaluate.json")
        workflow(bundle, names=names, dataset_dir=str(rings), output_dir=str(places["measured"]), **weights)
        summary = json.loads((places["measured"] / "summary.json").read_text())
        assert summary["cases"] == 2
        assert ("thickness" in summary.get("targets", {})) == (bundle == "dual_decoder")

        image = rings / "validation_0_image.nii.gz"
        workflow(bundle, names=("inference.json",), input=str(image), output_dir=str(places["predicted"]), **weights)
        for volume in map(nibabel.load, sorted(places["predicted"].glob("*.nii.gz"))):
            assert volume.shape == SHAPE[: planned["spatial_dims"]]
            assert np.allclose(volume.affine, nibabel.load(image).affine)
        found[bundle] = np.asarray(nibabel.load(places["predicted"] / "validation_0_image_seg.nii.gz").dataobj)
        assert set(np.unique(found[bundle])) <= {0, 1, 2}
    assert np.array_equal(found["student"], found["dual_decoder"])
    assert (places["predicted"] / "validation_0_image_thickness.nii.gz").is_file()
