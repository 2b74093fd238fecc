"""What SECURITY.md promises of the whole checkout: how files are loaded and unpacked, and where a server listens."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from common.packing.configs import strings

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(
    path for folder in ("common", "monailabel_app", "studies", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
CONFIGS = sorted((ROOT / "bundles").rglob("*.json"))
# Calls that run what a file says, or write wherever it says.
FORBIDDEN = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "cloudpickle.load", "yaml.load"),
    *("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "torch.hub.load_state_dict_from_url"),
    *("shutil.unpack_archive", "tarfile.open", "monai.apps.extractall", "os.system", "eval", "exec", "marshal.loads"),
}
METHODS = {"extract", "extractall"}
_PROGRAM = re.compile(r"import |\.load\(")


def name_of(node: ast.expr) -> str:
    """``torch.load`` of the expression that says so; empty for what is no dotted name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = name_of(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def calls(source: str) -> Iterator[ast.Call]:
    """Every call in a program, and in programs that it holds as text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield node
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _PROGRAM.search(node.value):
            with suppress(SyntaxError):
                yield from calls(node.value)


def faults(source: str) -> list[str]:
    """Calls of a program that a hostile file could make use of."""
    found = []
    for call in calls(source):
        name, keywords = name_of(call.func), {item.arg: item.value for item in call.keywords}
        safe = keywords.get("weights_only")
        if name == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True):
            found.append("torch.load")
        if {"allow_pickle", "shell"} & keywords.keys():
            found.append(f"{name} with {sorted(keywords)}")
        if name in FORBIDDEN or (isinstance(call.func, ast.Attribute) and call.func.attr in METHODS):
            found.append(name or call.func.attr)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=not trust)",
        "run('import torch\\ntorch.load(path)')",
        "zipfile.ZipFile(path).extractall(folder)",
        "np.load(path, allow_pickle=True)",
        "pickle.loads(content)",
    ],
)
def test_unsafe_calls_are_found(source: str) -> None:
    assert faults(source)
    assert not faults("torch.load(path, map_location='cpu', weights_only=True)")


def test_every_checkpoint_is_loaded_as_weights_only_and_no_archive_is_unpacked_by_its_own_names() -> None:
    assert len(PROGRAMS) > 100
    assert sum(name_of(call.func) == "torch.load" for path in PROGRAMS for call in calls(path.read_text())) >= 5
    found = {str(path.relative_to(ROOT)): fault for path in PROGRAMS if (fault := faults(path.read_text()))}
    assert not found


def test_no_other_names_for_what_is_looked_for() -> None:
    """``from torch import load`` would get round the test above."""
    for path in PROGRAMS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in ("torch", "pickle", "shutil", "tarfile", "os"):
                assert not {alias.name for alias in node.names} & {"load", "loads", "unpack_archive", "open", "system"}
            if isinstance(node, ast.Import):
                renamed = {alias.name for alias in node.names if alias.asname}
                assert not renamed & {"torch", "pickle", "shutil", "tarfile", "zipfile", "os"}, path


def test_no_config_loads_a_checkpoint_by_itself() -> None:
    assert len(CONFIGS) > 15
    for path in CONFIGS:
        config = json.loads(path.read_text())
        for key, text in strings(config):
            assert not re.search(r"torch\.load|jit\.load|hub\.load|pickle|extractall", text), f"{path}: {key}"
            if text.endswith("CheckpointLoader"):
                node = config
                for part in key.split("#")[:-1]:
                    node = node[int(part) if isinstance(node, list) else part]
                assert node["_disabled_"] is True, f"{path}: {key}"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_annotation_server_listens_to_this_machine_alone_unless_told() -> None:
    def command(*arguments: str) -> str:
        environment = {**os.environ, "HOST": "scanner.hospital.org"}  # as some shells set it
        done = subprocess.run(
            ["make", "--dry-run", "label", "STUDIES=studies", *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            check=True,
        )
        return done.stdout.partition("start_server")[2]

    assert "--host 127.0.0.1 " in command()
    assert "--host 0.0.0.0 " in command("HOST=0.0.0.0")


def test_no_document_starts_a_server_for_everybody() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "bundles").glob("*/docs/*.md")):
        for line in path.read_text().splitlines():
            assert "start_server" not in line or "--host 127.0.0.1" in line, f"{path}: {line}"
