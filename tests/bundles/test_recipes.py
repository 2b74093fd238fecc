"""The published systems as recipes: each one's overlay on the student's own config."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import PLAN, ROOT, SHORT, config, recipe_files, run, write_organ_teachers
from monai.bundle import ConfigParser

from common.data import collate_plain
from common.engines import SemiSupervisedTrainer
from common.networks import SegmentationNetwork, save_weights

RECIPES = sorted(path.stem for path in (ROOT / "bundles/student/configs/recipes").glob("*.json"))
#: the method's class, for those whose name is not the file's in camel case
METHODS = {
    "ase_net": "ASENet",
    "bcp": "BidirectionalCopyPaste",
    "cps": "CrossPseudoSupervision",
    "dodnet": "DoDNet",
    "ms_kd": "MultiTeacherDistillation",
    "ua_mt": "UncertaintyAwareMeanTeacher",
}


def parsed(*files: str, **settings: Any) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([config("student", "train.json"), *files])
    parser.update(settings)
    return parser


def strings(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        for item in content:
            yield from strings(item)
    elif isinstance(content, str):
        yield content


def is_used(parser: ConfigParser, key: str) -> bool:
    return any(re.search(rf"@{re.escape(key)}(?!\w)", text) for text in strings(parser.get()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_is_one_of_the_config_or_used(recipe: str) -> None:
    """A key that nothing reads would be set without effect."""
    *below, own = recipe_files(recipe)
    before, after = parsed(*below), parsed(*below, own)
    for key in json.loads(Path(own).read_text()):
        if key.startswith("_"):
            continue
        section = key.rpartition("#")[0]
        known = key in before or is_used(after, key)
        # A new argument of a component: that the component takes it is seen when it is made.
        assert known or (section and "_target_" in before[section]), key


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_trains_what_the_recipe_says(recipe: str, tmp_path: Path, plan: Path) -> None:
    """With the crops that the recipe's own augmentation gives, and the optimiser it names."""
    torch.manual_seed(0)
    parser = parsed(str(plan), *recipe_files(recipe), device="cpu", amp=False)
    if parser["teacher_path"] is not None:
        parser["teacher_path"] = str(tmp_path / "teacher.pt")
        save_weights(parser.get_parsed_content("teacher_def"), tmp_path / "teacher.pt")
    if recipe == "ms_kd":
        parser["teacher_paths"] = write_organ_teachers(tmp_path, parser["labels"])
    method = parser.get_parsed_content("train#method")
    name = recipe.split("_without_")[0].removesuffix("_dybac")
    assert type(method).__name__ == METHODS.get(name, name.replace("_", " ").title().replace(" ", ""))

    crops = [torch.randn(1, *PLAN["patch_size"]) for _ in range(4)]
    streams = {
        "labeled": [{"image": crop, "label": (crop > 0).long() + (crop > 1)} for crop in crops[:2]],
        "unlabeled": [{"image": crop} for crop in crops[2:]],
    }
    views = {"labeled": "train#augmentation", "unlabeled": "train#unlabeled_augmentation"}
    batch = {
        stream: collate_plain([parser.get_parsed_content(views[stream])(case) for case in cases])
        for stream, cases in streams.items()
    }
    optimizer = parser.get_parsed_content("train#optimizer")
    groups = optimizer.values() if isinstance(optimizer, dict) else [optimizer]
    trained = {id(parameter) for o in groups for group in o.param_groups for parameter in group["params"]}
    start = {key: value.clone() for key, value in method.named_parameters()}
    parser.get_parsed_content("train#lr_scheduler")
    # The last step of three of which the others were done, so that no part waits for a ramp-up.
    trainer = SemiSupervisedTrainer("cpu", 3, [batch], method, optimizer, False, parser["gradient_clip"])
    trainer.state.epoch = trainer.state.iteration = 2
    trainer.run()
    assert (method.step, method.total_steps) == (2, 3)
    assert all(math.isfinite(value) for key, value in trainer.state.output.items() if "kept/" not in key)

    moved = {key for key, value in method.named_parameters() if not torch.equal(value, start[key])}
    assert any(key.startswith("network.") for key in moved)
    by_average = {key for key in moved if key.split(".")[0] in ("average", "second_average")}
    for key, parameter in method.named_parameters():
        assert key not in moved - by_average or id(parameter) in trained, key
    own = {id(parameter) for parameter in method.trainable_parameters()}
    assert trained == own, "every weight that can learn is in an optimiser"
    parser.get_parsed_content("network_def").load_state_dict(method.deployed.state_dict())


