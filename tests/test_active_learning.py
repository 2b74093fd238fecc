"""The study of which image to label next: its rounds, and what it makes of them. The trainings are stood in for."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import PLAN
from monai.bundle import ConfigParser

from common.data.phantom_set import generate_phantoms
from common.study import ROOT, Run, Study

CASES = [f"case{index:02d}" for index in range(12)]
#: of a case; higher is asked for first
ENTROPY = {name: (7 * index) % 12 for index, name in enumerate(CASES)}


@pytest.fixture
def study() -> Any:
    specification = importlib.util.spec_from_file_location("active_learning", ROOT / "studies" / "active_learning.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def trained(study: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Runs that were trained: strategy's folder, run and labels; Dice is the number of labels, more for a student."""
    done: list[tuple[str, str, int]] = []

    def execute(self: Study, run: Run, seed: int) -> None:
        if self.record(run, seed):
            return
        cases = json.loads(Path(run.datalist).read_text())
        assert len(cases["training"]) + len(cases["unlabeled"]) == len(CASES)
        assert all(set(case) == {"image"} for case in cases["unlabeled"])
        done.append((self.output.parent.name, run.name, len(cases["training"])))
        dice = len(cases["training"]) / 100 + (0.005 if run.name == "student" else 0) + seed / 500
        folder = self.folder(run, seed)
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps({"summary": {"mean_dice": dice}}))

    monkeypatch.setattr(Study, "execute", execute)
    monkeypatch.setattr(Study, "write_plan", lambda self: [])
    named = study.case_name
    monkeypatch.setattr(
        study.Campaign, "_scores", lambda self, of, cases: {named(case): ENTROPY[named(case)] for case in cases}
    )
    return done


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    data = tmp_path / "data"
    data.mkdir()
    training = [{"image": f"{name}.nii", "label": f"{name}_label.nii"} for name in CASES]
    for path in (path for case in training for path in case.values()):
        (data / path).touch()
    content = {"labels": {"0": "background", "1": "organ"}, "training": training, "validation": training[:1]}
    (data / "datalist_full.json").write_text(json.dumps(content))
    output = tmp_path / "output"
    output.mkdir()
    (output / "plan.json").write_text("{}")
    return ["--data", str(data), "--output", str(output), "--step", "3", "--rounds", "3"]


def test_strategies_begin_alike_and_choose_apart(study, trained, options, capsys):
    assert study.main([*options, "--seeds", "0,1", "--strategies", "random,entropy"]) == 0
    # The first round is that of both; nothing is trained twice.
    assert len(trained) == len(set(trained)) * 2 == 2 * 3 * (1 + 2 * 2)
    assert {labels for _, _, labels in trained} == {3, 6, 9}
    results = json.loads((Path(options[3]) / "results.json").read_text())
    for seed in ("0", "1"):
        chance, entropy = (results[strategy][seed] for strategy in ("random", "entropy"))
        assert chance[0]["cases"] == entropy[0]["cases"]
        rest = [name for name in CASES if name not in entropy[0]["cases"]]
        assert entropy[1]["cases"][3:] == sorted(rest, key=lambda name: -ENTROPY[name])[:3]
        assert chance[1]["cases"][3:] != entropy[1]["cases"][3:]
        assert [len(entry["cases"]) for entry in entropy] == [3, 6, 9]
    assert results["random"]["0"][0]["cases"] != results["random"]["1"][0]["cases"]
    text = capsys.readouterr().out
    assert "| random | supervised only | 0.031 ± 0.001 | 0.061 ± 0.001 | 0.091 ± 0.001 |" in text
    assert "| entropy | with unlabelled images | 0.036 ± 0.001 | 0.066 ± 0.001 | 0.096 ± 0.001 |" in text
    assert (Path(options[3]) / "results.md").read_text() in text
    assert (Path(options[3]) / "results.png").stat().st_size > 10_000


def test_what_is_done_is_not_done_again(study, trained, options):
    study.main([*options, "--strategies", "random"])
    before = list(trained)
    study.main([*options, "--strategies", "random,entropy"])
    assert {folder for folder, _, _ in trained[len(before) :]} == {"entropy"}


@pytest.mark.parametrize("strategy", ["entropy", "disagreement"])
def test_scores_are_those_of_the_weights_at_hand(study, tmp_path, monkeypatch, strategy):
    generate_phantoms(
        tmp_path / "data", labeled=2, unlabeled=0, validation=1, shape=(24, 24, 20), seed=1, progress=False
    )
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "plan.json").write_text(json.dumps(PLAN))
    options = argparse.Namespace(
        data=tmp_path / "data", datalist="datalist.json", output=tmp_path / "output", step=1, epochs=1, device="cpu"
    )
    campaign = study.Campaign(options, strategy, 0)
    of = campaign._study(campaign.pool[:1], 0)

    def write(stage: str, seed: int) -> None:
        torch.manual_seed(seed)
        parser = ConfigParser()
        configs = ROOT / "bundles" / stage / "configs" / "inference.json"
        parser.read_config([str(configs), str(tmp_path / "output" / "plan.json")])
        path = of.model(stage, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": parser.get_parsed_content("network_def").state_dict()}, path)

    write("teacher", 0)
    write("student", 0)
    first = campaign._scores(of, campaign.pool)
    assert set(first) == {study.case_name(case) for case in campaign.pool}
    # Of one network twice there is nothing to disagree about, and it is as uncertain as anybody with random weights.
    assert all(score > 0 if strategy == "entropy" else score == pytest.approx(0, abs=1e-6) for score in first.values())
    write("student", 1)
    second = campaign._scores(of, campaign.pool)
    assert all(second[name] != first[name] for name in first)
    assert all(score > 1e-4 for score in second.values())
    monkeypatch.setattr(study, "hand_over", lambda *given: pytest.fail("scored again"))
    assert campaign._scores(of, campaign.pool) == second


def test_an_unknown_strategy_is_refused(study, options):
    with pytest.raises(study.BadInput, match=r"--strategies: found \['loudness'\]"):
        study.main([*options, "--strategies", "loudness"])
