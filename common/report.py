"""One self-contained HTML report: facts, tables, pictures and commands in a single file that can be mailed.

The file needs nothing beside itself: pictures are embedded, the style is inside, there is no script, and a content
security policy forbids the browser to load anything. :func:`markdown_table` writes the same cells for documents.

A column is ``{"key": "dice", "title": "mean Dice", "better": "higher", "digits": 3}``; a row ``{"name": "teacher",
"dice": [0.84, 0.85]}``. A list holds one number a seed and is shown as mean ± standard deviation.
"""

from __future__ import annotations

import base64
import html
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from string import Template
from typing import Any

from .errors import BadInput
from .files import write_atomically

__all__ = ["SECTIONS", "markdown_table", "write_report"]

SECTIONS = ("facts", "tables", "pictures", "commands")
NOTHING = "\N{EN DASH}"
DEFAULT_DIGITS = 3
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { --back: #ffffff; --text: #1c2024; --quiet: #5a636d; --line: #d9dee3; --soft: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171a; --text: #e6e9ec; --quiet: #a0a9b2; --line: #343a41; --soft: #1e2328; }
}
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .4rem .7rem; text-align: right; border-top: 1px solid var(--line); white-space: nowrap; }
thead th { border-top: 0; background: var(--soft); white-space: normal; vertical-align: bottom; }
th.text, td.text, tbody th { text-align: left; }
tbody th { font-weight: normal; }
tbody th, thead td { position: sticky; left: 0; background: var(--back); }
thead td { background: var(--soft); }
.note { color: var(--quiet); font-size: .9rem; margin: .5rem 0 0; }
.pictures { display: grid; gap: 1.5rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 6px; }
pre { margin: .3rem 0 1rem; padding: .7rem; overflow-x: auto; background: var(--soft); border-radius: 6px;
  user-select: all; }
@media (max-width: 40rem) { dl { display: block; } dd { margin-bottom: .5rem; } }
</style>
</head>
<body>
<h1>$title</h1>
$body</body>
</html>
""")


@dataclass(frozen=True)
class _Cell:
    """What a cell shows, the number it is compared by (None: it takes no part), and whether it is set as text."""

    text: str
    number: float | None = None
    is_text: bool = False
    best: bool = False


def _rounded(value: float, digits: int) -> str:
    # Adding 0 turns the negative zero that rounding leaves into a plain one.
    return f"{round(float(value), digits) + 0.0:.{digits}f}"


def _cell(value: Any, digits: int) -> _Cell:
    if value is None:
        return _Cell(NOTHING)
    if isinstance(value, str):
        return _Cell(value, is_text=not value.strip().isdecimal())
    several = isinstance(value, Sequence)
    numbers = list(value) if several else [value]
    if not all(number is None or isinstance(number, Real) for number in numbers):
        raise TypeError(f"a cell holds {value!r}; expected a number, a list of numbers, a string or None")
    known = [float(number) for number in numbers if number is not None and math.isfinite(number)]
    if not known:
        return _Cell(NOTHING)
    mean = statistics.fmean(known)
    text = _rounded(mean, digits)
    if len(known) > 1:
        text += f" ± {_rounded(statistics.stdev(known), digits)}"
    if len(known) < len(numbers):
        # Seeds that have no figure are no reason to look better than those that do: shown, and never the best.
        return _Cell(f"{text} ({len(known)} of {len(numbers)})")
    return _Cell(text, round(mean, digits))


def _cells(columns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[list[_Cell]]:
    """The cells row by row, the best of each column marked.

    Numbers that are equal as shown are equally good; where all are, none is marked.
    """
    filled: list[list[_Cell]] = []
    for column in columns:
        cells = [_cell(row.get(column["key"]), column.get("digits", DEFAULT_DIGITS)) for row in rows]
        better = column.get("better")
        if better not in ("higher", "lower", None):
            raise ValueError(f"column {column['key']!r}: better is {better!r}; expected 'higher', 'lower' or None")
        numbers = {cell.number for cell in cells if cell.number is not None}
        if better is not None and len(numbers) > 1:
            best = max(numbers) if better == "higher" else min(numbers)
            cells = [_Cell(cell.text, cell.number, cell.is_text, best=cell.number == best) for cell in cells]
        filled.append(cells)
    return [[cells[index] for cells in filled] for index in range(len(rows))]


def markdown_table(columns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    """A table in Markdown, the best value of a column in bold.

    Args:
        columns: ``key``, ``title``, ``better`` (``"higher"``, ``"lower"`` or None: nothing is marked) and ``digits``
            (default 3) of each.
        rows: ``name``, and under the columns' keys a number, a list of numbers (one a seed), a string or None. What is
            missing or not finite is shown as a dash; a mean over some of the seeds says over how many.

    Returns:
        The lines of the table, without a line break at the end.
    """
    lines = [
        ["", *(_plain(column.get("title", column["key"])) for column in columns)],
        ["---", *["---:" for _ in columns]],
    ]
    for row, cells in zip(rows, _cells(columns, rows), strict=True):
        texts = [_plain(cell.text) for cell in cells]
        lines.append([_plain(row["name"]), *(f"**{t}**" if c.best else t for t, c in zip(texts, cells, strict=True))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: Any) -> str:
    """Text that can't end a cell, or turn into mark-up; code in backticks stays code."""
    text = " ".join(str(text).split())
    for character in "\\|*<":
        text = text.replace(character, f"\\{character}")
    return text


