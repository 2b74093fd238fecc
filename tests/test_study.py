"""Studies: which commands they run, what they remember, and the tables they make."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from common import study as module
from common.errors import BadInput
from common.study import ROOT, Run, Study, config_digest, main, read_study
from common.tables import cost_table, gap_table, markdown, measured_targets, regression_table, segmentation_table

DESCRIPTION = {
    "title": "A study",
    "set": {"iterations_per_epoch": 5},
    "runs": {
        "teacher": {"bundle": "teacher", "epochs": 2, "title": "supervised"},
        "student": {"bundle": "student", "epochs": 3, "teacher": "teacher", "set": {"threshold": 0.8}},
        "geometric": {"bundle": "dual_decoder", "student": "student", "overlays": ["ablations/geometric.json"]},
    },
}
LABELS = {
    name: {"dice": {"mean": dice}, "hd95": {"mean": hd95}, "failed": 0}
    for name, dice, hd95 in (("a", 0.8, 1.0), ("b", 0.6, 3.0))
}
FIGURES = {"mae": 1.0, "rmse": 2.0, "r2": None}
SUMMARY = {
    "labels": LABELS,
    "mean_dice": 0.7,
    "targets": {"thickness": {"unit": "mm", "voxels": FIGURES, "case_means": FIGURES}},
}


def option(command: list[str], name: str) -> str:
    return command[command.index(f"--{name}") + 1]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(DESCRIPTION, tmp_path / "data", tmp_path / "out", [0, 1])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands are written down instead of run; evaluations leave a summary, the student's training fails."""
    seen: list[list[str]] = []

    def fake(command: list[str], log: Any, cores: list[int] | None) -> int:
        seen.append(command)
        if "student" in option(command, "output_dir") and option(command, "output_dir").endswith("train"):
            log.write("error: no such luck\n")
            log.flush()
            return 1
        folder = Path(option(command, "output_dir"))
        folder.mkdir(parents=True)
        if folder.name == "test":
            (folder / "summary.json").write_text(json.dumps(SUMMARY))
        return 0

    monkeypatch.setattr(module, "_call", fake)
    return seen


def test_commands_are_those_of_a_user(study: Study) -> None:
    training, evaluation = study.commands(study.runs["student"], seed=1)
    assert training[1:4] == ["-m", "monai.bundle", "run"]
    assert option(training, "train#trainer#max_epochs") == "3"
    assert option(training, "iterations_per_epoch") == "5"
    assert option(training, "threshold") == "0.8"
    assert option(training, "seed") == "1"
    assert option(training, "teacher_path") == str(study.output / "teacher" / "seed1" / "models" / "model.pt")
    assert option(training, "ckpt_dir") == option(evaluation, "ckpt_dir")
    assert "evaluate.json" in option(evaluation, "config_file")
    assert "evaluate.json" not in option(training, "config_file")


def test_a_run_of_several_teachers(tmp_path: Path) -> None:
    runs = {name: {"bundle": "teacher", "epochs": 1, "set": {"organ": name}} for name in ("liver", "spleen")}
    runs["student"] = {"bundle": "student", "epochs": 1, "teachers": {"liver": "liver", "spleen": "spleen"}}
    study = Study({"runs": runs}, tmp_path, tmp_path / "out")
    training, _ = study.commands(study.runs["student"], seed=0)
    expected = {name: str(tmp_path / "out" / name / "seed0" / "models" / "model.pt") for name in ("liver", "spleen")}
    assert json.loads(option(training, "teacher_paths")) == expected
    with pytest.raises(BadInput, match="'spleen' must be a run listed before it"):
        Study({"runs": {name: runs[name] for name in ("liver", "student")}}, tmp_path, tmp_path / "out")


def test_a_run_without_epochs_evaluates_its_parents_weights(study: Study) -> None:
    (evaluation,) = study.commands(study.runs["geometric"], seed=0)
    assert option(evaluation, "ckpt_dir") == str(study.output / "student" / "seed0" / "models")
    assert "geometric.json" in option(evaluation, "config_file")


