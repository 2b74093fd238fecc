"""The student's recipes: what each changes of its bundle's config, and what a published protocol changes of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BadInput
from .study import ROOT

__all__ = ["OWN", "Recipe", "choose_recipes", "protocol_overlays", "read_recipes"]

#: the bundle's own method, which has no overlay
OWN = "distillation"
_CONFIGS = ROOT / "bundles" / "student" / "configs"
_TITLES = {
    OWN: "Distillation (own)",
    "aggregating_decoupling": "A&D",
    "ase_net": "ASE-Net without DyBAC",
    "ase_net_dybac": "ASE-Net",
    "bcp": "BCP",
    "cps": "CPS",
    "knowledge_distillation": "Knowledge distillation",
    "mean_teacher": "Mean Teacher",
    "ua_mt": "UA-MT",
}


@dataclass(frozen=True)
class Recipe:
    """A method of the student's bundle.

    Args:
        name: of its file, and of its runs.
        overlays: the files, in their order; none for the bundle's own method.
        content: their keys.
    """

    name: str
    overlays: tuple[str, ...] = ()
    content: Mapping[str, Any] | None = None

    @property
    def title(self) -> str:
        """Its name in tables; a variant's begins with that of its recipe."""
        base = max((name for name in _TITLES if self.name.startswith(name)), key=len, default="")
        return (_TITLES.get(base, "") + self.name.removeprefix(base).replace("_", " ")).strip()

    @property
    def is_ablation(self) -> bool:
        """Whether it is another recipe without one of its parts."""
        return "_without_" in self.name

    @property
    def needs_teacher(self) -> bool:
        """Whether it starts from a trained teacher, whose steps then count as its own."""
        return "teacher_path" not in (self.content or {})

    @property
    def has_own_optimizer(self) -> bool:
        """Whether it names its optimiser, and with it the learning rate."""
        return any(key.startswith("train#optimizer") for key in self.content or {})

    @property
    def has_own_views(self) -> bool:
        """Whether it says how unlabelled crops are augmented."""
        return "train#unlabeled_augmentation" in (self.content or {})


def read_recipes(folder: Path = _CONFIGS / "recipes") -> dict[str, Recipe]:
    """The own method and every recipe of a folder, by name.

    A file that names no ``train#method`` is a variant of the recipe by whose name its own begins, and is laid over it.
    Recipes that read no unlabelled image, those for partial labels, are left out: they are no rows of this comparison.
    """
    contents = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    recipes = {OWN: Recipe(OWN)}
    for name, content in contents.items():
        if content.get("train#dataloader#streams#unlabeled", True) is None:
            continue
        names = [name]
        if "train#method" not in content:
            bases = [base for base in contents if "train#method" in contents[base] and name.startswith(f"{base}_")]
            if not bases:
                raise BadInput(f"recipe {folder / name}.json: it names no `train#method`, nor whose variant it is.")
            names.insert(0, max(bases, key=len))
        merged = {key: value for part in names for key, value in contents[part].items()}
        recipes[name] = Recipe(name, tuple(f"recipes/{part}.json" for part in names), merged)
    return recipes


def choose_recipes(names: str, recipes: Mapping[str, Recipe]) -> list[Recipe]:
    """The recipes of a comma-separated list, the own method first; ``all`` stands for those that are no ablations."""
    chosen = {OWN: recipes[OWN]}
    for name in (name.strip() for name in names.split(",")):
        if name == "all":
            chosen.update({key: recipe for key, recipe in recipes.items() if not recipe.is_ablation})
        elif name in recipes:
            chosen[name] = recipes[name]
        elif name:
            raise BadInput(f"--recipes: there is no recipe {name!r}; choose from all, {', '.join(recipes)}.")
    return list(chosen.values())


def protocol_overlays(name: str | None, bundle: str, recipe: Recipe | None = None) -> tuple[str, ...]:
    """The overlays of a published protocol.

    Beside the protocol itself, as far as there is such a file: its views, but for a method whose labelled crops' views
    are part of it; a strong view, for one that names none; and what it says of the recipe.
    """
    if name is None:
        return ()
    overlays = [f"protocols/{name}.json"]
    protocol = ROOT / "bundles" / bundle / "configs" / overlays[0]
    if not protocol.is_file():
        raise BadInput(f"--protocol: the bundle {bundle!r} has no configs/{overlays[0]}.")
    if recipe is not None:
        own = dict(recipe.content or {})
        its_network = _CONFIGS / "protocols" / f"{name}_{recipe.name}.json"
        both = "network_def#_target_" in own and "network_def" in json.loads(protocol.read_text())
        if both and not its_network.is_file():
            raise BadInput(
                f"--protocol {name}: it has a network of its own, and so has the recipe {recipe.name!r}. Write one "
                f"that is both, and name it as `network_def#_target_` in {its_network}."
            )
        wanted = [] if "train#augmentation" in own else ["views"]
        wanted += [] if recipe.has_own_views else ["strong_view"]
        wanted += [Path(overlay).stem for overlay in recipe.overlays]
        files = [f"protocols/{name}_{part}.json" for part in wanted]
        overlays += [file for file in files if (_CONFIGS / file).is_file()]
    return tuple(overlays)