@pytest.mark.parametrize(
    ("recipe", "settings", "parent"),
    [
        ("mean_teacher", {}, None),
        ("mean_teacher", {"start_from_teacher": True}, "given"),
        ("knowledge_distillation", {}, "given"),
        (None, {}, "given"),
        (None, {"start_from_teacher": False}, "given"),
    ],
)
def test_a_teacher_is_a_parent_where_something_came_from_it(
    recipe: str | None, settings: dict[str, Any], parent: str | None, tmp_path: Path, plan: Path
) -> None:
    path = str(tmp_path / "teacher.pt")
    parser = parsed(str(plan), *(recipe_files(recipe) if recipe else []), device="cpu", teacher_path=path, **settings)
    save_weights(parser.get_parsed_content("teacher_def"), path)
    index = next(i for i, h in enumerate(parser["train#handlers"]) if h["_target_"] == "common.handlers.Tracking")
    parents = parser.get_parsed_content(f"train#handlers#{index}#parents")
    assert parents == {"teacher": path if parent else None}


def test_a_recipe_without_a_teacher_trains_and_is_evaluated(
    phantoms: Path, plan: Path, workflow: Callable[..., None], tmp_path: Path
) -> None:
    """On the command line, with a teacher's path that it has no use for."""
    save_weights(SegmentationNetwork(3, 1, 3, [4, 8], [3, 3], [1, 2]), tmp_path / "teacher.pt")
    folders = {"output_dir": str(tmp_path / "train"), "ckpt_dir": str(tmp_path / "models")}
    recipe = config("student", "recipes/mean_teacher.json")
    done = run(
        [config("student", "train.json"), recipe, str(plan)],
        {
            **SHORT,
            **folders,
            "dataset_dir": str(phantoms),
            "teacher_path": str(tmp_path / "teacher.pt"),
            "train#trainer#max_epochs": 1,
        },
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    record = json.loads((tmp_path / "models" / "model.json").read_text())
    assert record["parents"] == {}
    assert (tmp_path / "train" / "curves.png").is_file()

    names = ("train.json", "evaluate.json")
    measured = {**folders, "output_dir": str(tmp_path / "evaluated")}
    workflow("student", recipe, names=names, dataset_dir=str(phantoms), **measured)
    assert json.loads((tmp_path / "evaluated" / "summary.json").read_text())["cases"] == 2


@pytest.mark.parametrize("setting", ["adaptation", "generalisation"])
def test_domains_are_a_matter_of_the_datalist(
    setting: str, phantoms: Path, workflow: Callable[..., None], tmp_path: Path
) -> None:
    """A&D's labelled source, and a target that is unlabelled, or that no training ever sees."""
    content = json.loads((phantoms / "datalist.json").read_text())
    source, target = content["validation"]  # generate_phantoms: validation cases come from both domains in turn
    for entry in (*content["training"], *content["unlabeled"], source, target):
        for key in ("image", "label"):
            if key in entry:
                entry[key] = str(phantoms / entry[key])
    unlabeled = content["unlabeled"] if setting == "adaptation" else [{"image": source["image"]}]
    sections = {"training": content["training"], "unlabeled": unlabeled, "testing": [target]}
    assert "label" not in {key for entry in unlabeled for key in entry}
    datalist = tmp_path / f"{setting}.json"
    datalist.write_text(json.dumps({"labels": content["labels"], **sections}))
    folders = {"output_dir": str(tmp_path / "train"), "ckpt_dir": str(tmp_path / "models")}
    recipe = config("student", "recipes/aggregating_decoupling.json")
    short = {"train#trainer#max_epochs": 1, "datalist": str(datalist)}
    workflow("student", recipe, **short, **folders)
    measured = {**folders, "output_dir": str(tmp_path / "test"), "section": "testing"}
    workflow("student", recipe, names=("train.json", "evaluate.json"), **short, **measured)
    lines = (tmp_path / "test" / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [Path(target["image"]).name.removesuffix(".nii.gz")]
