from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from common.errors import BadInput
from common.recipes import choose_recipes, read_recipes

ROOT = Path(__file__).resolve().parents[1]
#: what the papers or their code give; weights beside a whole sum of cross-entropy and Dice, where theirs is half of it
PUBLISHED: dict[str, dict[str, Any]] = {
    "mean_teacher": {"decay": 0.99, "noise": 0.1, "consistency_weight": 0.2, "ramp_up": 1.0},
    "ua_mt": {"decay": 0.99, "noise": 0.1, "consistency_weight": 0.2, "ramp_up": 1.0, "passes": 8},
    "cps": {"consistency_weight": 0.2, "ramp_up": 1.0},
    "bcp": {"decay": 0.99, "unlabeled_weight": 0.5, "pretraining": 2 / 17},
    "knowledge_distillation": {"temperature": 2.0, "consistency_weight": 1.0, "ramp_up": 0.2},
    "aggregating_decoupling": {
        "decay": 0.99,
        "unlabeled_weight": 10.0,
        "ramp_up": 1.0,
        "sampling_steps": 10,
        "window": 50,
    },
    "ase_net": {"decay": 0.99, "consistency_weight": 1.0, "ramp_up": 1.0},
}


def config_of(name: str) -> ConfigParser:
    parser = ConfigParser()
    configs = ROOT / "bundles" / "student" / "configs"
    parser.read_config([str(configs / file) for file in ("train.json", *read_recipes()[name].overlays)])
    return parser


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_the_published_ones(name: str) -> None:
    parser = config_of(name)
    given = parser["train#method"]
    found = {
        key: parser.get_parsed_content(value.removeprefix("@")) if str(value).startswith("@") else value
        for key, value in given.items()
        if key in PUBLISHED[name]
    }
    assert found == pytest.approx(PUBLISHED[name])


@pytest.mark.parametrize(
    "name", ["mean_teacher", "ua_mt", "cps", "bcp", "ase_net", "ase_net_dybac", "aggregating_decoupling"]
)
def test_labelled_and_unlabelled_crops_are_augmented_alike(name: str) -> None:
    """Mirrored about the same axes, magnified alike: what differs is what the method learns from."""
    parser = config_of(name)
    labeled, unlabeled = (dict(parser[f"train#{part}augmentation"]) for part in ("", "unlabeled_"))
    assert labeled.pop("keys", ["image", "label"]) == ["image", "label"]
    assert unlabeled.pop("keys") == ["image"]
    assert labeled == unlabeled


def test_operations_of_aggregating_and_decoupling_are_drawn_as_often_as_published() -> None:
    augmentation = config_of("aggregating_decoupling")["train#augmentation"]
    assert (augmentation["operations"], augmentation["probability"]) == (3, 0.7)


def test_every_file_is_a_recipe_whose_overlays_exist() -> None:
    recipes = read_recipes()
    folder = ROOT / "bundles" / "student" / "configs"
    partial_labels = {"co_training", "dodnet", "ms_kd"}
    files = {path.stem for path in (folder / "recipes").glob("*.json")}
    assert set(recipes) == {"distillation", *files - partial_labels}
    assert partial_labels < files
    assert recipes["ase_net_dybac"].overlays == ("recipes/ase_net.json", "recipes/ase_net_dybac.json")
    assert [recipes[name].title for name in ("ase_net_dybac", "ase_net")] == ["ASE-Net", "ASE-Net without DyBAC"]
    assert recipes["aggregating_decoupling_without_diffusion"].title == "A&D without diffusion"
    assert {name for name, recipe in recipes.items() if recipe.needs_teacher} == {
        "distillation",
        "knowledge_distillation",
    }
    assert {name for name, recipe in recipes.items() if recipe.has_own_optimizer} == {"ase_net", "ase_net_dybac"}
    everything = [recipe.name for recipe in choose_recipes("all", recipes)]
    assert everything[0] == "distillation"
    assert {"ase_net", "ase_net_dybac"} < set(everything)
    assert not {name for name in everything if "_without_" in name}
    assert [r.name for r in choose_recipes("bcp,ase_net_dybac", recipes)] == ["distillation", "bcp", "ase_net_dybac"]
    with pytest.raises(BadInput, match="bpc"):
        choose_recipes("bpc", recipes)


def test_a_variant_is_laid_over_the_recipe_with_the_longest_name(tmp_path: Path) -> None:
    for name in ("net", "net_wide", "net_wide_again"):
        own = {"train#method": {}} if name != "net_wide_again" else {"threshold": 1}
        (tmp_path / f"{name}.json").write_text(json.dumps(own))
    assert read_recipes(tmp_path)["net_wide_again"].overlays == ("recipes/net_wide.json", "recipes/net_wide_again.json")
    (tmp_path / "stray.json").write_text("{}")
    with pytest.raises(BadInput, match="stray"):
        read_recipes(tmp_path)