def test_one_failure_does_not_end_the_others_and_what_is_done_is_not_done_again(
    study: Study, calls: list[list[str]]
) -> None:
    failures = study.run_all()
    assert len(failures) == 4  # of two seeds, with the run that would start from it
    assert "no such luck" in failures[0]
    assert len(study.records(study.runs["teacher"])) == 2
    assert len(study.records(study.runs["student"])) == 0
    count = len(calls)
    study.run_all(["teacher"])
    assert len(calls) == count
    study.run_all(["student"])
    assert len(calls) == count + 2


def test_what_was_done_with_another_description_is_done_again_with_all_that_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def fake(command: list[str], log: Any, cores: list[int] | None) -> int:
        folder = Path(option(command, "output_dir"))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(SUMMARY))
        if folder.name == "test":
            done.append(folder.parent.parent.name)
        return 0

    monkeypatch.setattr(module, "_call", fake)
    data = tmp_path / "data"
    data.mkdir()
    (data / "datalist.json").write_text("{}")
    description = json.loads(json.dumps({**DESCRIPTION, "plan": {"set": {"spacing": [1, 1, 1]}}}))

    def again() -> list[str]:
        done.clear()
        Study(description, data, tmp_path / "out").run_all()
        return done

    assert again() == ["teacher", "student", "geometric"]
    assert again() == []
    description["runs"]["student"]["title"] = "another name"
    assert again() == []
    description["runs"]["student"]["set"]["threshold"] = 0.9
    assert again() == ["student", "geometric"]
    description["runs"]["teacher"]["epochs"] = 4
    assert again() == ["teacher", "student", "geometric"]
    description["plan"]["set"]["spacing"] = [1, 1, 2]
    assert again() == ["teacher", "student", "geometric"]
    (data / "datalist.json").write_text('{"training": []}')
    assert again() == ["teacher", "student", "geometric"]
    (data / "datalist.json").write_text(json.dumps({"training": [{"image": str(data / "a.nii")}]}))
    assert again() == ["teacher", "student", "geometric"]
    data = data.rename(tmp_path / "moved")
    (data / "datalist.json").write_text(json.dumps({"training": [{"image": str(data / "a.nii")}]}))
    assert again() == []
    assert str(tmp_path) not in (tmp_path / "out" / "plan.json").read_text(), "a plan is packed with weights"


def test_a_plan_is_made_anew_for_a_datalist_that_was_corrected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr(module, "make_plan", lambda path: made.append(path) or {"spacing": [1, 1, len(made)]})
    datalist = tmp_path / "datalist.json"
    datalist.write_text("{}")
    study = Study({**DESCRIPTION, "plan": {"datalist": "datalist.json"}}, tmp_path, tmp_path / "out")
    for _ in range(2):
        study.write_plan()
    assert made == [datalist]
    datalist.write_text('{"training": []}')
    study.write_plan()
    assert json.loads((tmp_path / "out" / "plan.json").read_text()) == {"spacing": [1, 1, 2]}
    # One that was made before plans knew of what they were made for stays: its runs may be done.
    made_for = tmp_path / "out" / "plan_made_for.json"
    made_for.write_text(json.dumps({k: v for k, v in json.loads(made_for.read_text()).items() if k != "digest"}))
    study.write_plan()
    assert len(made) == 2


