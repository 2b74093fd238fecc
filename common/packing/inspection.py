"""What Python a bundle's configs would run, found without running any of it.

MONAI calls whatever a ``_target_`` names and evaluates every string that begins with ``$``; Python's ``logging``
evaluates parts of ``logging.conf``. All of these are listed by their full names, and judged by what bundles need: a
list of what is harmless, since any large package also has ways to run programs and to write files. What the allowed
objects are told to do, such as the folders that they write to, is for a reader, and ``scripts`` are programs, too.
"""

from __future__ import annotations

import ast
import builtins
import configparser
import importlib
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from monai.bundle import ComponentLocator
from monai.bundle.reference_resolver import ReferenceResolver

from .configs import is_target, strings

__all__ = ["ATTRIBUTES", "FOREIGN", "MODULES", "Use", "config_uses", "import_names", "logging_uses", "value_faults"]

# Names that MONAI gives to every expression.
_GIVEN = {"monai": "monai", "torch": "torch", "np": "numpy", "numpy": "numpy"}
# What an expression may name without anything before it.
_BUILTINS = frozenset(
    {
        *("abs", "all", "any", "bool", "dict", "divmod", "enumerate", "filter", "float", "frozenset", "int"),
        *("isinstance", "len", "list", "map", "max", "min", "pow", "print", "range", "reversed", "round", "set"),
        *("slice", "sorted", "str", "sum", "tuple", "zip"),
    }
)
# What an expression may take of the values that other parts of a config make: nothing that writes, or that is another
# package's way to run something.
ATTRIBUTES = frozenset(
    {
        *("deployed", "discriminators", "divisor", "items", "keys", "network", "parameters", "run", "to"),
        *("trainable_parameters", "values"),
    }
)
# Modules all of whose own classes only compute, keep or show what they are given. Not among them, since they look up
# any Python object by a string, run a program's text or fetch one: MONAI's transforms of files and of users' functions,
# its networks and losses that come with weights, and its `utils`.
_MODULES_OF_CLASSES = (
    *(f"scripts.common.{name}" for name in ("data", "handlers", "inferers", "losses", "methods", "networks")),
    *("scripts.common.transforms", "torch.nn.modules", "torch.optim"),
    *(f"monai.transforms.{name}" for name in ("croppad", "intensity", "spatial")),
    *(f"monai.losses.{name}" for name in ("dice", "ds_loss", "focal_loss", "hausdorff_loss", "tversky")),
)
_OBJECTS = frozenset(
    {
        "monai.data.dataloader.DataLoader",
        "monai.data.dataset.CacheDataset",
        "monai.data.dataset.Dataset",
        "monai.engines.evaluator.SupervisedEvaluator",
        "monai.handlers.checkpoint_loader.CheckpointLoader",
        "monai.handlers.from_engine",
        "monai.handlers.hausdorff_distance.HausdorffDistance",
        "monai.handlers.lr_schedule_handler.LrScheduleHandler",
        "monai.handlers.mean_dice.MeanDice",
        "monai.handlers.surface_distance.SurfaceDistance",
        "monai.inferers.inferer.SimpleInferer",
        "monai.inferers.inferer.SlidingWindowInferer",
        "monai.transforms.compose.Compose",
        "monai.transforms.post.dictionary.Activationsd",
        "monai.transforms.post.dictionary.AsDiscreted",
        "monai.transforms.utility.dictionary.CastToTyped",
        "monai.transforms.utility.dictionary.EnsureChannelFirstd",
        "monai.transforms.utility.dictionary.EnsureTyped",
        "torch.cuda.device_count",
        "torch.cuda.is_available",
        "torch.device",
        *(f"torch.{name}" for name in ("bfloat16", "bool", "float16", "float32", "float64", "int32", "int64", "uint8")),
        *(f"scripts.common.{name}" for name in ("bundle_root", "completion.completed_cases", "is_on", "unload")),
        *(
            f"scripts.common.data.{name}"
            for name in (
                *("case_keys", "check_output", "find_cases", "load_section", "make_loader", "organ_cases"),
                *("studies.unlabeled_cases", "studies.with_maps", "unknown_as_background", "whole_cases"),
            )
        ),
        *(
            f"scripts.common.engines.{name}"
            for name in (
                *("SemiSupervisedTrainer", "check_evaluation", "distributed_device", "load_teacher", "load_weights"),
                *("organ_teachers.load_organ_teachers", "predict", "prediction.leave_in_place", "preflight"),
                *("leave", "selected_on", "start", "start_distributed", "start_from", "stop_distributed"),
            )
        ),
        "scripts.common.losses.weighting.parameter_groups",
        "scripts.common.targets.dense_names",
        *(
            f"scripts.common.transforms.{name}"
            for name in (
                *("GeometricThicknessd.arguments", "GeometricThicknessd.measurable", "air", "chain"),
                *("crop",),
                *("displayed.displayed", "load_references", "monitor_postprocessing", "postprocessing"),
                *("preprocessing", "sampled_augmentation.sampled_augmentation", "supervised_augmentation"),
                "weak_and_strong",
            )
        ),
    }
)
# What an import statement may name besides: the modules that these are taken from.
MODULES = frozenset(
    name.rsplit(".", count)[0]
    for name in (*_OBJECTS, *(f"{name}.*" for name in _MODULES_OF_CLASSES))
    for count in range(1, name.count(".") + 1)
) - {"scripts"}
# What `allow` may lift.
FOREIGN = "runs other things than bundles need"
_MORE_THAN_A_LOG = "is more than a log on the screen needs"
_REFERENCES = "__local_refs"  # MONAI's name for what the config's other parts have become
_RELATIVE = re.compile(r"[@%](?:#|::)")
_MODE = re.compile(r"(^|#|::)_mode_$")
_INSIDE_TARGET = re.compile(r"(^|#|::)_target_(#|::)")
_PACKAGE = __package__.rpartition(".")[0]
_LOCATOR = ComponentLocator()
_STREAMS = ("sys.stdout", "sys.stderr")
_LOG_HANDLERS = ("StreamHandler", "logging.StreamHandler", "NullHandler", "logging.NullHandler")
# What the sections of a logging configuration may say, by the first word of their names. Not `class` and `defaults` of
# a formatter, which Python imports and evaluates, and no [DEFAULT], which puts options into all the others.
_LOG_OPTIONS = {
    **dict.fromkeys(("loggers", "handlers", "formatters"), ("keys",)),
    "logger": ("level", "handlers", "qualname", "propagate"),
    "handler": ("class", "level", "formatter", "args", "kwargs"),
    "formatter": ("format", "datefmt"),
}
_LOG_NAMES = re.compile(r"[\w., -]*")


