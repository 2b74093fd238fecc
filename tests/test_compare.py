"""Comparison of recipes: which runs it asks for, what it refuses, its table, its tests and its picture."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from common import recipes as recipes_module
from common import study as study_module
from common.compare import _plan, add_arguments, check_settings, describe, main
from common.comparison import Comparison, case_dice, trained_parameters
from common.comparison_picture import _slices, _window
from common.errors import BadInput
from common.recipes import Recipe, choose_recipes, read_recipes
from common.report import NOTHING
from common.tables import deployed_parameters

#: cases as results name them, and their files; what is named by its folder lies in a file that is called as another is
FILES = {"a_image": "a/image", "b_image": "b/image", "c": "c", "d": "d"}
#: a labelled case and two whose labels are set aside
LEARNT = ("t", "u", "v")
CASES = tuple(FILES)
PATIENTS = {"a_image": 0, "b_image": "0", "c": "q", "d": "r"}
NUMBERS = {"dice": 0.0, "jaccard": 0.5, "hd95": 3.0, "asd": 1.0}
NUMBERS |= {"hd95_pooled": 2.5, "hd95_pooled_voxels": 2.0, "asd_voxels": 0.5}
#: Dice of each case by run, before what a seed adds
DICE = {"supervised": (0.5, 0.6, 0.5, 0.6), "bcp": (0.8, 0.8, 0.9, 0.6), "distillation": (0.8, 0.9, 0.85, 0.7)}
#: what each further seed adds
GAIN = {"bcp": 0.06}


def option(command: list[str], name: str) -> str | None:
    return command[command.index(f"--{name}") + 1] if f"--{name}" in command else None


def options(data: Path, output: Path, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    plan = data / "plan.json"
    plan.write_text("{}")
    given = ["--data", str(data), "--output", str(output), "--steps", "9", "--iterations-per-epoch", "1"]
    return parser.parse_args([*given, "--plan", str(plan), "--recipes", "bcp", *arguments])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four cases of three patients as validation, and three to learn from; the structure is a block in the middle."""
    folder = tmp_path / "data"
    folder.mkdir()
    label = np.zeros((8, 8, 4), np.uint8)
    label[2:5, 2:6, 1:3] = 1
    for file in (*FILES.values(), *LEARNT):
        (folder / file).parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).random((8, 8, 4)), np.eye(4)), folder / f"{file}.nii")
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), folder / f"{file}_label.nii")
    entries = [{"image": f"{f}.nii", "label": f"{f}_label.nii", "patient": PATIENTS[c]} for c, f in FILES.items()]
    learnt = [{"image": f"{name}.nii", "label": f"{name}_label.nii"} for name in LEARNT]
    unlabeled = [{"image": entry["image"]} for entry in learnt[1:]]
    content = {"training": learnt[:1], "unlabeled": unlabeled, "validation": entries}
    (folder / "datalist.json").write_text(json.dumps(content))
    everything = {**content, "training": learnt, "unlabeled": []}
    (folder / "full.json").write_text(json.dumps(everything))
    (folder / "other_cases.json").write_text(json.dumps({**everything, "validation": entries[2:]}))
    (folder / "learnt.json").write_text(json.dumps({**content, "unlabeled": [{"image": "c.nii"}]}))
    relabelled = {**entries[3], "label": entries[2]["label"]}
    (folder / "other_labels.json").write_text(json.dumps({**everything, "validation": [*entries[:3], relabelled]}))
    return folder