def test_an_interrupted_training_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    killed = [True]

    def fake(command: list[str], log: Any, cores: list[int] | None) -> int:
        commands.append(command)
        log.write("so far\n")
        folder = Path(option(command, "output_dir"))
        folder.mkdir(parents=True, exist_ok=True)
        if folder.name == "test":
            (folder / "summary.json").write_text(json.dumps(SUMMARY))
        elif killed[0]:
            (folder / "checkpoint.pt").write_text("")
            then = json.loads((folder.parent / "begun.json").read_text())["started"] + 50
            os.utime(folder / "checkpoint.pt", (then, then))
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(module, "_call", fake)
    (tmp_path / "datalist.json").write_text("{}")
    description = {"runs": {"teacher": {"bundle": "teacher", "epochs": 2}}}

    def execute() -> dict[str, Any]:
        study = Study(description, tmp_path, tmp_path / "out")
        try:
            study.execute(study.runs["teacher"], 0)
        except KeyboardInterrupt:
            return {}
        return study.record(study.runs["teacher"], 0)

    assert execute() == {}
    assert "--resume" not in commands[-1]
    assert execute() == {}
    assert option(commands[-1], "resume") == "true"
    killed[0] = False
    record = execute()
    assert option(commands[-2], "resume") == "true"
    assert "--resume" not in commands[-1], "an evaluation has nothing to go on with"
    assert record["train_seconds"] == pytest.approx(100, abs=20), "the parts together"
    assert (tmp_path / "out" / "teacher" / "seed0" / "log.txt").read_text().count("so far") == 4
    # With another description the checkpoint is no beginning of it.
    description["runs"]["teacher"]["epochs"] = 3
    execute()
    assert "--resume" not in commands[-2]


def test_figures_of_an_earlier_run_do_not_stand_for_one_that_failed(study: Study, calls: list[list[str]]) -> None:
    for seed in study.seeds:
        folder = study.folder(study.runs["student"], seed)
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps({"summary": SUMMARY, "train_seconds": 1}))
    failures = study.run_all()
    assert not study.records(study.runs["student"])
    assert len(failures) == 4
    assert "geometric, seed 0: not begun, since student" in failures[1]


def test_a_record_names_the_code_that_made_it(study: Study, calls: list[list[str]]) -> None:
    study.run_all()
    expected = module._commit()
    assert study.record(study.runs["teacher"], study.seeds[0])["commit"] == expected
    assert "torch" in study.record(study.runs["teacher"], study.seeds[0])["machine"]
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}\+?", expected)


def test_tables_say_where_runs_were_made_with_several_configs(study: Study, calls: list[list[str]]) -> None:
    study.run_all()
    assert study.record(study.runs["teacher"], 0)["configs"] == config_digest(ROOT / "bundles" / "teacher" / "configs")
    paths = [study.folder(study.runs["teacher"], seed) / "record.json" for seed in (0, 1)]
    first, second = (json.loads(path.read_text()) for path in paths)
    assert "versions" not in markdown(study)
    paths[1].write_text(json.dumps({**second, "configs": "others"}))
    assert "Runs of the bundle teacher were made with 2 versions of its train.json" in markdown(study)
    del first["configs"]
    paths[0].write_text(json.dumps(first))
    assert "versions" not in markdown(study), "of an earlier record's configs nothing is known"


def test_a_digest_of_configs_is_that_of_their_decisions(tmp_path: Path) -> None:
    train, evaluate = tmp_path / "train.json", tmp_path / "evaluate.json"
    train.write_text('{"decay": 0.9}')
    evaluate.write_text("{}")
    before = config_digest(tmp_path)
    train.write_text('{"_comment": "slow",\n "decay": 0.9}')
    assert config_digest(tmp_path) == before
    evaluate.write_text('{"largest_component": true}')
    assert config_digest(tmp_path) != before


def test_a_checkout_that_is_none_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert module._commit() is None


def test_tables(study: Study, calls: list[list[str]]) -> None:
    study.run_all()
    columns, rows = segmentation_table(study)
    assert [column["key"] for column in columns[:3]] == ["dice", "dice/a", "dice/b"]
    assert rows[0]["name"] == "supervised"
    assert rows[0]["dice"] == [0.7, 0.7]
    assert rows[0]["hd95"] == [2.0, 2.0]
    assert [rows[0][f"hd95/{name}"] for name in "ab"] == [[1.0, 1.0], [3.0, 3.0]]
    assert measured_targets(study) == ["thickness"]
    _, rows = regression_table(study, "thickness")
    assert rows[0]["voxels/mae"] == [1.0, 1.0]
    assert "supervised" in markdown(study)


