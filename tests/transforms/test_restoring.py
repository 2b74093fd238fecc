from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Spacingd

from common.transforms.output import SplitOutputd
from common.transforms.restoring import RestoreGridd

THICKNESS = {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": 0, "scale": 2.0}


def prepared(size: tuple[int, ...], spacing: tuple[float, ...]) -> tuple[Compose, dict[str, Any]]:
    """An image of 1 mm at another voxel size, and what was done to it."""
    image = MetaTensor(torch.zeros(1, *size), affine=torch.eye(4), meta={"filename_or_obj": "a.nii.gz"})
    before = Compose([Spacingd("image", pixdim=spacing, mode="bilinear")])
    return before, before({"image": image})


def test_labels_are_the_likeliest_of_all_classes_brought_back_together() -> None:
    before, d = prepared((9, 7, 5), (2.0, 1.5, 1.0))
    torch.manual_seed(0)
    shape = d["image"].shape[1:]
    logits = MetaTensor(torch.randn(6, *shape), meta=d["image"].meta, applied_operations=d["image"].applied_operations)
    found = RestoreGridd(before)({**d, "segmentation": logits})["segmentation"]
    together = Invertd("probabilities", before, "image", nearest_interp=False)(
        {**d, "probabilities": logits.softmax(0)}
    )["probabilities"]
    assert found.shape == (1, 9, 7, 5)
    assert found.dtype == torch.uint8
    assert found.meta["filename_or_obj"] == "a.nii.gz"
    assert torch.equal(found.affine, torch.eye(4, dtype=found.affine.dtype))
    assert torch.equal(found.as_tensor(), together.as_tensor().argmax(0, keepdim=True).to(torch.uint8))
    assert len(np.unique(found)) == 6


def test_a_network_that_only_regresses() -> None:
    before, d = prepared((1, 1, 5), (1.0, 1.0, 2.0))
    d["thickness_pred"] = torch.tensor([1.0, 2.0, 4.0])[None, None, None]
    found = RestoreGridd(before, [THICKNESS])(d)
    assert "segmentation" not in found
    assert found["thickness_pred"].flatten().tolist() == pytest.approx([1.0, 1.5, 2.0, 3.0, 4.0])


def test_many_classes_do_not_wrap() -> None:
    before, d = prepared((1, 1, 2), (1.0, 1.0, 1.0))
    d["segmentation"] = torch.zeros(301, 1, 1, 2)
    d["segmentation"][300, ..., 1] = 5.0
    assert RestoreGridd(before)(d)["segmentation"].flatten().tolist() == [0, 300]


def resampled(output: torch.Tensor, spacing: float) -> MetaTensor:
    """The wall's map back on a grid of 1 mm from a network that worked at ``spacing`` mm, along one axis."""
    before, d = prepared((1, 1, (output.shape[-1] - 1) * round(spacing) + 1), (1.0, 1.0, spacing))
    d["pred"] = MetaTensor(output, meta=d["image"].meta, applied_operations=d["image"].applied_operations)
    after = [SplitOutputd(num_classes=3, targets=[THICKNESS]), RestoreGridd(before, [THICKNESS])]
    return Compose(after)(d)["thickness_pred"]


def test_what_a_map_says_outside_its_structure_does_not_leak_into_a_thin_wall() -> None:
    """Voxel 2 of 5 is the wall, 3 mm; beside it the network says -50, which means nothing."""
    output = torch.zeros(4, 1, 1, 5)
    output[0] = 20.0
    output[0, ..., 2], output[2, ..., 2] = 0.0, 20.0
    output[3] = -50.0
    output[3, ..., 2] = 3.0
    found = resampled(output, 2.0).flatten()
    assert found[4].item() == pytest.approx(3.0, abs=0.11)  # the floor of the weights
    # Half-way to its neighbours the wall's share is a half, and its value still what counts.
    assert found[3:6].tolist() == pytest.approx([3.0] * 3, abs=0.2)
    assert found[0].item() == pytest.approx(-50.0), "far away nothing changes"


def test_without_resampling_weights_change_nothing() -> None:
    torch.manual_seed(0)
    output = torch.randn(4, 1, 1, 5)
    assert torch.allclose(resampled(output, 1.0), output[3:], atol=1e-5)
