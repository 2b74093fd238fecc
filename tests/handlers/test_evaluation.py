from __future__ import annotations

import csv
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer
from monai.transforms import Activationsd, AsDiscreted, Compose, Invertd, LoadImaged

from common.data import load_section
from common.data.folders import read_label_ids
from common.errors import BadInput
from common.handlers.evaluation import CaseJsonWriter, EvaluationWriter, write_atomically
from common.handlers.pictures import StagePicture
from common.metrics import DISTANCE_METRICS
from common.transforms import preprocessing
from common.transforms.loading import LoadCased, LoadReferencesd
from common.transforms.output import CaseSummaryd, MaskTargetd, SplitOutputd

LABELS = {"0": "background", "1": "lumen", "2": "wall"}
THICKNESS = {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "missing": 0, "scale": 1.0}
VOLUME = {"name": "volume", "unit": "mL", "kind": "sum"}
SPACING = (1.0, 2.0, 5.0)


def tensor(values: torch.Tensor, case: str, spacing: tuple[float, ...] = SPACING) -> MetaTensor:
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    return MetaTensor(values[None], affine=affine, meta={"filename_or_obj": f"/data/{case}.nii.gz"})


def make_case(name: str, shift: int = 0, thickness: float = 2.0, volume: float = 1.0) -> dict[str, Any]:
    """A 2 x 4 x 4 wall in the reference; the prediction is moved by ``shift`` voxels along the second axis."""
    reference = torch.zeros(6, 10, 6, dtype=torch.uint8)
    reference[1:3, 1:5, 1:5] = 2
    measured = torch.zeros(6, 10, 6)
    measured[1:3, 1:5, 1:5] = torch.linspace(1, 3, 32).reshape(2, 4, 4)
    measured[5, 9, 5] = 100.0  # outside the structure: must not count
    return {
        "image": tensor(torch.zeros(6, 10, 6), name),
        "segmentation": tensor(torch.roll(reference, shift, dims=1), name),
        "reference": tensor(reference, name),
        "thickness_pred": tensor(torch.full((6, 10, 6), thickness), name),
        "reference_thickness": tensor(measured, name),
        "volume_case": volume,
        "volume": torch.tensor(2.0),
    }


def run(handler: Any, cases: list[dict[str, Any]]) -> Engine:
    engine = Engine(lambda _, batch: [batch])
    handler.attach(engine)
    engine.run(cases, max_epochs=1)
    return engine


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_csv_has_a_row_a_case_and_the_figures(tmp_path: Path) -> None:
    run(EvaluationWriter(tmp_path, LABELS, [THICKNESS, VOLUME]), [make_case("b", shift=2), make_case("a")])
    first, second = read_csv(tmp_path / "metrics.csv")
    assert (first["case"], second["case"]) == ("a", "b")
    assert float(first["dice/wall"]) == 1
    assert float(first["hd95/wall"]) == 0
    assert float(second["dice/wall"]) == pytest.approx(0.5)
    assert float(second["jaccard/wall"]) == pytest.approx(1 / 3)
    assert float(second["hd95/wall"]) == pytest.approx(4.0)  # two voxels of 2 mm
    # Pooled: of 2 x 32 surface voxels half lie outside the other mask, at 2 mm (1 voxel) and 4 mm (2 voxels) alike.
    assert float(second["hd95_pooled/wall"]) == pytest.approx(4.0)
    assert float(second["hd95_pooled_voxels/wall"]) == pytest.approx(2.0)
    assert float(second["asd_voxels/wall"]) == pytest.approx(0.75)
    assert float(second["volume_ml/wall"]) == pytest.approx(32 * 10 / 1000)
    assert first["dice/lumen"] == ""  # in neither
    errors = (torch.linspace(1, 3, 32) - 2).abs()
    assert float(first["thickness/mae"]) == pytest.approx(float(errors.mean()), rel=1e-5)
    assert float(first["thickness/voxels"]) == 32
    assert float(first["thickness/coverage"]) == 1
    assert float(second["thickness/coverage"]) == 0.5
    assert float(first["volume/error"]) == pytest.approx(-1.0)
    assert first["failed"] == ""