@dataclass(frozen=True)
class Use:
    """Something that would be run.

    Args:
        name: full name of the Python object.
        file: where it is named.
        key: id or section there.
        fault: why it should be looked at; None where nothing is wrong.
    """

    name: str
    file: str
    key: str
    fault: str | None = None


def _below(name: str, prefixes: Collection[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _judge(name: str, allow: Collection[str], importing: bool = False) -> str | None:
    if name in allow or name in _OBJECTS or (importing and name in MODULES):
        return None
    if private := next((part for part in name.split(".") if part.startswith("_")), None):
        return f"{FOREIGN}, by {private!r}"
    if _below(name, allow):
        return None
    own = _own_name(name)
    return None if own in _OBJECTS or _below(own, _MODULES_OF_CLASSES) else FOREIGN


@lru_cache
def _own_name(name: str) -> str:
    """A class's name in the module that defines it, since packages hand on what is another's; empty for no class."""
    module, _, last = name.rpartition(".")
    if _below(module, ["scripts.common"]):
        with suppress(ImportError):  # of the package that is installed, not of the archive's
            importlib.import_module(module.replace("scripts.common", _PACKAGE, 1))
        module = module.replace("scripts.common", _PACKAGE, 1)
    found = getattr(sys.modules.get(module), last, None)
    if not isinstance(found, type):
        return ""
    own = f"{found.__module__}.{found.__qualname__}"
    return f"scripts.common{own.removeprefix(_PACKAGE)}" if _below(own, [_PACKAGE]) else own


def _attribute_fault(attributes: Collection[str]) -> str | None:
    foreign = next((name for name in attributes if name not in ATTRIBUTES), None)
    return f"{FOREIGN}, by {foreign!r}" if foreign else None


def import_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Full names by the names that the import statements of a config give to its expressions."""
    return {alias: full for _, text in strings(config) for alias, full in _imported(text)}


def _imported(text: str) -> list[tuple[str, str]]:
    """Alias and full name of what an import statement imports; empty for anything else."""
    if not text.startswith("$") or "import" not in text:
        return []
    try:
        statements = ast.parse(text[1:].strip()).body
    except (SyntaxError, ValueError):
        return []
    first = statements[0] if statements else None
    if isinstance(first, ast.Import):
        return [(name.asname or name.name, name.name) for name in first.names]
    if isinstance(first, ast.ImportFrom):
        return [
            (name.asname or name.name, f"{'.' * first.level}{first.module or ''}.{name.name}") for name in first.names
        ]
    return []


def config_uses(
    file: str, config: Mapping[str, Any], names: Mapping[str, str], allow: Collection[str] = ()
) -> Iterator[Use]:
    """What a config would run.

    Args:
        file: the config's name.
        config: its content.
        names: see :func:`import_names`; of all configs that may be used together.
        allow: packages and objects that are allowed, besides what bundles need.
    """
    for key, text in strings(config):
        if text.startswith("%"):
            yield Use(text, file, key, "takes its value from another file or place; write the value itself")
        elif imported := _imported(text):
            yield from (Use(full, file, key, _judge(full, allow, importing=True)) for _, full in imported)
        elif text.startswith("$"):
            if is_target(key):
                yield Use(text[:80], file, key, "is a name that an expression makes; write the name itself")
            yield from (Use(name, file, key, fault) for name, fault in _expression(text[1:], names, allow))
        elif is_target(key) and text.startswith("@"):
            yield Use(text, file, key, "is named by another part of the config; write the name itself")
        elif is_target(key):
            name = _component(text)
            yield Use(name, file, key, _judge(name, allow))
        elif _MODE.search(key) and text not in ("default", "callable"):
            yield Use(text, file, key, "is a way to call it that is for its maker's own debugging")
        if _INSIDE_TARGET.search(key):
            yield Use(text[:80], file, key, "is a part of a name that the config makes; write the name itself")


def value_faults(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """What in a file of plain values MONAI would run or look up, once a config refers to it: key and fault."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            place = f"{key}#{name}" if key else str(name)
            if is_target(str(name)):
                yield place, "would be called once a config refers to it; remove it"
            yield from value_faults(item, place)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from value_faults(item, f"{key}#{index}")
    elif isinstance(value, str) and value.startswith(("$", "%", "@")):
        yield key, f"{value[:40]!r} would be run or looked up once a config refers to it; begin with a letter"


@lru_cache
def _component(target: str) -> str:
    """The full name of a ``_target_``: MONAI looks a bare name up among its own, then among Python's."""
    if "." in target:
        return target
    found = _LOCATOR.get_component_module_name(target)
    module = found[0] if isinstance(found, list) else found
    return f"{module or 'builtins'}.{target}"


def _expression(text: str, names: Mapping[str, str], allow: Collection[str]) -> Iterator[tuple[str, str | None]]:
    """Full name and fault of everything that an expression names."""
    if _REFERENCES in text or _RELATIVE.search(text):
        yield text[:80], "refers to other parts in a way that can't be followed; write their ids, as in @a#b"
        return
    # As MONAI does it, inside quotes, too: what it parses is what is looked at.
    source = ReferenceResolver.id_matcher.sub(
        lambda found: f"{_REFERENCES}['{found[0][1:]}']", ReferenceResolver.normalize_id(text)
    ).strip()
    try:
        tree = ast.parse(source, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        yield text[:80], "can't be read as Python"
        return
    known = {**_GIVEN, **names}
    own = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for name in sorted(own & {*known, *dir(builtins)}):
        yield name, "is a name of its own for something else"
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute | ast.Name) or id(node) in inner:
            continue
        base: ast.expr = node
        attributes: list[str] = []
        while isinstance(base, ast.Attribute):
            attributes.insert(0, base.attr)
            base = base.value
        if isinstance(base, ast.Name) and base.id in known:
            name = ".".join([known[base.id], *attributes])
            yield name, _judge(name, allow)
        elif isinstance(base, ast.Name) and base.id != _REFERENCES and base.id not in own:
            name = ".".join(["builtins", base.id, *attributes])
            yield name, None if base.id in _BUILTINS and not attributes else _judge(name, allow)
        elif fault := _attribute_fault(attributes):  # of what another part of the config makes
            name = f"(...).{'.'.join(attributes)}"
            yield name, None if name in allow else fault


def logging_uses(file: str, content: str) -> Iterator[Use]:
    """What ``logging.config.fileConfig`` would evaluate, which is the class and the arguments of each handler, and
    whatever else a log on the screen doesn't need."""
    parser = configparser.RawConfigParser(default_section=None)  # type: ignore[call-overload]  # so [DEFAULT] is like any other
    try:
        parser.read_string(content)
    except configparser.Error as error:
        yield Use(str(error).splitlines()[0][:80], file, "", "can't be read as a logging configuration")
        return
    for section in parser.sections():
        options = _LOG_OPTIONS.get(section.partition("_")[0])
        if options is None:
            yield Use(f"[{section}]"[:80], file, section, _MORE_THAN_A_LOG)
            continue
        for option, value in parser.items(section):
            fine = option in options and _is_fine(option, value)
            if not fine or (value and option in ("class", "args", "kwargs")):
                yield Use(value[:80], file, f"{section}#{option}", None if fine else _MORE_THAN_A_LOG)


def _is_fine(option: str, value: str) -> bool:
    """Whether an option of a logging configuration says no more than it must."""
    if option in ("format", "datefmt"):  # Python reads these as they are; in the others it replaces %(x)s
        return True
    if option == "class":
        return value in _LOG_HANDLERS
    if option in ("args", "kwargs"):
        return "%" not in value and (not value or _is_plain(value))
    return _LOG_NAMES.fullmatch(value) is not None


def _is_plain(text: str) -> bool:
    """Whether the text is made of literals and the standard streams alone."""
    for stream in _STREAMS:
        text = text.replace(stream, "None")
    try:
        ast.literal_eval(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
