"""Comparison of the student's recipes: the same data, network, steps and evaluation, and a table as in the papers.

Supervised on the labelled cases, the project's own method and each recipe of ``bundles/student/configs/recipes`` become
one study (see :mod:`common.study`), so what is done already is not done again::

    python -m common compare --recipes all --data DATA/hippocampus --datalist datalist_4.json --seeds 0,1,2 \\
        --steps 900 --output OUTPUT

OUTPUT then holds ``compare.md``, ``compare.json`` and ``compare.png``, which :mod:`common.comparison` makes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from inspect import Parameter, signature
from pathlib import Path
from pydoc import locate
from typing import Any

from monai.bundle import ComponentLocator, ConfigParser

from .comparison import Comparison
from .data.checks import in_both, patient_key
from .data.datalist import SECTIONS, case_name, first_path, load_section, read_datalist
from .errors import BadInput
from .files import write_atomically
from .provenance import file_digest
from .recipes import OWN, Recipe, choose_recipes, protocol_overlays, read_recipes
from .study import ROOT, Study, read_seeds

__all__ = [
    "add_arguments",
    "check_earlier",
    "check_settings",
    "check_upper_bound",
    "describe",
    "main",
    "with_test_labels",
]

SUPERVISED, TEACHER, UPPER_BOUND = "supervised", "teacher", "supervised_all"
_WIDTH = 32
#: epochs from one validation to the next where they choose the weights, as the bundles have it
_INTERVAL = 5
#: keys of the configs that follow from options, and so can't be set beside them
_OF_OPTIONS = {
    "dataset_dir": "--data",
    "datalist": "--datalist",
    "seed": "--seeds",
    "device": "--device",
    "output_dir": "--output",
    "ckpt_dir": "--output",
    "teacher_path": "--output",
    "iterations_per_epoch": "--iterations-per-epoch",
    "train#trainer#max_epochs": "--steps",
}


def describe(
    recipes: Sequence[Recipe],
    datalist: str,
    steps: int,
    iterations_per_epoch: int = 50,
    upper_bound: str | None = None,
    optimizer: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = None,
    protocol: str | None = None,
    title: str | None = None,
) -> dict[str, Any]:
    """The comparison as a study's description.

    Args:
        recipes: the rows beside the supervised one.
        datalist: file name in the data folder.
        steps: of every row in all; one that starts from a teacher takes two thirds of them after the teacher's third.
        iterations_per_epoch: the steps must be a multiple of it.
        upper_bound: datalist with all labels, for one more supervised row.
        optimizer: ``learning_rate`` and ``momentum`` of the runs whose recipe names no optimiser of its own.
        settings: overrides of every run.
        plan: what the study plans, see :class:`~common.study.Study`; None for the bundles' own configuration.
        protocol: name of overlays in the bundles' ``configs/protocols``.
        title: what the datalist is called.

    Raises:
        BadInput: steps that can't be divided, or an unknown protocol.
    """
    if iterations_per_epoch < 1:
        raise BadInput(f"--iterations-per-epoch {iterations_per_epoch}: expected 1 or more.")
    epochs = steps // iterations_per_epoch
    if steps < 1 or steps % iterations_per_epoch:
        raise BadInput(f"--steps {steps}: expected a multiple of --iterations-per-epoch {iterations_per_epoch}.")
    first = max(1, round(epochs / 3))
    optimizer, settings = dict(optimizer or {}), dict(settings or {})
    # Where validation chooses the weights it needs something to choose from; where it does not, one at the end will do.
    interval = _INTERVAL if settings.get("select") == "best" else epochs

    def supervised(datalist: str, epochs: int, title: str) -> dict[str, Any]:
        overlays = list(protocol_overlays(protocol, "teacher"))
        return {
            "bundle": "teacher",
            "datalist": datalist,
            "epochs": epochs,
            "title": title,
            "overlays": overlays,
            "set": optimizer,
        }

    runs: dict[str, Any] = {}
    if any(recipe.needs_teacher for recipe in recipes):
        if epochs < 2:
            raise BadInput(f"--steps {steps}: a teacher and its student need an epoch each of {iterations_per_epoch}.")
        runs[TEACHER] = supervised(datalist, first, "teacher, first third of the steps")
    runs[SUPERVISED] = supervised(datalist, epochs, "Supervised")
    for recipe in recipes:
        runs[recipe.name] = {
            "bundle": "student",
            "datalist": datalist,
            "epochs": epochs - first if recipe.needs_teacher else epochs,
            "title": recipe.title,
            "overlays": [*recipe.overlays, *protocol_overlays(protocol, "student", recipe)],
            "set": {} if recipe.has_own_optimizer else optimizer,
            **({"teacher": TEACHER} if recipe.needs_teacher else {}),
        }
    if upper_bound is not None:
        runs[UPPER_BOUND] = supervised(upper_bound, epochs, "Supervised, all labels")
    return {
        "title": f"Comparison on {title or datalist}, {steps} steps",
        **({"protocol": protocol} if protocol is not None else {}),
        **({"plan": dict(plan)} if plan is not None else {}),
        "set": {"iterations_per_epoch": iterations_per_epoch, "val_interval": interval, **settings},
        "evaluate": {"postprocessing#output_dir": "$@output_dir + '/predictions'"},
        "runs": runs,
    }


def with_test_labels(datalist: Path, labels_from: Path) -> dict[str, Any]:
    """A datalist whose ``testing`` cases are its unlabelled images, with the labels that another one gives them.

    A transductive protocol: what is tested on was learnt from, without labels. Benchmarks without test cases of their
    own leave nothing else.

    Args:
        datalist: with ``training`` and ``unlabeled``.
        labels_from: lists the same images with labels, in its ``training``.

    Raises:
        BadInput: an unlabelled image that ``labels_from`` has no label for.
    """
    content = read_datalist(datalist)
    sections = {name: load_section(content, name) for name in ("training", "unlabeled")}
    labelled = {first_path(entry["image"]): entry for entry in load_section(labels_from, "training")}
    missing = [case_name(entry) for entry in sections["unlabeled"] if first_path(entry["image"]) not in labelled]
    if missing:
        raise BadInput(
            f"--test-labels {labels_from}: its `training` lacks {len(missing)} of the images that {datalist} lists as "
            f"`unlabeled`, such as {missing[0]}."
        )
    testing = [labelled[first_path(entry["image"])] for entry in sections["unlabeled"]]
    kept = {key: value for key, value in content.items() if key not in ("folder", "path", *SECTIONS)}
    return {**kept, **sections, "testing": testing}


def check_earlier(description: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Compare a description with that of the runs that ``output`` has, and return both in one.

    Raises:
        BadInput: runs that are done were made with other settings, and would be shown as if made with these.
    """
    description = dict(json.loads(json.dumps(description)))
    done = {path.parent.parent.name for path in output.glob("*/seed*/record.json")}
    path = output / "study.json"
    if not done:
        return description
    if not path.exists():
        raise BadInput(f"--output {output}: it holds runs that no comparison made. Choose another folder.")
    earlier = json.loads(path.read_text())
    apart = [key for key in ("plan", "set", "evaluate") if earlier.get(key) != description.get(key)]
    files = {**earlier["data"], **description["data"]}
    apart += [name for name, digest in earlier["data"].items() if digest != files[name]]
    both = {name: run for name, run in earlier["runs"].items() if name in description["runs"]}
    apart += [f"run {name}" for name in both if name in done and not _alike(both[name], description["runs"][name])]
    if apart:
        raise BadInput(
            f"--output {output}: it holds runs with other settings than now asked for ({', '.join(apart)}; see "
            f"{path}). Choose another folder, or give the same options."
        )
    return {**description, "data": files, "runs": {**earlier["runs"], **description["runs"]}}