def test_cases_whose_files_have_one_name_have_a_row_each(tmp_path: Path) -> None:
    entries = []
    for patient in ("p1", "p2"):
        for key in ("image", "label"):
            path = tmp_path / patient / f"{key}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            label = 2 if patient == "p1" else 1
            nibabel.save(nibabel.Nifti1Image(np.full((4, 4, 4), label, np.uint8), np.eye(4)), path)
        entries.append({key: f"{patient}/{key}.nii.gz" for key in ("image", "label")})
    (tmp_path / "datalist.json").write_text(json.dumps({"testing": entries}))
    transform = Compose([LoadCased(["image"], channels=1), LoadReferencesd()])
    loader = DataLoader(Dataset(load_section(tmp_path / "datalist.json", "testing"), transform), batch_size=1)
    cases = [case for batch in loader for case in decollate_batch(batch)]
    cases = [{**case, "segmentation": torch.full_like(case["reference"], 2)} for case in cases]
    run(EvaluationWriter(tmp_path, LABELS), cases)
    rows = {row["case"]: row for row in read_csv(tmp_path / "metrics.csv")}
    assert {case: row["dice/wall"] for case, row in rows.items()} == {"p1_image": "1.0", "p2_image": "0.0"}
    assert [failure["case"] for failure in json.loads((tmp_path / "summary.json").read_text())["failures"]] == [
        "p2_image",
        "p2_image",
    ]


def test_ids_of_a_label_that_was_scaled_to_whole_numbers_and_back_are_what_they_were(tmp_path: Path) -> None:
    """As loading for training has it: nibabel stores floats under an int16 header with a scale factor."""
    label = np.zeros((4, 4, 4), dtype=np.float32)
    label[0], label[1] = 1, 3
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    nibabel.save(nibabel.Nifti1Image(label, np.eye(4), header), tmp_path / "label.nii")
    assert not np.array_equal(np.unique(nibabel.load(tmp_path / "label.nii").get_fdata()), [0, 1, 3])
    reference = LoadReferencesd()({"label": str(tmp_path / "label.nii")})["reference"]
    assert reference.unique().tolist() == [0, 1, 3]
    assert read_label_ids([str(tmp_path / "label.nii")]) == [0, 1, 3]
    nibabel.save(nibabel.Nifti1Image(label / 2, np.eye(4)), tmp_path / "half.nii")
    assert 0.5 in LoadReferencesd()({"label": str(tmp_path / "half.nii")})["reference"], "these are no ids"


def test_summary_has_mean_spread_and_count_and_pooled_regression(tmp_path: Path) -> None:
    cases = [make_case("a", volume=2.5), make_case("b", shift=2, thickness=2.5)]
    engine = run(EvaluationWriter(tmp_path, LABELS, [THICKNESS, VOLUME]), cases)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["cases"] == 2
    wall = summary["labels"]["wall"]
    assert wall["dice"] == {"mean": pytest.approx(0.75), "sd": pytest.approx(0.5 / math.sqrt(2)), "n": 2}
    assert wall["hd95_pooled_voxels"] == {"mean": pytest.approx(1), "sd": pytest.approx(math.sqrt(2)), "n": 2}
    assert {"hd95_pooled", "hd95_pooled_voxels", "asd_voxels"} < set(wall) & set(summary["conventions"])
    assert summary["labels"]["lumen"]["dice"] == {"mean": None, "sd": None, "n": 0}
    assert summary["mean_dice"] == pytest.approx(0.75)
    assert summary["failures"] == []
    errors = torch.cat([torch.linspace(1, 3, 32) - 2, torch.linspace(1, 3, 32) - 2.5])
    thickness = summary["targets"]["thickness"]
    assert thickness["unit"] == "mm"
    assert thickness["voxels"]["n"] == 64
    assert thickness["voxels"]["rmse"] == pytest.approx(float(errors.square().mean().sqrt()), rel=1e-5)
    assert thickness["case_means"]["mae"] == pytest.approx(0.25)
    assert summary["targets"]["volume"]["cases"] == {
        "mae": 0.75,
        "rmse": pytest.approx(0.7906, 1e-3),
        "r2": None,
        "n": 2,
    }
    assert "note" not in summary

    metrics = engine.state.metrics
    assert metrics["mean_dice"] == pytest.approx(0.75)
    assert metrics["dice/wall"] == pytest.approx(0.75)
    assert metrics["thickness/rmse"] == pytest.approx(thickness["voxels"]["rmse"])
    assert metrics["thickness/case_means_mae"] == pytest.approx(0.25)
    assert metrics["volume/mae"] == pytest.approx(0.75)
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_measurement_with_gaps_is_judged_on_all_voxels(tmp_path: Path) -> None:
    """A quarter of the wall has no measurement and gets the mean of the others; a case without any gets 0."""
    case, empty = make_case("a", thickness=2.5), make_case("b", thickness=0.0)
    measured = torch.zeros(6, 10, 6)
    measured[1:3, 1:4, 1:5] = 1
    case["thickness_pred"][0][measured == 0] = 0.0
    case["thickness_measured"], empty["thickness_measured"] = tensor(measured, "a"), tensor(torch.zeros(6, 10, 6), "b")
    run(EvaluationWriter(tmp_path, LABELS, [THICKNESS]), [case, empty])
    truth = torch.linspace(1, 3, 32).reshape(2, 4, 4)
    first, second = read_csv(tmp_path / "metrics.csv")
    assert float(first["thickness/mae"]) == pytest.approx(float((truth - 2.5).abs().mean()), rel=1e-5)
    assert float(first["thickness/coverage"]) == 0.75
    assert float(second["thickness/mae"]) == pytest.approx(2.0, rel=1e-5)
    assert float(second["thickness/coverage"]) == 0
    thickness = json.loads((tmp_path / "summary.json").read_text())["targets"]["thickness"]
    covered = (truth[:, :3] - 2.5).abs().mean()
    assert thickness["covered"]["voxels"] == {**thickness["covered"]["voxels"], "n": 24, "mae": pytest.approx(covered)}