def test_tables_tell_seeds_that_are_missing_and_rows_of_other_settings(tmp_path: Path, calls: list[list[str]]) -> None:
    description = json.loads(json.dumps(DESCRIPTION))
    study = Study(description, tmp_path / "data", tmp_path / "out", [0, 1])
    study.run_all()
    assert "0.700 ± 0.000" in markdown(study)
    assert "other settings" not in markdown(study)
    (study.folder(study.runs["teacher"], 1) / "record.json").unlink()
    text = markdown(study)
    assert "0.700 (1 of 2)" in text
    assert "1.000 (1 of 2)" in text
    description["set"]["iterations_per_epoch"] = 6
    later = Study(description, tmp_path / "data", tmp_path / "out", [0, 1])
    assert "Made with other settings than now: supervised, seed 0." in markdown(later)


@pytest.mark.parametrize("failed", [0, 1])
def test_no_distance_is_the_best_beside_a_failure(failed: int, tmp_path: Path) -> None:
    study = Study({"runs": {name: {"bundle": "teacher", "epochs": 1} for name in "ab"}}, tmp_path, tmp_path)
    for run, hd95 in zip(study.runs.values(), (2.0, 3.0), strict=True):
        label = {"dice": {"mean": hd95 / 4}, "hd95": {"mean": hd95}, "failed": failed * (run.name == "a")}
        summary = {"labels": {"wall": label}, "mean_dice": hd95 / 4, "targets": {}}
        folder = study.folder(run, 0)
        folder.mkdir(parents=True)
        record = {"train_seconds": 1, "test_seconds": 1, "summary": summary}
        (folder / "record.json").write_text(json.dumps(record))
    text = markdown(study)
    assert ("**2.00**" in text) == (not failed)
    assert "**0.750**" in text


def test_numbers_a_case_have_a_table_too(tmp_path: Path) -> None:
    study = Study({"runs": {"a": {"bundle": "dual_decoder", "epochs": 1}}}, tmp_path, tmp_path)
    targets = {"volume": {"unit": "mL", "cases": {"mae": 2.0, "rmse": 3.0, "r2": 0.5, "n": 6}}}
    folder = study.folder(study.runs["a"], 0)
    folder.mkdir(parents=True)
    record = {"train_seconds": 1, "test_seconds": 1, "summary": {"labels": {}, "targets": targets}}
    (folder / "record.json").write_text(json.dumps(record))
    assert measured_targets(study) == ["volume"]
    columns, rows = regression_table(study, "volume")
    assert [column["title"] for column in columns] == ["MAE [mL]", "RMSE [mL]", "R2"]
    assert rows == [{"name": "a", "cases/mae": [2.0], "cases/rmse": [3.0], "cases/r2": [0.5]}]
    assert "### volume" in markdown(study)


def test_what_each_run_cost(tmp_path: Path) -> None:
    runs = {"a": {"bundle": "student", "epochs": 1}, "b": {"bundle": "dual_decoder", "student": "a"}}
    study = Study({"runs": {**runs, "c": {"bundle": "teacher", "epochs": 1}}}, tmp_path, tmp_path, [0, 1])
    for name, seeds in (("a", (0, 1)), ("b", (1,))):
        for seed in seeds:
            folder = study.folder(study.runs[name], seed)
            folder.mkdir(parents=True)
            record = {"train_seconds": 60.0 * (seed + 1), "test_seconds": 5.0, "summary": {"labels": {}, "targets": {}}}
            (folder / "record.json").write_text(json.dumps(record))
    (tmp_path / "a" / "seed1" / "models").mkdir()
    weights = {"w": torch.zeros(1000, 10), "n.running_mean": torch.zeros(9)}
    torch.save({"model": weights}, tmp_path / "a" / "seed1" / "models" / "model.pt")
    _, rows = cost_table(study)
    assert rows == [
        {"name": "a", "minutes": [1.0, 2.0], "seconds": [5.0, 5.0], "parameters": 0.01},
        {"name": "b", "minutes": [2.0, None], "seconds": [5.0, None], "parameters": 0.01},
    ], "b trains nothing and deploys a's weights; c is not done"
    assert "### Cost" in markdown(study)