def _alike(run: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions of a run ask for the same; what it is called in a table is no setting."""
    return {**run, "title": None} == {**other, "title": None}


def check_settings(settings: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Refuse overrides that no run would notice, that some would fail with, or that contradict the options.

    A comparison that fails at its first evaluation has lost all its trainings, so both of a run's configs are asked:
    that of its training, and that with ``evaluate.json`` over it.

    Args:
        settings: values by key.
        description: of the study, as :func:`describe` gives it.

    Raises:
        BadInput: a key that none of the runs' configs has, or that none reads under the protocol; one inside of
            something that some rows' configs lack, or an argument that some rows' component does not take; or one that
            follows from an option.
    """
    settings = {key.removeprefix("+"): value for key, value in settings.items()}  # MONAI's mark for a replacement
    for key in settings:
        if key in _OF_OPTIONS:
            raise BadInput(f"--set {key}: it follows from {_OF_OPTIONS[key]}. Give that instead.")
    plan = (description.get("plan") or {}).get("set", {})
    kinds: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, run in description["runs"].items():
        kinds.setdefault((run["bundle"], tuple(run["overlays"])), []).append(name)
    known, keys, read = set(plan), set(plan), set(plan)
    problems: dict[str, str] = {}
    for (bundle, overlays), rows in kinds.items():
        for files in (("train.json",), ("train.json", "evaluate.json")):
            configs = ROOT / "bundles" / bundle / "configs"
            parser = ConfigParser()
            parser.read_config([str(configs / name) for name in files])
            plain, its_own = json.dumps(parser.get()), set(parser.get())
            parser.read_config([str(configs / name) for name in (*files, *overlays)])
            merged = json.dumps(parser.get())
            keys.update(key for key in parser.get() if not key.startswith("_"))
            # What is referred to; or what the bundle has and never refers to, since its code looks it up.
            read.update(key for key in settings if _refers(merged, key) or (key in its_own and not _refers(plain, key)))
            where = f"({', '.join(rows)}: {' + '.join((*files, *overlays))})"
            gone = _dangling(parser)
            for key, value in settings.items():
                problem = _problem(parser, key)
                if problem is not None:
                    problems.setdefault(key, f"{problem} {where}")
                    continue
                if key in parser or "#" in key:
                    known.add(key)
                parser.update({key: value})  # the next key may be about what this one replaces
            for name in sorted(_dangling(parser) - gone):
                cause = next((key for key in settings if name == key or name.startswith(f"{key}#")), None)
                if cause is not None:
                    problems.setdefault(cause, f"there is no {name!r} any more, which the config refers to {where}")
    for key in settings:
        if key not in known:
            close = get_close_matches(key, sorted(keys), 1)
            raise BadInput(
                f"--set {key}: none of the configs has it, so it would change nothing."
                + (f" Do you mean {close[0]}?" if close else f" {problems[key]}." if key in problems else "")
            )
        if key in problems:
            raise BadInput(
                f"--set {key}: every row would get it, and some would fail: {problems[key]}. For one recipe alone, "
                "write an overlay beside its own, such as recipes/bcp_without_largest_component.json."
            )
        if "#" not in key and key not in read:
            raise BadInput(f"--set {key}: the protocol decides that, and no row's config would read it.")


def _refers(config: str, key: str) -> bool:
    """Whether a config, as JSON, refers to a key of its own."""
    return re.search(rf"@{re.escape(key)}(?!\w)", config) is not None


def _dangling(parser: ConfigParser) -> set[str]:
    """What a config refers to and does not have."""
    names = set(re.findall(r"@(\w[\w#]*)", json.dumps(parser.get(), default=str)))
    return {name for name in names if name not in parser}


def _problem(parser: ConfigParser, key: str) -> str | None:
    """Why a config can't take a key inside of something, in words."""
    name, _, argument = key.rpartition("#")
    if not name or key in parser:
        return None
    holder = parser.get(name)
    if not isinstance(holder, Mapping):
        return f"there is no {name!r}"
    if "_target_" not in holder:
        return f"{name!r} has no {argument!r}"
    target = holder["_target_"]
    made = _located(target) if isinstance(target, str) else None
    if argument.startswith("_") or not callable(made):
        return None
    taken = signature(made).parameters
    if argument in taken or Parameter.VAR_KEYWORD in {parameter.kind for parameter in taken.values()}:
        return None
    return f"{target} takes no {argument!r}"


def _located(target: str) -> Any:
    """A class or a function by its path, or by its name where it is one of MONAI's."""
    if "." in target:
        return locate(target)
    module = ComponentLocator().get_component_module_name(target)
    return locate(f"{module}.{target}") if isinstance(module, str) else None


def check_upper_bound(datalist: Path, upper_bound: Path, section: str) -> None:
    """Check that the row with all labels is evaluated on the cases of the other rows.

    Args:
        datalist: of the other rows.
        upper_bound: of that row.
        section: which is evaluated.

    Raises:
        BadInput: images or labels of the section differ.
    """
    ours, theirs = (
        {tuple(_real_paths(entry[key]) for key in ("image", "label")) for entry in load_section(path, section)}
        for path in (datalist, upper_bound)
    )
    if ours != theirs:
        raise BadInput(
            f"--upper-bound {upper_bound}: its `{section}` is not that of {datalist} ({len(ours ^ theirs)} cases are "
            "in one of them alone), so its row could not be compared with the others. Give both the same cases."
        )


def _real_paths(value: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(os.path.realpath(path) for path in ([value] if isinstance(value, str) else value))


def _transductive(datalist: Path, section: str) -> str | None:
    """What to say beside the table where cases are evaluated that were learnt from without labels; else None."""
    content = read_datalist(datalist)
    learnt, evaluated = load_section(content, "unlabeled"), load_section(content, section)
    keys = (patient_key, lambda entry: _real_paths(entry["image"])[0])
    if not any(in_both(learnt, evaluated, key) for key in keys):
        return None
    return (
        f"Transductive: cases of `{section}`, or others of their patients, are among the unlabelled images, from which "
        "all rows but the supervised ones learnt without labels."
    )


def _digest(path: Path) -> str:
    return file_digest(path)[:16]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m common compare``."""
    parser.add_argument(
        "--recipes",
        default="all",
        help="comma-separated names; `all` leaves out ablations; the own method is always a row",
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the datalists")
    parser.add_argument("--datalist", default="datalist.json", help="file name in that folder")
    parser.add_argument("--upper-bound", metavar="DATALIST", help="all labels, for one more supervised row")
    parser.add_argument(
        "--test-labels",
        metavar="DATALIST",
        help="test on the unlabelled images (transductive), with the labels that this datalist's training has of them",
    )
    parser.add_argument("--steps", type=int, required=True, help="of every row, a teacher's steps included")
    parser.add_argument("--iterations-per-epoch", type=int, default=50)
    parser.add_argument("--seeds", default="0", help="comma-separated, for instance 0,1,2")
    parser.add_argument("--learning-rate", type=float, help="of every recipe but those with an optimiser of their own")
    parser.add_argument("--momentum", type=float, help="likewise")
    parser.add_argument("--plan", type=Path, help="JSON overlay for every run; by default a plan is made for the data")
    parser.add_argument("--memory", help="memory of the device to plan for, like 8GB")
    parser.add_argument("--width", type=int, help=f"channels of the planned network's first stage ({_WIDTH})")
    parser.add_argument("--max-width", type=int, help="most channels of a stage")
    parser.add_argument("--protocol", help="a published protocol instead of a plan, for instance left_atrium")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override in every run's config"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the cores")
    parser.add_argument("--device", help="for instance cpu or cuda:0; by default a GPU when there is one")
    parser.add_argument("--reference", default=OWN, metavar="ROW", help="the row that all others are tested against")
    parser.add_argument("--only-table", action="store_true", help="train nothing, show what is done")


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise BadInput(f"--set {pair!r}: expected KEY=VALUE, such as mirror_axes=[0].")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


def _plan(options: argparse.Namespace) -> dict[str, Any] | None:
    """What the study is to plan; a given plan is taken as it is."""
    wanted = {"width": options.width, "max_width": options.max_width, "memory": options.memory}
    given = [key for key, value in wanted.items() if value is not None]
    if given and (options.plan is not None or options.protocol is not None):
        raise BadInput(
            f"--{given[0].replace('_', '-')}: it is for a plan that is made, and with --plan or --protocol none is. "
            "Leave it out, or set the plan's keys, such as `features`, by --set."
        )
    if options.plan is not None:
        try:
            plan = json.loads(options.plan.read_text())
        except (OSError, ValueError) as error:
            raise BadInput(f"--plan {options.plan}: can't be read ({error}).") from error
        if not isinstance(plan, dict):
            raise BadInput(
                f"--plan {options.plan}: found a {type(plan).__name__}, expected the keys and values of a config, as "
                "`python -m common plan` writes them."
            )
        return {"set": plan}
    if options.protocol is not None:
        return None
    return {"datalist": options.datalist, "width": _WIDTH, **{key: wanted[key] for key in given}}


def main(options: argparse.Namespace) -> int:
    """Train, evaluate, write table, tests and picture; returns 1 when a run failed."""
    data, output = options.data.resolve(), options.output.resolve()
    lists = [name for name in (options.datalist, options.upper_bound, options.test_labels) if name is not None]
    for name in lists:
        load_section(read_datalist(data / name), "training")
    load_section(data / options.datalist, "unlabeled")
    settings = _settings(options.set)
    datalist, content = options.datalist, None
    if options.test_labels is None:
        section = settings.get("section", "validation")
        note = _transductive(data / datalist, section)
        if note is not None and section == "validation":
            raise BadInput(
                f"--datalist {datalist}: cases of its `validation`, or others of their patients, are among its "
                "`unlabeled`, too, which no training takes. Take them out of one of them, or list them as `testing` "
                "and give --set section=testing."
            )
        if options.upper_bound is not None:
            check_upper_bound(data / datalist, data / options.upper_bound, section)
    else:
        if options.upper_bound is not None or "section" in settings:
            raise BadInput("--test-labels: give neither --upper-bound, which would learn them, nor another section.")
        settings["section"] = "testing"
        content = with_test_labels(data / datalist, data / options.test_labels)
        datalist = str(output / "datalist.json")
        note = (
            "Transductive: tested on the unlabelled images, from which all rows but the supervised one learnt without "
            "labels."
        )
    optimizer = {"learning_rate": options.learning_rate, "momentum": options.momentum}
    description = describe(
        choose_recipes(options.recipes, read_recipes()),
        datalist,
        options.steps,
        options.iterations_per_epoch,
        options.upper_bound,
        {key: value for key, value in optimizer.items() if value is not None},
        settings,
        _plan(options),
        options.protocol,
        options.datalist,
    )
    check_settings(settings, description)
    for key in optimizer:
        if key in settings and optimizer[key] is not None:
            raise BadInput(f"--set {key}: --{key.replace('_', '-')} says it already. Give one of them.")
    if note is not None:
        description["note"] = note
    description["data"] = {name: _digest(data / name) for name in lists}
    rows = [name for name in description["runs"] if name != TEACHER]
    if options.reference not in rows:
        raise BadInput(f"--reference {options.reference!r}: there is no such row; choose from {', '.join(rows)}.")
    record = check_earlier(description, output)
    if content is not None:
        write_atomically(Path(datalist), json.dumps(content, indent=2))
    study = Study(description, data, output, read_seeds(options.seeds), options.device)
    write_atomically(output / "study.json", json.dumps(record, indent=2))
    failures = [] if options.only_table else study.run_all(jobs=options.jobs)
    comparison = Comparison(study, rows, options.reference)
    print(comparison.write(failures))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0