def test_a_predicted_zero_is_a_value(tmp_path: Path) -> None:
    run(EvaluationWriter(tmp_path, LABELS, [THICKNESS]), [make_case("a", thickness=0.0)])
    assert float(read_csv(tmp_path / "metrics.csv")[0]["thickness/coverage"]) == 1


def test_label_ids_that_nobody_knows(tmp_path: Path) -> None:
    case = make_case("a")
    case["reference"][0, 0, 0, 0] = 7
    with pytest.raises(BadInput, match=r"case a: the reference has the label ids 7,"):
        run(EvaluationWriter(tmp_path, LABELS), [case])


def test_a_target_is_a_map_unless_it_says_otherwise(tmp_path: Path) -> None:
    plain = {key: value for key, value in THICKNESS.items() if key != "kind"}
    run(EvaluationWriter(tmp_path, LABELS, [plain]), [make_case("a")])
    assert float(read_csv(tmp_path / "metrics.csv")[0]["thickness/voxels"]) == 32


def test_entropies_are_summarized(tmp_path: Path) -> None:
    cases = [{**make_case(name), "entropy": value} for name, value in (("a", 0.1), ("b", 0.3), ("c", math.nan))]
    run(EvaluationWriter(tmp_path, LABELS), cases)
    assert [row["entropy"] for row in read_csv(tmp_path / "metrics.csv")] == ["0.1", "0.3", ""]
    entropy = json.loads((tmp_path / "summary.json").read_text())["entropy"]
    assert entropy == {"mean": pytest.approx(0.2), "sd": pytest.approx(0.2 / math.sqrt(2)), "n": 2}


