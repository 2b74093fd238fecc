"""What Python a bundle's configs would run, found without running any of it.

MONAI calls whatever a ``_target_`` names and evaluates every string that begins with ``$``; Python's ``logging``
evaluates parts of ``logging.conf``. All of these are listed by their full names. The list is for a reader: what lies in
an allowed package is taken for that package's own doing, and the bundle's ``scripts`` are programs, too.
"""

from __future__ import annotations

import ast
import builtins
import configparser
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from monai.bundle import ComponentLocator
from monai.bundle.reference_resolver import ReferenceResolver

from .configs import is_target, strings

__all__ = ["ALLOWED", "Use", "config_uses", "import_names", "logging_uses"]

ALLOWED = ("monai", "torch", "ignite", "numpy", "scripts.common")
# Names that MONAI gives to every expression.
_GIVEN = {"monai": "monai", "torch": "torch", "np": "numpy", "numpy": "numpy"}
_HARMLESS = frozenset(
    {
        *("abs", "all", "any", "bool", "dict", "divmod", "enumerate", "filter", "float", "frozenset", "int"),
        *("isinstance", "len", "list", "map", "max", "min", "pow", "print", "range", "reversed", "round", "set"),
        *("slice", "sorted", "str", "sum", "tuple", "zip"),
    }
)
# Names by which an allowed package leads to the operating system, to files' programs or to the network.
_WAYS_OUT = frozenset(
    {
        *("apps", "builtins", "bundle", "compile", "cpp_extension", "ctypes", "ctypeslib", "download"),
        *("download_and_extract", "download_url", "eval", "exec", "f2py", "hub", "import_module", "importlib"),
        *("instantiate", "load", "load_library", "locate", "open", "optional_import", "os", "pickle", "popen"),
        *("requests", "shutil", "socket", "subprocess", "sys", "system", "urllib"),
    }
)
_LOCATOR = ComponentLocator()
_STREAMS = ("sys.stdout", "sys.stderr")
_LOG_HANDLERS = ("StreamHandler", "logging.StreamHandler", "NullHandler", "logging.NullHandler")


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


def _allowed(name: str, prefixes: Collection[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _judge(name: str, prefixes: Collection[str]) -> str | None:
    if not _allowed(name, prefixes):
        return "is none of the allowed packages'"
    return None if name in prefixes else _way_out(name.split("."))


def _way_out(parts: Collection[str]) -> str | None:
    for part in parts:
        if part.startswith("_"):
            return f"reaches into what Python keeps to itself, by {part!r}"
        if part in _WAYS_OUT:
            return f"may lead out of its package, by {part!r}"
    return None


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
    file: str, config: Mapping[str, Any], names: Mapping[str, str], prefixes: Collection[str] = ALLOWED
) -> Iterator[Use]:
    """What a config would run.

    Args:
        file: the config's name.
        config: its content.
        names: see :func:`import_names`; of all configs that may be used together.
        prefixes: packages and objects that are allowed.
    """
    for key, text in strings(config):
        if text.startswith("%"):
            yield Use(text, file, key, "takes its value from another file or place; write the value itself")
        elif imported := _imported(text):
            yield from (Use(full, file, key, _judge(full, prefixes)) for _, full in imported)
        elif text.startswith("$"):
            if is_target(key):
                yield Use(text[:80], file, key, "is a name that an expression makes; write the name itself")
            yield from (Use(name, file, key, fault) for name, fault in _expression(text[1:], names, prefixes))
        elif is_target(key) and text.startswith("@"):
            yield Use(text, file, key, "is named by another part of the config; write the name itself")
        elif is_target(key):
            name = _component(text)
            yield Use(name, file, key, _judge(name, prefixes))


@lru_cache
def _component(target: str) -> str:
    """The full name of a ``_target_``: MONAI looks a bare name up among its own, then among Python's."""
    if "." in target:
        return target
    found = _LOCATOR.get_component_module_name(target)
    module = found[0] if isinstance(found, list) else found
    return f"{module or 'builtins'}.{target}"


def _expression(text: str, names: Mapping[str, str], prefixes: Collection[str]) -> Iterator[tuple[str, str | None]]:
    """Full name and fault of everything that an expression names."""
    source = ReferenceResolver.id_matcher.sub("reference_", ReferenceResolver.normalize_id(text)).strip()
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
        base, attributes = node, []
        while isinstance(base, ast.Attribute):
            attributes.insert(0, base.attr)
            base = base.value
        if isinstance(base, ast.Name) and base.id in known:
            name = ".".join([known[base.id], *attributes])
            yield name, _judge(name, prefixes)
        elif isinstance(base, ast.Name) and base.id != "reference_" and base.id not in own:
            name = ".".join(["builtins", base.id, *attributes])
            fine = (base.id in _HARMLESS and not _way_out(attributes)) or _allowed(name, prefixes)
            yield name, None if fine else "is none of the allowed packages'"
        elif fault := _way_out(attributes):  # of what another part of the config makes, which may be a package, too
            yield f"(...).{'.'.join(attributes)}", fault


def logging_uses(file: str, content: str) -> Iterator[Use]:
    """What ``logging.config.fileConfig`` would evaluate: the class and the arguments of each handler and formatter."""
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(content)
    except configparser.Error as error:
        yield Use(str(error).splitlines()[0][:80], file, "", "can't be read as a logging configuration")
        return
    for section in parser.sections():
        for option in ("class", "args", "kwargs"):
            value = parser.get(section, option, fallback="")
            if not value:
                continue
            fine = value in _LOG_HANDLERS if option == "class" else _is_plain(value)
            yield Use(
                value[:80], file, f"{section}#{option}", None if fine else "is more than a log on the screen needs"
            )


def _is_plain(text: str) -> bool:
    """Whether the text is made of literals and the standard streams alone."""
    for stream in _STREAMS:
        text = text.replace(stream, "None")
    try:
        ast.literal_eval(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