def _table(table: Mapping[str, Any]) -> str:
    columns, rows = table["columns"], table["rows"]
    parts = [_heading(table["title"])]
    if rows:
        cells = _cells(columns, rows)
        kinds = [' class="text"' if any(line[i].is_text for line in cells) else "" for i in range(len(columns))]
        title = html.escape(str(table["title"]))
        parts.append(
            f'<div class="scroll" role="region" aria-label="{title}" tabindex="0">\n<table>\n<thead><tr><td></td>'
        )
        for column, kind in zip(columns, kinds, strict=True):
            parts.append(f'<th scope="col"{kind}>{html.escape(str(column.get("title", column["key"])))}</th>')
        parts.append("</tr></thead>\n<tbody>\n")
        for row, line in zip(rows, cells, strict=True):
            parts.append(f'<tr><th scope="row">{html.escape(str(row["name"]))}</th>')
            for cell, kind in zip(line, kinds, strict=True):
                text = html.escape(cell.text)
                parts.append(f"<td{kind}>{f'<strong>{text}</strong>' if cell.best else text}</td>")
            parts.append("</tr>\n")
        parts.append("</tbody>\n</table>\n</div>\n")
    else:
        parts.append('<p class="note">No results.</p>\n')
    if table.get("note"):
        parts.append(f'<p class="note">{html.escape(str(table["note"]))}</p>\n')
    return "".join(parts)


def _heading(text: Any) -> str:
    return f"<h2>{html.escape(str(text))}</h2>\n"


def _figure(picture: Mapping[str, Any]) -> str:
    path = Path(picture["path"])
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"report: the picture {path} can't be read ({error.strerror or error}).") from error
    if not content.startswith(_PNG_SIGNATURE):
        raise BadInput(f"report: the picture {path} is no PNG file. Save it as PNG.")
    title = html.escape(str(picture["title"]))
    data = base64.b64encode(content).decode("ascii")
    return f'<figure><figcaption>{title}</figcaption><img alt="{title}" src="data:image/png;base64,{data}"></figure>\n'


def write_report(
    path: str | os.PathLike[str],
    title: str,
    facts: Sequence[tuple[str, str]] = (),
    tables: Sequence[Mapping[str, Any]] = (),
    pictures: Sequence[Mapping[str, Any]] = (),
    commands: Sequence[tuple[str, str]] = (),
    footnotes: Sequence[str] = (),
    order: Sequence[str] = SECTIONS,
) -> None:
    """Write a report as one HTML file.

    Args:
        path: the file; its folder is made where it is missing.
        title: heading of the page.
        facts: what and its value: data, machine, seed, time.
        tables: ``title``, ``columns``, ``rows`` (see :func:`markdown_table`) and ``note``, a line below the table.
        pictures: ``title`` and ``path`` of a PNG file, which is embedded.
        commands: what a command does and its line, shown such that one click selects all of it.
        footnotes: paragraphs at the end of the page.
        order: the sections to show, some or all of :data:`SECTIONS`, from top to bottom.

    Raises:
        BadInput: a picture is missing or no PNG, or the file can't be written.
    """
    unknown = [name for name in order if name not in SECTIONS]
    if unknown:
        raise ValueError(f"order names {unknown}; expected some of {SECTIONS}")
    parts: dict[str, Callable[[], str]] = {
        "facts": lambda: _list(facts),
        "tables": lambda: "".join(_table(table) for table in tables),
        "pictures": lambda: _gallery(pictures),
        "commands": lambda: _commands(commands),
    }
    body = "".join(parts[name]() for name in order)
    body += "".join(f'<p class="note">{html.escape(str(text))}</p>\n' for text in footnotes)
    page = _PAGE.substitute(title=html.escape(str(title)), body=body)
    # A file name may hold bytes that are no text; they must not cost the report.
    write_atomically(path, page.encode("utf-8", "replace"))


def _list(facts: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd>\n" for name, value in facts)
    return f"<dl>\n{items}</dl>\n" if items else ""


def _gallery(pictures: Sequence[Mapping[str, Any]]) -> str:
    figures = "".join(_figure(picture) for picture in pictures)
    return f'{_heading("Pictures")}<div class="pictures">\n{figures}</div>\n' if figures else ""


def _commands(commands: Sequence[tuple[str, str]]) -> str:
    blocks = "".join(
        f"<p>{html.escape(str(what))}</p>\n<pre><code>{html.escape(str(command))}</code></pre>\n"
        for what, command in commands
    )
    return _heading("Commands") + blocks if blocks else ""