def test_a_network_of_one_organ_fills_its_own_column(tmp_path: Path) -> None:
    runs = {name: {"bundle": "teacher", "epochs": 1} for name in ("a", "b", "both")}
    study = Study({"runs": runs}, tmp_path, tmp_path)
    for run in study.runs.values():
        labels = LABELS if run.name == "both" else {run.name: LABELS[run.name]}
        summary = {"labels": labels, "mean_dice": 0.7, "targets": {}}
        folder = study.folder(run, 0)
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps({"train_seconds": 1, "test_seconds": 1, "summary": summary}))
    columns, rows = segmentation_table(study)
    assert [column["key"] for column in columns[:3]] == ["dice", "dice/a", "dice/b"]
    assert [sorted(key for key in row if key.startswith(("dice", "hd95"))) for row in rows] == [
        ["dice/a", "hd95/a"],
        ["dice/b", "hd95/b"],
        ["dice", "dice/a", "dice/b", "hd95", "hd95/a", "hd95/b"],
    ]


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ({"a": {"bundle": "professor"}}, "professor"),
        ({"a": {"bundle": "student", "teacher": "b"}}, "'b'"),
        ({"a": {"bundle": "student", "epoch": 3}}, "epoch"),
        ({"a": {"bundle": "teacher"}}, "0 epochs"),
    ],
)
def test_a_study_that_makes_no_sense(runs: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        Study({"runs": runs}, tmp_path, tmp_path)


def test_main_says_what_failed(tmp_path: Path, calls: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study.json"
    path.write_text(json.dumps(DESCRIPTION))
    (tmp_path / "data").mkdir()
    options = argparse.Namespace(
        study=path, data=tmp_path / "data", output=tmp_path / "out", seeds="0", device=None, only=None, jobs=1
    )
    assert main(options) == 1
    assert "no such luck" in capsys.readouterr().err
    assert "supervised" in (tmp_path / "out" / "results.md").read_text()
    options.seeds = "0;1"
    with pytest.raises(BadInput, match="--seeds '0;1'"):
        main(options)
    options.seeds = "0"
    options.only = "professor"
    with pytest.raises(BadInput, match="professor"):
        main(options)
    with pytest.raises(BadInput, match=r"absent\.json"):
        read_study(tmp_path / "absent.json")


def test_share_of_the_gap_is_that_of_the_means(tmp_path: Path) -> None:
    runs = {name: {"bundle": "teacher", "epochs": 1} for name in ("few", "method", "all")}
    study = Study(
        {"runs": runs, "gaps": [{"few": "few", "method": "method", "all": "all"}]}, tmp_path, tmp_path, [0, 1]
    )
    for name, dice in (("few", (0.70, 0.74)), ("method", (0.78, 0.80)), ("all", (0.82, 0.82))):
        for seed, value in enumerate(dice):
            folder = study.folder(study.runs[name], seed)
            folder.mkdir(parents=True)
            record = {
                "train_seconds": 1,
                "test_seconds": 1,
                "summary": {"mean_dice": value, "labels": {}, "targets": {}},
            }
            (folder / "record.json").write_text(json.dumps(record))
    _, (row,) = gap_table(study)
    assert row["gap"] == pytest.approx(0.10)
    assert row["gain"] == pytest.approx([0.08, 0.06])
    assert row["share"] == pytest.approx(0.7)
    assert "share closed" in markdown(study)


def test_gaps_name_runs_of_the_study(tmp_path: Path) -> None:
    gap = {"few": "teacher", "method": "student", "all": "everything"}
    with pytest.raises(BadInput, match="everything"):
        Study({**DESCRIPTION, "gaps": [gap]}, tmp_path, tmp_path)


def test_runs_side_by_side_wait_for_their_parents(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    together, most, finished = set(), [], []
    lock = threading.Lock()

    def execute(run: Any, seed: int, cores: list[int] | None) -> None:
        with lock:
            assert run.teacher is None or (run.teacher, seed) in finished
            assert run.student is None or (run.student, seed) in finished
            together.add((run.name, seed))
            most.append(len(together))
        time.sleep(0.02)
        with lock:
            together.remove((run.name, seed))
            finished.append((run.name, seed))

    monkeypatch.setattr(study, "execute", execute)
    assert study.run_all(jobs=2) == []
    assert len(finished) == 6
    assert max(most) == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are divided on Linux only")
def test_a_run_keeps_to_its_cores(tmp_path: Path) -> None:
    core = sorted(os.sched_getaffinity(0))[0]
    code = "import os, time; time.sleep(0.2); print(os.sched_getaffinity(0), os.environ['OMP_NUM_THREADS'])"
    with open(tmp_path / "log.txt", "w") as log:
        assert module._call([sys.executable, "-c", code], log, [core]) == 0
    assert (tmp_path / "log.txt").read_text().strip() == f"{{{core}}} 1"


LONG_STUDY = """
import sys
from pathlib import Path
from common.study import Study
from common import study
output = Path(sys.argv[1])
code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(300)"
Study.commands = lambda self, run, seed: [[sys.executable, "-c", code, str(output / f"{seed}.txt")]] * 2
description = {"runs": {"teacher": {"bundle": "teacher", "epochs": 1}}}
Study(description, output, output, [0, 1]).run_all(jobs=2)
"""


def test_trainings_end_with_the_study_that_is_told_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LONG_STUDY, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    files = [tmp_path / "0.txt", tmp_path / "1.txt"]
    while not all(file.exists() and file.read_text() for file in files):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + 15
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_an_error_that_nobody_expected_does_not_end_the_others(
    study: Study, calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = study.commands

    def fail(run: Run, seed: int) -> list[list[str]]:
        if seed == 0:
            raise KeyError("odd")
        return commands(run, seed)

    monkeypatch.setattr(study, "commands", fail)
    failures = study.run_all(["teacher"])
    assert failures == ["run teacher, seed 0: KeyError('odd')"]
    assert "Traceback" in capsys.readouterr().err
    assert list(study.records_by_seed(study.runs["teacher"])) == [1]


def test_what_is_not_known_of_an_interrupted_training_begins_it_anew(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "checkpoint.pt").touch()
    for text in ("{}", "[]", '{"identity": "a"}', '{"identity": "a", "started": null, "seconds": 1}', "half"):
        (tmp_path / "begun.json").write_text(text)
        assert Study._begun_before(tmp_path, "a") is None
    (tmp_path / "begun.json").write_text('{"identity": "a", "started": 0, "seconds": 1}')
    assert Study._begun_before(tmp_path, "a") is not None


def test_a_regression_table_says_what_intervals_hold(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    target = {**SUMMARY["targets"]["thickness"], "interval": {"raw": 0.7, "calibrated": None, "factor": 2.0, "n": 9}}
    monkeypatch.setattr(study, "records", lambda run: [{"summary": {"targets": {"thickness": target}}}])
    columns, rows = regression_table(study, "thickness")
    assert [column["title"] for column in columns[-2:]] == ["in 90 %, raw", "in 90 %, calibrated"]
    assert rows[0]["interval/raw"] == [0.7, None], "of the second seed nothing is known"
    assert math.isnan(rows[0]["interval/calibrated"][0])
