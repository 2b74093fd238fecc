from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Activationsd, AsDiscreted, Compose, Invertd, LoadImaged, Orientationd, Spacingd

from common.data.thickness import write_thickness_maps
from common.errors import BadInput
from common.transforms.output import CaseSummaryd, GeometricThicknessd, MaskTargetd, SplitOutputd

LABELS = {"0": "background", "1": "lumen", "2": "wall"}
THICKNESS = {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": 0, "scale": 2.0}
VOLUME = {"name": "volume", "unit": "mL", "kind": "sum"}
SEVERITY = {"name": "severity", "unit": "", "kind": "mean", "structure": 1}


def test_split_gives_logits_and_one_map_a_target_in_order() -> None:
    output = MetaTensor(torch.arange(5 * 8.0).reshape(5, 2, 2, 2), affine=torch.diag(torch.tensor([2.0, 3, 4, 1])))
    output.meta["filename_or_obj"] = "case.nii.gz"
    d = SplitOutputd(num_classes=3, targets=[THICKNESS, VOLUME])({"pred": output, "image": output})
    assert torch.equal(d["segmentation"].as_tensor(), output[:3].as_tensor())
    assert torch.equal(d["thickness_pred"].as_tensor(), output[3:4].as_tensor())
    assert torch.equal(d["volume_pred"].as_tensor(), output[4:5].as_tensor())
    assert d["thickness_pred"].meta["filename_or_obj"] == "case.nii.gz"
    assert torch.equal(d["segmentation"].affine, output.affine)
    assert "thickness_std" not in d
    assert "thickness_case" not in d


def test_split_takes_a_plain_tensor_and_the_images_meta_data() -> None:
    image = MetaTensor(torch.zeros(1, 2, 2), affine=torch.diag(torch.tensor([2.0, 3, 1, 1])))
    d = SplitOutputd(num_classes=0, targets=[THICKNESS])({"pred": torch.ones(1, 2, 2), "image": image})
    assert "segmentation" not in d
    assert torch.equal(d["thickness_pred"].affine, image.affine)


def test_log_variances_become_standard_deviations_in_the_targets_unit() -> None:
    output = torch.zeros(5, 1, 1)
    output[4] = math.log(9.0)
    d = SplitOutputd(num_classes=3, targets=[THICKNESS])({"pred": output})
    assert d["thickness_std"].item() == pytest.approx(3.0)
    assert d["thickness_std"].shape == (1, 1, 1)


def test_case_numbers_are_a_sum_and_a_mean_weighted_by_the_segmentation() -> None:
    output = torch.zeros(5, 1, 2)
    output[1, 0, 0], output[1, 0, 1] = 50.0, math.log(2.0)  # probabilities of class 1: 1 and 2 / (1 + 2 + 1)
    output[3] = torch.tensor([[1.5, 2.0]])
    output[4] = torch.tensor([[4.0, 10.0]])
    d = SplitOutputd(num_classes=3, targets=[VOLUME, SEVERITY])({"pred": output})
    assert d["volume_case"] == pytest.approx(3.5)
    assert d["severity_case"] == pytest.approx((4 + 0.5 * 10) / 1.5)


def test_split_refuses_another_number_of_channels() -> None:
    with pytest.raises(BadInput, match="6 channels, expected 3 classes \\+ 1 targets"):
        SplitOutputd(num_classes=3, targets=[THICKNESS])({"pred": torch.zeros(6, 2, 2)})


def test_segmentation_and_map_return_to_the_files_own_grid(tmp_path: Path) -> None:
    # An oblique-free but flipped and anisotropic file; the network's grid is RAS with 1 mm.
    affine = np.diag([-2.0, -1.0, 3.0, 1.0])
    truth = np.zeros((8, 12, 6), dtype=np.float32)
    truth[1:4, 2:9, 1:3] = 1
    nibabel.save(nibabel.Nifti1Image(truth, affine), tmp_path / "case.nii.gz")
    preprocessing = Compose(
        [
            LoadImaged("image", ensure_channel_first=True),
            Orientationd("image", axcodes="RAS"),
            Spacingd("image", pixdim=(1.0, 1.0, 1.0), mode="bilinear"),
        ]
    )
    d = preprocessing({"image": str(tmp_path / "case.nii.gz")})
    image = d["image"]
    assert image.shape[1:] != truth.shape
    inside = image.as_tensor() > 0.5
    d["pred"] = MetaTensor(
        torch.cat([~inside, inside, torch.full_like(image.as_tensor(), 2.5)]).float() * 20, meta=image.meta
    )
    target = {**THICKNESS, "structure": 1}
    labels = {"0": "background", "1": "lumen"}
    post = Compose(
        [
            SplitOutputd(num_classes=2, targets=[target]),
            Activationsd("segmentation", softmax=True),
            Invertd(["segmentation", "thickness_pred"], preprocessing, orig_keys="image", nearest_interp=False),
            AsDiscreted("segmentation", argmax=True, dtype=torch.uint8),
            MaskTargetd([target]),
            CaseSummaryd(labels, [target]),
        ]
    )
    d = post(d)
    assert d["segmentation"].dtype == torch.uint8
    assert np.array_equal(d["segmentation"].numpy()[0], truth)
    np.testing.assert_allclose(d["segmentation"].affine.numpy(), affine)
    np.testing.assert_allclose(d["thickness_pred"].affine.numpy(), affine)
    np.testing.assert_allclose(d["thickness_pred"].numpy()[0], truth * 50, atol=1e-3)
    assert d["result"]["volumes"]["lumen"]["value"] == pytest.approx(truth.sum() * 6 / 1000)
    assert d["result"]["thickness"]["structures"]["lumen"]["mean"] == pytest.approx(50, abs=1e-3)


def make_case() -> dict[str, torch.Tensor]:
    affine = torch.diag(torch.tensor([1.0, 2.0, 5.0, 1.0]))
    segmentation = torch.tensor([[[[0, 1, 2, 2, 2]]]], dtype=torch.uint8)
    values = torch.tensor([[[[9.0, 9.0, -1.0, 2.0, 4.0]]]])
    return {
        "segmentation": MetaTensor(segmentation, affine=affine),
        "thickness_pred": MetaTensor(values, affine=affine),
        "thickness_std": MetaTensor(torch.full_like(values, 0.5), affine=affine),
    }


def test_mask_keeps_the_structure_and_no_negative_thickness() -> None:
    d = MaskTargetd([THICKNESS, VOLUME])(make_case())
    assert d["thickness_pred"].flatten().tolist() == [0, 0, 0, 2, 4]
    assert d["thickness_std"].flatten().tolist() == [0, 0, 0.5, 0.5, 0.5]
    assert isinstance(d["thickness_pred"], MetaTensor)
    unmasked = MaskTargetd([{**THICKNESS, "minimum": None}], mask=False)(make_case())
    assert unmasked["thickness_pred"].flatten().tolist() == [9, 9, -1, 2, 4]


def test_mask_takes_several_structures_and_drops_nan_outside() -> None:
    case = make_case()
    case["thickness_pred"][0, 0, 0, 0] = torch.nan
    d = MaskTargetd([{**THICKNESS, "structure": [1, 2]}])(case)
    assert d["thickness_pred"].flatten().tolist() == [0, 9, 0, 2, 4]


def test_without_a_segmentation_nothing_is_masked() -> None:
    case = make_case()
    del case["segmentation"]
    assert MaskTargetd([THICKNESS])(case)["thickness_pred"].flatten().tolist() == [9, 9, 0, 2, 4]


def test_summary_has_volumes_statistics_and_case_numbers_and_is_plain_json() -> None:
    case = {**make_case(), "volume_case": 3.5}
    result = CaseSummaryd(LABELS, [THICKNESS, VOLUME])(case)["result"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["volumes"] == {
        "lumen": {"value": pytest.approx(0.01), "unit": "mL"},
        "wall": {"value": pytest.approx(0.03), "unit": "mL"},
    }
    wall = result["thickness"]["structures"]["wall"]
    assert wall["mean"] == pytest.approx(5 / 3)
    assert wall["median"] == pytest.approx(2.0)
    assert wall["p5"] == pytest.approx(-0.7)
    assert wall["p95"] == pytest.approx(3.8)
    assert wall["voxels"] == 3
    assert wall["uncertainty"] == pytest.approx(0.5)
    assert list(result["thickness"]["structures"]) == ["wall"]
    assert result["thickness"]["unit"] == "mm"
    assert result["volume"] == {"value": 3.5, "unit": "mL"}


def test_summary_of_a_structure_that_was_not_found_is_none_and_zero() -> None:
    case = make_case()
    case["segmentation"] = torch.zeros_like(case["segmentation"])
    result = CaseSummaryd(LABELS, [THICKNESS])(case)["result"]
    assert result["volumes"]["wall"]["value"] == 0
    assert result["thickness"]["structures"]["wall"] == {
        "mean": None,
        "median": None,
        "p5": None,
        "p95": None,
        "voxels": 0,
    }


def test_summary_in_two_dimensions_gives_areas() -> None:
    segmentation = MetaTensor(
        torch.ones(1, 2, 3, dtype=torch.uint8), affine=torch.diag(torch.tensor([0.5, 2.0, 7.0, 1]))
    )
    result = CaseSummaryd(LABELS)({"segmentation": segmentation})["result"]
    assert result == {
        "areas": {"lumen": {"value": pytest.approx(6.0), "unit": "mm2"}, "wall": {"value": 0, "unit": "mm2"}}
    }


def test_summary_refuses_a_target_named_as_the_sizes() -> None:
    with pytest.raises(BadInput, match="'volumes'"):
        CaseSummaryd(LABELS, [{**VOLUME, "name": "volumes"}])


def test_geometric_thickness_is_measured_from_the_predicted_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def wall_thickness(
        label: np.ndarray, spacing: list[float], wall: int, inner: list[int], **options: object
    ) -> np.ndarray:
        asked.update(spacing=list(spacing), inner=inner, **options)
        return (label == wall).astype(np.float32) * 7

    module = types.ModuleType("common.data.thickness")
    module.wall_thickness = wall_thickness
    monkeypatch.setitem(sys.modules, "common.data.thickness", module)
    d = GeometricThicknessd("thickness", structure=2, inner=[1], slicewise=True)(make_case())
    assert d["thickness_pred"].flatten().tolist() == [0, 0, 7, 7, 7]
    assert d["thickness_pred"].shape == d["segmentation"].shape
    assert torch.equal(d["thickness_pred"].affine, d["segmentation"].affine)
    assert d["thickness_measured"].flatten().tolist() == [0, 0, 1, 1, 1]
    expected = {"spacing": [1.0, 2.0, 5.0], "inner": [1], "slicewise": True, "axis": -1, "smallest_cavity": 1}
    assert asked == expected


@pytest.mark.parametrize(
    "options", [{}, {"slicewise": True, "axis": 0}, {"slicewise": True, "axis": 0, "smallest_cavity": 10}], ids=str
)
def test_geometric_thickness_of_the_reference_is_the_reference(tmp_path: Path, options: dict[str, object]) -> None:
    """What the command says of its measurement is enough to repeat it, in the file's own orientation."""
    label = np.zeros((4, 12, 12), np.uint8)  # rings across the first axis, with 9 and with 16 voxels inside
    label[:2, 1:8, 1:8], label[:2, 3:6, 3:6] = 2, 1
    label[2:, 1:9, 1:9], label[2:, 3:7, 3:7] = 2, 1
    nibabel.save(nibabel.Nifti1Image(label, np.diag([-4.0, 0.5, 0.7, 1.0])), tmp_path / "label.nii.gz")
    content = {"labels": LABELS, "training": [{"image": "label.nii.gz", "label": "label.nii.gz"}]}
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    made = write_thickness_maps(tmp_path / "datalist.json", tmp_path / "out", 2, [1], progress=False, **options)
    target = GeometricThicknessd.measurable([VOLUME, THICKNESS, *json.loads(made.read_text())["targets"]])
    keys = ["segmentation", "reference"]
    files = {"segmentation": tmp_path / "label.nii.gz", "reference": tmp_path / "out/thickness/label.nii.gz"}
    d = LoadImaged(keys, ensure_channel_first=True)(files)
    d = GeometricThicknessd(**GeometricThicknessd.arguments(target))(d)
    assert d["reference"].any()
    assert torch.equal(d["thickness_pred"].as_tensor(), d["reference"].as_tensor())


def test_a_target_that_geometry_cannot_measure() -> None:
    with pytest.raises(BadInput, match="Add `inner`"):
        GeometricThicknessd.measurable([VOLUME, THICKNESS])
    with pytest.raises(BadInput, match=r"thickness is measured in the labels \[1, 2\]"):
        GeometricThicknessd.arguments({**THICKNESS, "structure": [1, 2], "inner": [3]})