@pytest.fixture
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tracking database, which takes seconds to make."""
    monkeypatch.setattr(Comparison, "_log", lambda *_: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, data: Path) -> list[list[str]]:
    """Commands are written down instead of run, and leave the files that a training or an evaluation leaves."""
    seen: list[list[str]] = []

    def fake(command: list[str], log: Any, cores: list[int] | None) -> int:
        seen.append(command)
        folder, models = Path(option(command, "output_dir")), Path(option(command, "ckpt_dir"))
        run, seed = folder.parent.parent.name, int(option(command, "seed"))
        if run == "cps":
            return 1
        for path in (folder, models):
            path.mkdir(parents=True, exist_ok=True)
        if folder.name == "train":
            weights = {
                "conv.weight": torch.zeros(3, 5),
                "norm.running_mean": torch.zeros(3),
                "scale": torch.tensor(1.0),
            }
            torch.save({"model": weights}, models / "model.pt")
            optimizers = {
                "optimizer": {"param_groups": [], "state": {0: {"momentum_buffer": torch.zeros(3, 5)}}},
                "second": {"param_groups": [], "state": {0: {"step": torch.tensor(1), "exp_avg": torch.zeros(7)}}},
            }
            torch.save({"state": {"method": weights, **optimizers}}, folder / "checkpoint.pt")
            return 0
        assert option(command, "postprocessing#output_dir") == "$@output_dir + '/predictions'"
        scores = [dice + GAIN.get(run, 0.02) * seed for dice in DICE.get(run, DICE["supervised"])]
        lines = [f"{case},{dice},\n" for case, dice in zip(CASES, scores, strict=True)]
        (folder / "metrics.csv").write_text("case,dice/wall,failed\n" + "".join(lines))
        found = {**NUMBERS, "dice": float(np.mean(scores)), "hd95": 3.0 if run == "bcp" else 4.0}
        label = {key: {"mean": value} for key, value in found.items()}
        summary = {
            "labels": {"wall": {**label, "failed": int(seed == 0)}},
            "mean_dice": float(np.mean(scores)),
            "targets": {},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "predictions").mkdir(exist_ok=True)
        for case in CASES:
            found = nibabel.load(data / f"{FILES[case]}_label.nii")
            nibabel.save(found, folder / "predictions" / f"{case}_seg.nii.gz")
        return 0

    monkeypatch.setattr(study_module, "_call", fake)
    return seen


def test_all_rows_take_the_same_steps() -> None:
    recipes = choose_recipes("ua_mt,ase_net,knowledge_distillation", read_recipes())
    rates = {"learning_rate": 0.05}
    runs = describe(recipes, "few.json", 800, 50, "full.json", rates, {"mirror_axes": [0]})["runs"]
    assert {name: run["epochs"] for name, run in runs.items()} == {
        "teacher": 5,
        "supervised": 16,
        "distillation": 11,
        "knowledge_distillation": 11,
        "ua_mt": 16,
        "ase_net": 16,
        "supervised_all": 16,
    }
    assert {name for name, run in runs.items() if run.get("teacher")} == {"distillation", "knowledge_distillation"}
    assert {name for name, run in runs.items() if run["set"] != rates} == {"ase_net"}
    assert runs["supervised_all"]["datalist"] == "full.json"
    assert runs["ua_mt"]["overlays"] == ["recipes/ua_mt.json"]
    with pytest.raises(BadInput, match="multiple"):
        describe(recipes, "few.json", 810, 50)
    with pytest.raises(BadInput, match="an epoch each"):
        describe(recipes, "few.json", 50, 50)


@pytest.mark.parametrize(("settings", "interval"), [({}, 6), ({"select": "best"}, 5), ({"val_interval": 2}, 2)])
def test_a_training_is_validated_once_unless_that_chooses_its_weights(settings: dict[str, Any], interval: int) -> None:
    recipes = choose_recipes("ua_mt", read_recipes())
    assert describe(recipes, "d.json", 6, 1, settings=settings)["set"]["val_interval"] == interval


def test_a_protocol_comes_last_and_gives_strong_views_to_those_that_ask_for_them() -> None:
    runs = describe(choose_recipes("ua_mt", read_recipes()), "d.json", 6, 1, protocol="left_atrium")["runs"]
    plain, views, strong, whole = (
        f"protocols/left_atrium{part}.json" for part in ("", "_views", "_strong_view", "_aggregating_decoupling")
    )
    assert runs["supervised"]["overlays"] == [plain]
    assert runs["ua_mt"]["overlays"] == ["recipes/ua_mt.json", plain, views]
    assert runs["distillation"]["overlays"] == [plain, views, strong]
    recipes = choose_recipes("aggregating_decoupling", read_recipes())
    runs = describe(recipes, "d.json", 6, 1, protocol="left_atrium")["runs"]
    assert runs["aggregating_decoupling"]["overlays"] == ["recipes/aggregating_decoupling.json", plain, whole]
    runs = describe(choose_recipes("ase_net_dybac", read_recipes()), "d.json", 6, 1, protocol="left_atrium")["runs"]
    assert runs["ase_net_dybac"]["overlays"][-1] == "protocols/left_atrium_ase_net_dybac.json"
    other = Recipe("other", ("recipes/other.json",), {"network_def#_target_": "elsewhere.Network"})
    with pytest.raises(BadInput, match="network of its own, and so has the recipe 'other'"):
        describe([other], "d.json", 6, 1, protocol="left_atrium")
    with pytest.raises(BadInput, match="right_atrium"):
        describe(choose_recipes("ua_mt", read_recipes()), "d.json", 6, 1, protocol="right_atrium")


def test_table_tests_and_picture(data: Path, calls: list[list[str]], tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ("--seeds", "0,1", "--upper-bound", "full.json", "--learning-rate", "0.05", "--set", "mirror_axes=[0]")
    assert main(options(data, output, *arguments)) == 0
    assert all(option(command, "mirror_axes") == "[0]" for command in calls)
    assert all(option(command, "learning_rate") == "0.05" for command in calls)

    content = json.loads((output / "compare.json").read_text())
    rows = {row["run"]: row for row in content["rows"]}
    assert list(rows) == ["supervised", "distillation", "bcp", "supervised_all"]
    assert [(row["labelled"], row["unlabelled"]) for row in rows.values()] == [(1, 0), (1, 2), (1, 2), (3, 0)]
    assert rows["bcp"]["dice"] == pytest.approx([0.775, 0.835])
    assert (rows["bcp"]["hd95"], rows["bcp"]["asd"], rows["bcp"]["failed"]) == ([3.0, 3.0], [1.0, 1.0], [1, 0])
    assert (rows["bcp"]["parameters"], rows["bcp"]["trained"]) == (16, 22)
    alone = json.loads((output / "distillation" / "seed0" / "record.json").read_text())["train_seconds"] / 60
    teacher = json.loads((output / "teacher" / "seed0" / "record.json").read_text())["train_seconds"] / 60
    assert rows["distillation"]["minutes"][0] == pytest.approx(alone + teacher)

    tests = {test["run"]: test for test in content["tests"]}
    assert set(tests) == {"supervised", "bcp", "supervised_all"}
    # Patients: 0 has a and b (-0, -0.1), q has c (+0.05), r has d (-0.1); in the mean of the seeds it gains 0.02 more.
    assert (tests["bcp"]["cases"], tests["bcp"]["seeds"]) == (3, [0, 1])
    assert tests["bcp"]["difference"] == pytest.approx((-0.05 + 0.05 - 0.1) / 3 + 0.02)
    assert tests["bcp"]["t_test_holm"] == pytest.approx(tests["bcp"]["t_test"])
    assert tests["supervised"]["t_test_holm"] == pytest.approx(3 * tests["supervised"]["t_test"])
    assert tests["bcp"]["wilcoxon_holm"] == pytest.approx(
        max(3 * tests["supervised"]["wilcoxon"], tests["bcp"]["wilcoxon"])
    )
    # The middle of 0.7, 0.8, 0.85 and 0.9, the lower of the two.
    assert content["picture"] == {"case": "a_image", "seed": 0}
    # Six panels, two slices.
    height, width, _ = imread(output / "compare.png").shape
    assert (width, height) == (1140, 410)

    text = (output / "compare.md").read_text()
    assert "| BCP | 1 | 2 | 0.805 ± 0.042 |" in text
    assert "| **0.823 ± 0.014** |" in text
    assert "| 3.00 ± 0.00 | 1.00 ± 0.00 | 1 |" in text
    assert "patients (n)" in text
    client = MlflowClient(f"sqlite:///{output / 'mlruns.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("compare").experiment_id])
    assert run.data.metrics["dice/bcp"] == pytest.approx(0.805)
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "compare.json",
        "compare.md",
        "compare.png",
    }


@pytest.mark.usefixtures("untracked")
def test_a_picture_that_fails_keeps_no_figures_back(
    data: Path, calls: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise BadInput("a_seg.nii.gz lies on another grid")

    monkeypatch.setattr("common.comparison.save_comparison", fail)
    assert main(options(data, tmp_path / "out")) == 0
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| BCP | 1 | 2 | 0.775 |" in text
    assert "Not done: picture: a_seg.nii.gz lies on another grid" in text


@pytest.mark.usefixtures("untracked", "calls")
def test_a_case_that_a_seed_has_no_figure_for_is_left_out_and_named(data: Path, tmp_path: Path) -> None:
    arguments = ("--seeds", "0,1")
    main(options(data, tmp_path / "out", *arguments))
    assert "Left out" not in (tmp_path / "out" / "compare.md").read_text()
    for run, seed in (("bcp", 1), ("supervised", 0)):
        path = tmp_path / "out" / run / f"seed{seed}" / "test" / "metrics.csv"
        (dropped,) = [line for line in path.read_text().splitlines() if line.startswith("c,")]
        path.write_text(path.read_text().replace(dropped, "c,,"))
    main(options(data, tmp_path / "out", *arguments, "--only-table"))
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    for test in content["tests"]:
        assert (test["cases"], test["left_out"]) == (2, ["c"])
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "Left out against BCP" in text
    assert "with every seed: c." in text


@pytest.mark.usefixtures("untracked", "calls")
def test_a_patient_is_compared_by_the_cases_that_both_rows_have_a_figure_for(data: Path, tmp_path: Path) -> None:
    main(options(data, tmp_path / "out"))
    path = tmp_path / "out" / "bcp" / "seed0" / "test" / "metrics.csv"
    path.write_text(path.read_text().replace("b_image,0.8,", "b_image,,"))
    main(options(data, tmp_path / "out", "--only-table"))
    (test,) = (t for t in json.loads((tmp_path / "out" / "compare.json").read_text())["tests"] if t["run"] == "bcp")
    assert (test["cases"], test["left_out"]) == (3, ["b_image"])
    assert test["difference"] == pytest.approx(((0.8 - 0.8) + (0.9 - 0.85) + (0.6 - 0.7)) / 3)


@pytest.mark.usefixtures("untracked", "calls")
def test_failures_are_listed(data: Path, tmp_path: Path) -> None:
    main(options(data, tmp_path / "out"))
    assert "Failed of" not in (tmp_path / "out" / "compare.md").read_text()
    path = tmp_path / "out" / "bcp" / "seed0" / "record.json"
    record = json.loads(path.read_text())
    failures = [{"case": f"case{number}", "label": "wall", "reason": "prediction empty"} for number in range(12)]
    record["summary"]["failures"] = failures
    path.write_text(json.dumps(record))
    main(options(data, tmp_path / "out", "--only-table"))
    (sentence,) = re.findall("Failed of .*", (tmp_path / "out" / "compare.md").read_text())
    assert sentence.startswith("Failed of BCP: case0 (wall, seed 0), case1 (wall, seed 0), ")
    assert sentence.endswith("case9 (wall, seed 0) and 2 more, in compare.json.")
    rows = {row["run"]: row for row in json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]}
    assert rows["bcp"]["failures"] == [failures]


@pytest.mark.usefixtures("untracked", "calls")
def test_every_panel_is_its_own_runs(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("common.comparison.save_comparison", lambda *arguments: drawn.append(arguments))
    main(options(data, tmp_path / "out"))
    ((path, image, label, predictions),) = drawn
    assert path == tmp_path / "out" / "compare.png"
    assert [Path(file).name for file in (image, label)] == ["image.nii", "image_label.nii"]
    scores = {"Supervised": 0.5, "Distillation (own)": 0.8, "BCP": 0.8}
    names = dict(zip(scores, ("supervised", "distillation", "bcp"), strict=True))
    assert predictions == {
        f"{title}\n{dice:.3f}": tmp_path / "out" / names[title] / "seed0/test/predictions/a_image_seg.nii.gz"
        for title, dice in scores.items()
    }


@pytest.mark.usefixtures("calls")
def test_figures_are_tracked_where_the_runs_are_and_not_kept_back_where_that_fails(data: Path, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    assert main(options(data, tmp_path / "out", "--set", f"tracking_uri={store}")) == 0
    assert not (tmp_path / "out" / "mlruns.db").exists()
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("compare").experiment_id])
    assert run.data.metrics["dice/bcp"] == pytest.approx(0.775)
    unreachable = f"sqlite:///{data / 'datalist.json' / 'mlruns.db'}"
    assert main(options(data, tmp_path / "other", "--set", f"tracking_uri={unreachable}")) == 0
    text = (tmp_path / "other" / "compare.md").read_text()
    assert "| BCP | 1 | 2 | 0.775 |" in text
    assert "Not done: MLflow: " in text
    assert "MLflow can't record the run there" in text


@pytest.mark.usefixtures("calls")
def test_figures_go_to_the_environments_server_and_its_password_nowhere(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def refuse(address: str) -> None:
        asked.append(address)
        raise MlflowException(f"{address} does not answer")

    secret = "https://anna:geheim@server.example/mlflow"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", secret)
    monkeypatch.setattr("common.comparison.open_store", refuse)
    assert main(options(data, tmp_path / "out")) == 0
    assert asked == [secret]
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "Not done: MLflow: https://server.example/mlflow: MLflow can't record the run there" in text
    assert "geheim" not in text


@pytest.mark.usefixtures("untracked", "calls")
def test_weights_that_were_chosen_on_the_evaluated_cases_are_told(data: Path, tmp_path: Path) -> None:
    main(options(data, tmp_path / "out"))
    path = tmp_path / "out" / "bcp" / "seed0" / "record.json"
    record = json.loads(path.read_text())
    record["summary"]["note"] = "The weights were chosen by their result on these cases."
    path.write_text(json.dumps(record))
    main(options(data, tmp_path / "out", "--only-table"))
    assert record["summary"]["note"] in (tmp_path / "out" / "compare.md").read_text()
    assert record["summary"]["note"] in json.loads((tmp_path / "out" / "compare.json").read_text())["remarks"]


@pytest.mark.usefixtures("untracked", "calls")
def test_tests_name_their_seeds_and_are_corrected_for_those_that_there_are(data: Path, tmp_path: Path) -> None:
    arguments = ("--seeds", "0,1", "--upper-bound", "full.json")
    main(options(data, tmp_path / "out", *arguments))
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| BCP | 0, 1 | 3 | -0.013 |" in text
    assert "Holm for 3 rows" in text
    (tmp_path / "out" / "bcp" / "seed1" / "record.json").unlink()
    (tmp_path / "out" / "bcp" / "seed0" / "test" / "metrics.csv").write_text("case,dice/wall\nc,0.9\n")
    main(options(data, tmp_path / "out", *arguments, "--only-table"))
    text = (tmp_path / "out" / "compare.md").read_text()
    assert f"| BCP | 0 | 1 | 0.050 | {NOTHING} |" in text
    assert "Holm for 2 rows" in text


@pytest.mark.usefixtures("untracked")
def test_table_says_which_code_and_which_machine_made_its_rows(
    data: Path, calls: list[list[str]], tmp_path: Path
) -> None:
    main(options(data, tmp_path / "out"))
    assert " versions of " not in (tmp_path / "out" / "compare.md").read_text()
    # Of a row, and of the teacher that another starts from.
    for run, commit in (("bcp", "abc+"), ("teacher", "012")):
        path = tmp_path / "out" / run / "seed0" / "record.json"
        other = {"commit": commit, "machine": "64 cores of another", "configs": "def"}
        path.write_text(json.dumps({**json.loads(path.read_text()), **other}))
    main(options(data, tmp_path / "out", "--only-table"))
    text = (tmp_path / "out" / "compare.md").read_text()
    (versions,) = re.findall(r"several versions of the code: (.*)\.", text)
    assert {"012", "abc+"} < set(versions.split(", "))
    assert "Runs of the bundle student were made with 2 versions of its train.json" in text
    assert "64 cores of another; " in text


@pytest.mark.usefixtures("untracked")
def test_beside_a_protocol_stand_the_distances_in_voxels(data: Path, calls: list[list[str]], tmp_path: Path) -> None:
    given = options(data, tmp_path / "out", "--protocol", "left_atrium")
    given.plan = None
    assert main(given) == 0
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "95HD pooled [voxels] | ASD [voxels]" in text
    assert "| 2.00 | 0.50 |" in text
    assert "Comparison on datalist.json" in text


@pytest.mark.usefixtures("untracked")
def test_what_is_done_is_kept_and_rows_can_be_added(
    data: Path, calls: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    main(options(data, output))
    count = len(calls)
    assert main(options(data, output, "--seeds", "0,1", "--recipes", "bcp,cps", "--only-table")) == 0
    assert len(calls) == count
    assert "0.775 (1 of 2)" in (output / "compare.md").read_text()
    # The run that fails ends neither the others nor the table.
    assert main(options(data, output, "--recipes", "cps,ua_mt", "--reference", "supervised")) == 1
    assert len(calls) == count + 1 + 2
    assert "cps, seed 0 failed" in capsys.readouterr().err
    text = (output / "compare.md").read_text()
    assert "Against Supervised" in text
    assert f"| CPS | 1 | 2 | {NOTHING} |" in text
    assert "Not done: run cps" in text
    assert set(json.loads((output / "study.json").read_text())["runs"]) >= {"bcp", "cps", "ua_mt"}


@pytest.mark.usefixtures("untracked")
def test_another_device_and_a_remark_in_a_recipe_change_no_results(
    data: Path, calls: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    shutil.copytree(study_module.ROOT / "bundles", root / "bundles")
    monkeypatch.setattr(study_module, "ROOT", root)
    main(options(data, tmp_path / "out"))
    count = len(calls)
    main(options(data, tmp_path / "out", "--device", "cpu"))
    recipe = root / "bundles" / "student" / "configs" / "recipes" / "bcp.json"
    content = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**content, "_comment": "pasted both ways"}))
    main(options(data, tmp_path / "out"))
    assert len(calls) == count
    assert "other settings" not in (tmp_path / "out" / "compare.md").read_text()
    recipe.write_text(json.dumps({**content, "unlabeled_weight": 9}))
    main(options(data, tmp_path / "out", "--only-table"))
    assert "Made with other settings than now: BCP, seed 0." in (tmp_path / "out" / "compare.md").read_text()
    main(options(data, tmp_path / "out"))
    assert len(calls) == count + 2
    assert "other settings" not in (tmp_path / "out" / "compare.md").read_text()


@pytest.mark.usefixtures("untracked")
def test_unlabelled_images_may_be_tested_on_which_is_said(data: Path, calls: list[list[str]], tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main(options(data, output, "--test-labels", "full.json")) == 0
    content = json.loads((output / "datalist.json").read_text())
    labels = [str(data / f"{name}_label.nii") for name in LEARNT[1:]]
    assert [entry["label"] for entry in content["testing"]] == labels
    assert [list(entry) for entry in content["unlabeled"]] == [["image"], ["image"]], "no training sees these labels"
    assert [entry["image"] for entry in content["training"]] == [str(data / "t.nii")]
    assert "validation" not in content
    assert {option(command, "datalist") for command in calls} == {str(output / "datalist.json")}
    assert {option(command, "section") for command in calls} == {"testing"}
    result = json.loads((output / "compare.json").read_text())
    assert "Transductive" in result["note"]
    assert result["note"] in (output / "compare.md").read_text()


@pytest.mark.parametrize(
    ("tested", "is_transductive"),
    [
        ({"image": "u.nii"}, True),
        ({"image": "a/image.nii", "patient": "Q"}, True),
        ({"image": "a/image.nii", "patient": "p"}, False),
    ],
)
@pytest.mark.usefixtures("untracked", "calls")
def test_tables_of_cases_that_were_learnt_from_say_so(
    tested: dict[str, str], is_transductive: bool, data: Path, tmp_path: Path
) -> None:
    """By their image, or by their patient, however it is written."""
    content = json.loads((data / "datalist.json").read_text())
    content["unlabeled"][1]["patient"] = "q"
    (data / "datalist.json").write_text(json.dumps({**content, "testing": [{**tested, "label": "d_label.nii"}]}))
    main(options(data, tmp_path / "out", "--set", "section=testing"))
    assert ("Transductive" in (tmp_path / "out" / "compare.md").read_text()) == is_transductive


def test_a_key_of_any_config_may_be_set_and_an_argument_of_any_component() -> None:
    description = describe(choose_recipes("bcp", read_recipes()), "d.json", 6, 1)
    arguments = ("train#trainer#gradient_clip", "inferer#stride", "train#method#segmentation_loss")
    check_settings(
        dict.fromkeys(("threshold", "section", "edges", *arguments)), {**description, "plan": {"set": {"edges": 1}}}
    )


def test_settings_that_one_recipe_would_fail_with_are_refused() -> None:
    """ASE-Net has an optimiser for each of its networks, and no argument of one in the place of theirs."""
    settings = {"train#optimizer#nesterov": False}
    check_settings(settings, describe(choose_recipes("bcp", read_recipes()), "d.json", 6, 1))
    with pytest.raises(BadInput, match=r"'train#optimizer' has no 'nesterov' \(ase_net: "):
        check_settings(settings, describe(choose_recipes("ase_net", read_recipes()), "d.json", 6, 1))


def test_the_mark_of_a_replacement_is_no_part_of_its_key() -> None:
    description = describe(choose_recipes("bcp", read_recipes()), "d.json", 6, 1)
    check_settings({"+mirror_axes": [0]}, description)
    with pytest.raises(BadInput, match="--datalist"):
        check_settings({"+datalist": "e.json"}, description)


def test_a_component_whose_parts_a_recipe_refers_to_is_not_replaced() -> None:
    """ASE-Net has two optimisers in the place of one, and its schedules name them."""
    settings = {"train#optimizer": {"_target_": "torch.optim.AdamW", "params": "$@network.parameters()"}}
    check_settings(settings, describe(choose_recipes("bcp", read_recipes()), "d.json", 6, 1))
    with pytest.raises(BadInput, match=r"no 'train#optimizer#\w+' any more.*ase_net"):
        check_settings(settings, describe(choose_recipes("bcp,ase_net", read_recipes()), "d.json", 6, 1))


def test_arguments_are_those_of_what_takes_the_place_of_a_component() -> None:
    description = describe([], "d.json", 6, 1)
    check_settings({"train#optimizer": {"_target_": "Novograd"}, "train#optimizer#grad_averaging": True}, description)
    with pytest.raises(BadInput, match=r"none of the configs has it.*Novograd takes no 'nesterov'"):
        check_settings({"train#optimizer": {"_target_": "Novograd"}, "train#optimizer#nesterov": True}, description)


@pytest.mark.parametrize("key", ["mirror_axes", "scale", "strong", "dropout"])
def test_settings_that_a_protocol_reads_nowhere_are_refused(key: str) -> None:
    recipes = choose_recipes("ua_mt", read_recipes())
    check_settings({key: 0}, describe(recipes, "d.json", 6, 1))
    with pytest.raises(BadInput, match=f"--set {key}: the protocol decides that"):
        check_settings({key: 0}, describe(recipes, "d.json", 6, 1, protocol="left_atrium"))


@pytest.mark.usefixtures("untracked")
def test_a_run_may_get_another_title(
    data: Path, calls: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(options(data, tmp_path / "out"))
    count = len(calls)
    monkeypatch.setitem(recipes_module._TITLES, "bcp", "Copy and paste")
    assert main(options(data, tmp_path / "out")) == 0
    assert len(calls) == count
    assert "| Copy and paste | 1 | 2 | 0.775 |" in (tmp_path / "out" / "compare.md").read_text()


def test_a_plan_that_is_made_is_that_of_earlier_studies(data: Path, tmp_path: Path) -> None:
    given = options(data, tmp_path / "out", "--memory", "8GB")
    given.plan = None
    assert _plan(given) == {"datalist": "datalist.json", "width": 32, "memory": "8GB"}


def test_a_plan_that_is_no_config_is_refused(data: Path, tmp_path: Path) -> None:
    given = options(data, tmp_path / "out")
    given.plan.write_text("[1, 2]")
    with pytest.raises(BadInput, match=r"plan\.json: found a list, expected the keys and values of a config"):
        _plan(given)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "12"], "run supervised"),
        (["--learning-rate", "0.5"], "run bcp"),
        (["--set", "batch_size=3"], "set"),
        (["--reference", "cps"], "'cps'"),
        (["--set", "batch_size"], "KEY=VALUE"),
        (["--learning-rate", "0.5", "--set", "learning_rate=0.1"], "--learning-rate says it already"),
        (["--datalist", "learnt.json"], "are among its `unlabeled`, too, which no training takes"),
        (["--seeds", "0,x"], "0,x"),
        (["--iterations-per-epoch", "0"], "--iterations-per-epoch 0: expected 1 or more"),
        (["--jobs", "0"], "--jobs 0"),
        (["--datalist", "none.json"], "none.json"),
        (["--upper-bound", "none.json"], "none.json"),
        (["--test-labels", "none.json"], "none.json"),
        (["--upper-bound", "other_cases.json"], "2 cases are in one of them alone"),
        (["--upper-bound", "other_labels.json"], "its `validation` is not that of"),
        (["--set", "mirror_axis=[0]"], "--set mirror_axis: none of the configs has it.*mirror_axes"),
        (["--set", "train#method#decay#of=1"], "none of the configs has it"),
        (["--set", "train#method#box=0.5"], r"Supervised takes no 'box' \(teacher, supervised: train\.json\)"),
        (["--set", "train#unlabeled_augmentation#rotation=0"], r"there is no 'train#unlabeled_augmentation' \(teacher"),
        (["--set", "postprocessing#largest_component=true"], "there is no 'postprocessing'"),
        (["--set", "validate#dataset#cache_rate=0"], r"Dataset takes no 'cache_rate' \(.*evaluate\.json"),
        (["--set", "seed=3"], "--set seed: it follows from --seeds"),
        (["--set", "train#trainer#max_epochs=3"], "it follows from --steps"),
        (["--width", "32"], "--width: it is for a plan that is made"),
        (["--max-width", "64"], "--max-width"),
        (["--memory", "8GB"], "--memory"),
        (["--test-labels", "full.json", "--upper-bound", "full.json"], "would learn them"),
        (["--test-labels", "datalist.json"], "lacks 2 of the images"),
    ],
)
@pytest.mark.usefixtures("untracked")
def test_other_settings_and_mistakes_are_refused(
    arguments: list[str], words: str, data: Path, calls: list[list[str]], tmp_path: Path
) -> None:
    main(options(data, tmp_path / "out"))
    count = len(calls)
    with pytest.raises(BadInput, match=words):
        main(options(data, tmp_path / "out", *arguments))
    assert len(calls) == count


@pytest.mark.usefixtures("untracked")
def test_a_changed_datalist_and_other_peoples_runs_are_refused(
    data: Path, calls: list[list[str]], tmp_path: Path
) -> None:
    main(options(data, tmp_path / "out"))
    content = json.loads((data / "datalist.json").read_text())
    (data / "datalist.json").write_text(json.dumps({**content, "unlabeled": content["unlabeled"][:1]}))
    with pytest.raises(BadInput, match=r"datalist\.json"):
        main(options(data, tmp_path / "out"))
    (tmp_path / "out" / "study.json").unlink()
    with pytest.raises(BadInput, match="no comparison made"):
        main(options(data, tmp_path / "out"))


def test_counts_and_scores_come_from_the_files(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(2, 3), "n.running_var": torch.zeros(9)}}, tmp_path / "model.pt")
    assert deployed_parameters(tmp_path / "model.pt") == 6
    state = {"optimizer": {"param_groups": [], "state": {0: {"momentum_buffer": None}}}}
    torch.save({"state": state}, tmp_path / "checkpoint.pt")
    assert trained_parameters(tmp_path / "checkpoint.pt") is None
    rows = ("case,dice/a,dice/b,hd95/a,failed", "x,0.5,1.0,9,", "y,,0.25,9,", "z,,,,", "v,0.5,,,", "v,,0.7,,")
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    assert case_dice(tmp_path / "metrics.csv") == {"x": 0.75, "y": 0.25, "v": pytest.approx(0.6)}


def test_slices_lie_in_the_structure_and_the_window_hides_no_prediction() -> None:
    reference, prediction = np.zeros((20, 20, 12)), np.zeros((20, 20, 12))
    reference[8:12, 8:12, 4:8] = 1
    assert _slices(reference, 2, 3) == [5, 6, 7]
    assert _slices(np.zeros((4, 4, 4)), 2, 1) == [2]
    assert _window([reference, prediction], 2) == (slice(6, 14), slice(6, 14), slice(0, 12))
    prediction[0, 9, 0] = 1
    assert _window([reference, prediction], 2) == (slice(0, 15), slice(6, 14), slice(0, 12))