def test_intervals_are_judged_and_calibrated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Deviations of 0.1 mm for errors of up to 1 mm, in ten cases that are alike."""
    cases = [make_case(f"c{index}") for index in range(10)]
    for case in cases:
        case["thickness_std"] = torch.full_like(case["thickness_pred"], 0.1)
    with caplog.at_level("INFO"):
        run(EvaluationWriter(tmp_path, LABELS, [THICKNESS]), cases)
    scores = (torch.linspace(1, 3, 32) - 2).abs() / 0.1
    raw = float((scores < 1.6449).float().mean())
    interval = json.loads((tmp_path / "summary.json").read_text())["targets"]["thickness"]["interval"]
    assert interval["raw"] == pytest.approx(raw)
    # Ten cases of 32 voxels weigh 1 / 352 a voxel: 0.9 are 316.8, in each case the 32 smallest: all. So with nine.
    assert interval["factor"] == pytest.approx(float(scores.max()), rel=1e-5)
    assert (interval["calibrated"], interval["n"], interval["level"]) == (1.0, 10, 0.9)
    assert f"hold {raw:.1%} of the voxels as predicted, 100.0% calibrated" in caplog.text
    rows = read_csv(tmp_path / "metrics.csv")
    assert [float(row["thickness/interval_coverage"]) for row in rows] == [pytest.approx(raw)] * 10
    assert "thickness/interval_scores" not in rows[0]


def test_metrics_are_there_for_handlers_attached_later(tmp_path: Path) -> None:
    engine = Engine(lambda _, batch: [batch])
    EvaluationWriter(tmp_path, LABELS).attach(engine)
    seen: dict[str, float] = {}
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: seen.update(engine.state.metrics))
    engine.run([make_case("a")], max_epochs=1)
    assert seen["mean_dice"] == 1


def test_an_empty_prediction_is_listed_and_gets_no_distance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = make_case("b")
    empty["segmentation"] = torch.zeros_like(empty["segmentation"])
    surplus = make_case("c")
    surplus["segmentation"][0, 0, 0, 0] = 1
    with caplog.at_level(logging.INFO):
        run(EvaluationWriter(tmp_path, LABELS), [make_case("a"), empty, surplus])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["failures"] == [
        {"case": "b", "label": "wall", "reason": "prediction empty"},
        {"case": "c", "label": "lumen", "reason": "reference empty"},
    ]
    assert summary["labels"]["wall"]["failed"] == 1
    assert summary["labels"]["wall"]["dice"]["n"] == 3
    assert summary["labels"]["wall"]["dice"]["mean"] == pytest.approx(2 / 3)
    assert all(summary["labels"]["wall"][key]["n"] == 2 for key in DISTANCE_METRICS)
    row = read_csv(tmp_path / "metrics.csv")[1]
    assert (row["dice/wall"], row["hd95/wall"], row["failed"]) == ("0.0", "", "wall")
    assert all(row[f"{key}/wall"] == "" for key in DISTANCE_METRICS)
    assert "prediction empty" in caplog.text


def test_a_second_run_starts_anew_and_a_choice_on_the_same_cases_is_said(tmp_path: Path) -> None:
    engine = Engine(lambda _, batch: [batch])
    EvaluationWriter(tmp_path, LABELS, selected_on="validation").attach(engine)
    engine.run([make_case("a"), make_case("b")], max_epochs=1)
    engine.run([make_case("c")], max_epochs=1)
    assert [row["case"] for row in read_csv(tmp_path / "metrics.csv")] == ["c"]
    assert "validation" in json.loads((tmp_path / "summary.json").read_text())["note"]


def test_only_annotated_labels_count(tmp_path: Path) -> None:
    run(EvaluationWriter(tmp_path, LABELS), [{**make_case("a"), "annotated": [torch.tensor(1)]}])
    assert "dice/wall" not in read_csv(tmp_path / "metrics.csv")[0]


def test_a_regression_network_alone_is_evaluated_without_segmentation(tmp_path: Path) -> None:
    case = make_case("a")
    del case["segmentation"]
    engine = run(EvaluationWriter(tmp_path, LABELS, [THICKNESS]), [case])
    assert float(read_csv(tmp_path / "metrics.csv")[0]["thickness/voxels"]) == 32
    assert "mean_dice" not in engine.state.metrics


def test_a_case_without_the_target_has_empty_fields(tmp_path: Path) -> None:
    bare = make_case("b")
    del bare["reference_thickness"]
    bare["volume"] = torch.tensor(math.nan)
    run(EvaluationWriter(tmp_path, LABELS, [THICKNESS, VOLUME]), [make_case("a"), bare])
    row = read_csv(tmp_path / "metrics.csv")[1]
    assert (row["thickness/mae"], row["volume/error"]) == ("", "")
    assert json.loads((tmp_path / "summary.json").read_text())["targets"]["volume"]["cases"]["n"] == 1


def test_a_reference_on_another_grid_is_refused(tmp_path: Path) -> None:
    case = make_case("a")
    case["reference"] = tensor(case["reference"][0, :5], "a")
    with pytest.raises(BadInput, match="case a: `reference` has shape \\(5, 10, 6\\)"):
        run(EvaluationWriter(tmp_path, LABELS), [case])
    case["reference"] = make_case("a")["reference"]
    case["reference"].affine[0, 0] *= -1
    with pytest.raises(BadInput, match="lies 10 mm away"):
        run(EvaluationWriter(tmp_path, LABELS), [case])
    del case["reference"]
    with pytest.raises(BadInput, match="no `reference`"):
        run(EvaluationWriter(tmp_path, LABELS), [case])


def test_case_json(tmp_path: Path) -> None:
    result = {"volumes": {"wall": {"value": 1.5, "unit": "mL"}}, "thickness": {"mean": math.nan}}
    run(CaseJsonWriter(tmp_path / "new"), [{"image": tensor(torch.zeros(2, 2, 2), "lung_1"), "result": result}])
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["lung_1.json"]
    written = json.loads((tmp_path / "new" / "lung_1.json").read_text())
    assert written == {"volumes": result["volumes"], "thickness": {"mean": None}}


def test_writing_replaces_whole_files_and_leaves_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(BadInput, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


class Threshold(torch.nn.Module):
    """Calls what is bright a wall of 2 mm."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        bright = (image > 0.5).float() * 20
        return torch.cat([20 - bright, bright * 0, bright, torch.full_like(image, 2.0), torch.ones_like(image)], dim=1)


