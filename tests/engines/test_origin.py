from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.engines import load_teacher, load_weights, origin, selected_on, start_from
from common.errors import BadInput
from common.networks import read_weights, save_weights, state_digest

TARGET = {"name": "thickness", "unit": "mm", "kind": "dense", "structure": 2, "scale": 2.0, "inner": [1]}
CONFIG = {
    "labels": {"0": "background", "1": "liver"},
    "channels": 1,
    "spacing": [1.0, 1.0, 2.0],
    "intensity": {"kind": "zscore"},
    "features": [4, 8],
    "patch_size": [16, 16, 16],
    "targets": [TARGET],
    "select": "last",
    "network_def": {
        "_target_": "common.networks.Net",
        "features": "@features",
        "targets": "@targets",
        "window": 4,
        "dropout": 0.1,
    },
    "learning_rate": 0.01,
}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write weights with the record of a training; the function says what the config that uses them is."""
    path = tmp_path / "model.pt"
    save_weights(nn.Linear(1, 1), path)

    def use(now: dict[str, Any], then: dict[str, Any] = CONFIG, digest: str | None = None) -> Path:
        record = {
            "weights": digest or state_digest(read_weights(path)),
            "config": origin.trained_settings(json.loads(json.dumps(then))),
        }
        path.with_suffix(".json").write_text(json.dumps(record))
        monkeypatch.setattr(origin, "running_config", lambda: json.loads(json.dumps(now)))
        return path

    return use


def test_the_same_settings_load(model) -> None:
    path = model({**CONFIG, "learning_rate": 1.0, "patch_size": [32, 32, 32]})
    network = nn.Linear(1, 1)
    load_weights(network, path)
    assert torch.equal(network.weight.cpu(), read_weights(path)["weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"orientation": "LPS"}, "orientation: trained with RAS, found LPS"),
        ({"spacing": [1.0, 1.0, 1.0]}, r"spacing: trained with \[1\.0, 1\.0, 2\.0\], found \[1\.0, 1\.0, 1\.0\]"),
        ({"labels": {"0": "background", "1": "spleen"}}, "labels: trained with .*liver.*, found .*spleen"),
        ({"intensity": {"kind": "ct"}}, "intensity: trained with"),
        ({"targets": [{**TARGET, "scale": 1.0}]}, "targets: trained with"),
        ({"network_def": {**CONFIG["network_def"], "window": 2}}, "network_def#window: trained with 4, found 2"),
        ({"network_def": {**CONFIG["network_def"], "_target_": "common.networks.Other"}}, "network_def#_target_"),
        ({"features": [8, 8]}, "network_def#features"),
    ],
)
def test_other_settings_are_named_and_nothing_is_loaded(model, change: dict, message: str) -> None:
    path = model({**CONFIG, **change})
    network = nn.Linear(1, 1)
    before = network.weight.clone()
    with pytest.raises(BadInput, match=rf"(?s)trained weights .*model\.pt.*{message}.*train that stage again"):
        load_weights(network, path)
    assert torch.equal(network.weight, before)


@pytest.mark.parametrize(
    "change",
    [
        {"targets": [{**TARGET, "inner": [1, 3]}]},
        {"network_def": {**CONFIG["network_def"], "dropout": 0.0}},
        {"network_def": {**CONFIG["network_def"], "_target_": "scripts.common.networks.Net"}},
        {"targets": None},
        {"network_def": {**CONFIG["network_def"], "window": [4, 4, 4]}},
    ],
    ids=["how a map was made", "dropout", "a packed bundle", "a stage that does not measure", "one number an axis"],
)
def test_what_does_not_change_the_meaning_of_the_weights(model, change: dict) -> None:
    load_weights(nn.Linear(1, 1), model({**CONFIG, **change}))


def test_targets_are_nothing_to_a_network_that_does_not_measure(model) -> None:
    """A plan lists them for all stages."""
    segmenting = {**CONFIG, "network_def": {"_target_": "common.networks.Net", "features": [4, 8]}}
    load_weights(nn.Linear(1, 1), model({**segmenting, "targets": []}, {**segmenting, "targets": [TARGET]}))


def test_the_next_stage_may_have_another_network_and_targets_but_no_other_data(model) -> None:
    other = {**CONFIG, "targets": [], "network_def": {"_target_": "common.networks.Dual", "features": [1]}}
    start_from(nn.Linear(1, 1), model(other), "student weights")
    assert not load_teacher(nn.Linear(1, 1), model(other)).weight.requires_grad
    path = model({**other, "channels": 2})
    for load in (
        lambda: start_from(nn.Linear(1, 1), path, "student weights"),
        lambda: load_teacher(nn.Linear(1, 1), path),
    ):
        with pytest.raises(BadInput, match="channels: trained with 1, found 2"):
            load()


def test_random_weights_are_never_locked() -> None:
    network = nn.Linear(1, 1)
    before = network.weight.clone()
    start_from(network, None, "student weights", locked=[])
    assert torch.equal(network.weight, before)
    with pytest.raises(BadInput, match=r"\['encoder'\] would keep random weights for good"):
        start_from(network, None, "student weights", locked=["encoder"])
    with pytest.raises(BadInput, match="student weights: none are given"):
        start_from(network, None, "student weights")


def test_a_record_about_other_weights_is_not_believed(model) -> None:
    load_weights(nn.Linear(1, 1), model({**CONFIG, "channels": 2}, digest="0" * 64))


@pytest.mark.parametrize("record", ["[" * 100_000, "[]", "9" * 5000, '{"weights": "DIGEST", "config": []}'])
def test_a_damaged_record_is_none(record: str, model) -> None:
    path = model(CONFIG)
    path.with_suffix(".json").write_text(record.replace("DIGEST", state_digest(read_weights(path))))
    start_from(nn.Linear(1, 1), path, "teacher weights")


def test_weights_from_elsewhere_have_no_record(model) -> None:
    path = model({**CONFIG, "channels": 2})
    path.with_suffix(".json").unlink()
    load_weights(nn.Linear(1, 1), path)


def test_cases_that_chose_the_weights_are_named(model) -> None:
    assert selected_on(model(CONFIG), "validation") is None
    path = model(CONFIG, then={**CONFIG, "select": "best"})
    assert selected_on(path, "validation") == "the validation section"
    assert selected_on(path, "testing") is None
