"""What the documents say can be typed and found: links, anchors, commands, files."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.__main__ import SECTIONS
from common.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(ROOT / "README.md", ROOT / "SECURITY.md"),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "bundles").glob("*/docs/*.md")),
]
# Of a user: what the commands before them write, and files of the user's own.
USERS_CONFIG = re.compile(r"(?:^|/)plan\.json$")
FOLDERS = ("common", "bundles", "studies", "benchmarks", "tests", "docs", "monailabel_app", ".ci")
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")
_TICKED = re.compile(r"`([^`\n]+)`")

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def prose(path: Path) -> str:
    return _FENCE.sub("", path.read_text())


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(path: Path, ticked: bool) -> Iterator[list[str]]:
    """The words of each command in a document's blocks of code, or of what stands between ticks and may be a part."""
    blocks = _FENCE.findall(path.read_text())
    whole = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()[1:-1]]
    for line in _TICKED.findall(prose(path)) if ticked else whole:
        if re.match(r"(?:\.venv/bin/)?python (?:-m|\w+/)|make |pip ", line):
            words = shlex.split(line, comments=True)
            yield ["python" if words[0].endswith("python") else words[0], *words[1:]]


@every_document
def test_links_and_anchors_exist(path: Path) -> None:
    for link in _LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), f"{link} leads out of the checkout"
        assert not anchor or anchor in anchors(target), f"{link}: {sorted(anchors(target))}"


@every_document
@pytest.mark.parametrize("ticked", [False, True], ids=["blocks", "ticked"])
def test_commands_can_be_typed(path: Path, ticked: bool) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(path, ticked):
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[:3] == ["python", "-m", "common"] and words[3:] and not words[3].isupper():
            parser = argparse.ArgumentParser()
            importlib.import_module(COMMANDS[words[3]][0]).add_arguments(parser)
            if not ticked:
                parser.parse_args(words[4:])  # says what is wrong, and exits
            assert not [word for word in words[4:] if word[:2] == "--" and word not in parser.format_help()], words
        elif words[:3] == ["python", "-m", "benchmarks"] and not words[3].isupper():
            assert words[3] in ("all", *SECTIONS), words
            parser = argparse.ArgumentParser()
            if words[3] in SECTIONS:
                importlib.import_module(f"benchmarks.{words[3]}").add_arguments(parser)
            parser.parse_args(words[4:])
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), words


@every_document
def test_configs_of_commands_exist_and_have_the_options(path: Path) -> None:
    for words in (words for words in commands(path, ticked=False) if "--config_file" in words):
        value = words[words.index("--config_file") + 1]
        files = ast.literal_eval(value) if value.startswith("[") else [value]
        config: dict[str, object] = {}
        for file in (file for file in files if not USERS_CONFIG.search(file)):
            assert (ROOT / file).is_file(), f"{file}: {words}"
            config |= json.loads((ROOT / file).read_text())
        if words[1:4] == ["-m", "monai.bundle", "run"]:
            for option in (word[2:] for word in words[4:] if word.startswith("--")):
                assert option == "config_file" or re.split("#|::", option)[0] in config, f"--{option}: {words}"


@every_document
def test_files_that_are_named_exist(path: Path) -> None:
    for text in _TICKED.findall(prose(path)):
        if re.fullmatch(r"[\w./-]+", text) and text.split("/")[0] in FOLDERS and "/" in text:
            written = "/models/" in text  # by a training
            in_bundle = list(ROOT.glob(f"bundles/*/{text}"))  # as a card names its own
            assert written or in_bundle or (ROOT / text).exists(), text


def test_the_documents_are_looked_at() -> None:
    """An expression that finds nothing would pass everything."""
    assert sum(len(list(commands(path, ticked=False))) for path in DOCUMENTS) > 40
    assert sum(len(_LINK.findall(prose(path))) for path in DOCUMENTS) > 20
    assert "what-inference-writes" in anchors(ROOT / "docs" / "data.md")