def test_through_monais_evaluator_on_the_files_own_grid(tmp_path: Path) -> None:
    label = np.zeros((8, 10, 6), dtype=np.uint8)
    label[2:6, 3:8, 1:4] = 2
    affine = np.diag([-2.0, 2.0, 2.0, 1.0])
    measured = np.where(label == 2, 2.5, 0)
    for name, values in (("image", label * 100), ("label", label), ("thickness", measured)):
        nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), tmp_path / f"{name}.nii.gz")
    entry = {
        "image": str(tmp_path / "image.nii.gz"),
        "reference": str(tmp_path / "label.nii.gz"),
        "reference_thickness": str(tmp_path / "thickness.nii.gz"),
        "volume": 500.0,
    }
    prepare = preprocessing(spacing=(1.0, 1.0, 1.0))
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(
            Dataset(
                [entry],
                Compose([prepare, LoadImaged(["reference", "reference_thickness"], ensure_channel_first=True)]),
            )
        ),
        network=Threshold(),
        inferer=SimpleInferer(),
        prepare_batch=lambda batch, device, non_blocking, **_: (batch["image"].to(device), None),
        postprocessing=Compose(
            [
                SplitOutputd(num_classes=3, targets=[THICKNESS, VOLUME]),
                Activationsd("segmentation", softmax=True),
                Invertd(["segmentation", "thickness_pred"], prepare, orig_keys="image", nearest_interp=False),
                AsDiscreted("segmentation", argmax=True, dtype=torch.uint8),
                MaskTargetd([THICKNESS]),
                CaseSummaryd(LABELS, [THICKNESS, VOLUME]),
            ]
        ),
        val_handlers=[
            EvaluationWriter(tmp_path / "out", LABELS, [THICKNESS, VOLUME]),
            CaseJsonWriter(tmp_path / "out"),
            StagePicture(tmp_path / "out", [THICKNESS], median=True),
        ],
    )
    evaluator.run()
    (row,) = read_csv(tmp_path / "out" / "metrics.csv")
    assert row["case"] == "image"
    assert float(row["dice/wall"]) == 1
    assert float(row["volume_ml/wall"]) == pytest.approx(60 * 8 / 1000)
    assert float(row["thickness/mae"]) == pytest.approx(0.5, abs=1e-5)
    assert float(row["thickness/voxels"]) == 60
    # A sum over the network's grid, whatever the grid of the file.
    on_grid = evaluator.state.output[0]["image"].numel()
    assert float(row["volume/prediction"]) == on_grid > label.size
    result = json.loads((tmp_path / "out" / "image.json").read_text())
    assert result["thickness"]["structures"]["wall"]["mean"] == pytest.approx(2.0, abs=1e-5)
    assert result["volume"]["value"] == on_grid
    assert (tmp_path / "out" / "image_overview_thickness.png").stat().st_size > 0
    assert evaluator.state.metrics["mean_dice"] == 1
