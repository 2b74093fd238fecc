"""Numbers a case, such as a volume and a severity: trained and predicted as a user does it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from bundle_runs import Chain

TARGETS = [
    {"name": "lumen", "unit": "mL", "kind": "sum", "scale": 2.0},
    {"name": "severity", "unit": "", "kind": "mean", "structure": [1, 2], "scale": 2.0},
]

LIGHT = {"regression_stage": 1, "regression_width": 0.5}


@pytest.fixture(scope="module")
def datalist(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms with the true volume of their lumen, and a score."""
    content = json.loads((chain.data / "datalist.json").read_text())
    content["targets"] = TARGETS
    content["unlabeled"] = []
    for section in ("training", "validation"):
        for number, entry in enumerate(content[section]):
            for key in ("image", "label"):
                entry[key] = str(chain.data / entry[key])
            del entry["thickness"]
            image = nibabel.load(entry["label"])
            voxel = abs(np.linalg.det(image.affine[:3, :3])) / 1000
            entry["lumen"] = float((np.asarray(image.dataobj) == 1).sum() * voxel)
            entry["severity"] = number % 3
    path = tmp_path_factory.mktemp("datalist") / "datalist.json"
    path.write_text(json.dumps(content))
    return path


def test_cached_features_of_a_light_decoder_train_what_uncached_ones_do_and_inference_gives_the_numbers(
    datalist: Path, chain: Chain, workflow: Callable[..., None], tmp_path: Path
) -> None:
    weights = []
    for gigabytes in (0.0, 2.0):
        folder = tmp_path / str(gigabytes)
        settings: dict[str, Any] = {
            **chain.settings("dual_decoder"),
            "datalist": str(datalist),
            "targets": TARGETS,
            **LIGHT,
        }
        places = {"output_dir": str(folder / "train"), "ckpt_dir": str(folder / "models")}
        workflow("dual_decoder", **{**settings, **places, "feature_cache": gigabytes})
        weights.append(torch.load(folder / "models" / "model.pt", weights_only=True)["model"])
    before = torch.load(chain.model("student"), weights_only=True)["model"]
    assert all(torch.equal(weights[1][name], value) for name, value in before.items())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4, msg=name)

    scan = sorted((chain.data / "images").glob("*validation*"))[0]
    workflow(
        "dual_decoder",
        names=("inference.json",),
        targets=TARGETS,
        **LIGHT,
        input=str(scan),
        ckpt_dir=str(tmp_path / "2.0" / "models"),
        output_dir=str(tmp_path / "results"),
    )
    (found,) = (tmp_path / "results").glob("*.json")
    numbers = json.loads(found.read_text())
    assert numbers["lumen"]["unit"] == "mL"
    assert all(np.isfinite(numbers[target["name"]]["value"]) for target in TARGETS)
    assert len(list((tmp_path / "results").glob("*.nii.gz"))) == 1
