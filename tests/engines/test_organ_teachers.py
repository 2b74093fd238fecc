"""Teachers of one organ, from their weights and the record beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from common.engines.organ_teachers import load_organ_teachers, read_organ_teacher, teachers_in_order
from common.errors import BadInput, find_bad_input
from common.networks import SegmentationNetwork, save_weights, state_digest

LABELS = {"0": "background", "1": "liver", "2": "spleen"}


def write(folder: Path, name: str, width: int = 2, **settings: Any) -> str:
    network = SegmentationNetwork(2, 1, 2, [width, 4], [3, 3], [1, 2], 1)
    config = {
        "labels": LABELS,
        "organ": name,
        "network_def": {
            "_target_": "scripts.common.networks.SegmentationNetwork",
            "spatial_dims": 2,
            "in_channels": 1,
            "out_channels": "$len(@classes)",
            "features": [width, 4],
            "kernel_sizes": [3, 3],
            "strides": [1, 2],
            "convolutions_per_stage": 1,
        },
        **settings,
    }
    path = folder / name / "model.pt"
    save_weights(network, path)
    path.with_suffix(".json").write_text(json.dumps({"weights": state_digest(network.state_dict()), "config": config}))
    return str(path)


def test_teachers_come_in_the_order_of_the_classes(tmp_path: Path) -> None:
    paths = {"spleen": write(tmp_path, "spleen", width=3), "liver": write(tmp_path, "liver")}
    assert list(teachers_in_order(paths, LABELS)) == [1, 2]
    teachers = load_organ_teachers(paths, LABELS)
    assert [teacher.encoder.features[0] for teacher in teachers] == [2, 3], "each as wide as it was trained"
    for teacher, organ in zip(teachers, ("liver", "spleen"), strict=True):
        saved = torch.load(paths[organ], weights_only=True)["model"]
        assert all(torch.equal(value, saved[name]) for name, value in teacher.state_dict().items())
        assert not teacher.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert teacher(torch.zeros(1, 1, 8, 8)).shape == (1, 2, 8, 8)


def test_a_teacher_with_labels_of_its_own(tmp_path: Path) -> None:
    """A clinic that knows the spleen alone calls it 1."""
    path = write(tmp_path, "spleen", organ=None, labels={"0": "background", "1": "spleen"})
    network, settings = read_organ_teacher(path, "spleen")
    assert network(torch.zeros(1, 1, 8, 8)).shape == (1, 2, 8, 8)
    assert settings["labels"]["1"] == "spleen"


def test_a_teacher_must_have_seen_images_such_as_the_students(tmp_path: Path) -> None:
    paths = {
        "liver": write(tmp_path, "liver", spacing=[1.0, 1.0], organ=None, labels={"0": "rest", "1": "liver"}),
        "spleen": write(tmp_path, "spleen", spacing=[2.0, 1.0]),
    }
    teachers = {"_target_": "common.engines.organ_teachers.load_organ_teachers", "paths": paths, "labels": LABELS}
    parser = ConfigParser({"labels": LABELS, "spacing": [1.0, 1.0], "teachers": teachers})
    with pytest.raises(RuntimeError) as caught:
        parser.get_parsed_content("teachers")
    message = find_bad_input(caught.value)
    assert "teacher of spleen" in message
    assert "spacing: trained with [2.0, 1.0], found [1.0, 1.0]" in message
    parser = ConfigParser({"labels": LABELS, "teachers": teachers})
    assert len(parser.get_parsed_content("teachers")) == 2


@pytest.mark.parametrize("given", [None, {}, {"liver": "a"}, {"liver": "a", "spleen": "b", "heart": "c"}])
def test_one_teacher_of_each_structure(given: dict[str, str] | None) -> None:
    with pytest.raises(BadInput, match=r"teacher_paths: found .*expected one of each structure.*liver, spleen"):
        teachers_in_order(given, LABELS)


@pytest.mark.parametrize(
    ("settings", "found"),
    [({"organ": "liver"}, "liver"), ({"organ": None}, "liver, spleen")],
    ids=["of another organ", "of many"],
)
def test_a_teacher_of_something_else(settings: dict[str, Any], found: str, tmp_path: Path) -> None:
    path = write(tmp_path, "spleen", **settings)
    with pytest.raises(BadInput, match=f"trained for {found}; expected a teacher of spleen alone"):
        read_organ_teacher(path, "spleen")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_target_", "common.files.os.remove"),
        ("_target_", "os.remove"),
        ("_target_", "common.networks.weights.Path"),
        ("_target_", "common.networks.unet.torch.hub.load"),
        ("features", "$__import__('pathlib').Path('touched').touch()"),
    ],
)
def test_nothing_of_a_record_is_run_but_a_network(
    key: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(write(tmp_path, "spleen"))
    record = json.loads(path.with_suffix(".json").read_text())
    record["config"]["network_def"][key] = value
    path.with_suffix(".json").write_text(json.dumps(record))
    with pytest.raises(BadInput, match=r"model\.json: its network_def is .*expected a network of this project"):
        read_organ_teacher(path, "spleen")
    assert not (tmp_path / "touched").exists()
    assert path.exists()


def test_weights_that_nobody_describes(tmp_path: Path) -> None:
    path = write(tmp_path, "spleen")
    Path(path).with_suffix(".json").unlink()
    with pytest.raises(BadInput, match=r"teacher of spleen, .*no model\.json"):
        read_organ_teacher(path, "spleen")
    with pytest.raises(BadInput, match="no such weights file"):
        read_organ_teacher(tmp_path / "absent.pt", "spleen")
