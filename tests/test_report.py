from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from common.errors import BadInput
from common.report import markdown_table, write_report

NAN = float("nan")
DASH = "\N{EN DASH}"
COLUMNS = [
    {"key": "dice", "title": "Dice", "better": "higher", "digits": 3},
    {"key": "hd95", "title": "HD95 [mm]", "better": "lower", "digits": 2},
    {"key": "failed", "title": "failed", "better": None},
]
ROWS = [
    {"name": "teacher", "dice": [0.80, 0.82], "hd95": 3.0, "failed": "2"},
    {"name": "student", "dice": [0.85, 0.87], "hd95": 2.5, "failed": None},
]
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Reads a page, checks that its elements are closed in order, and keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    figure = Figure(figsize=(0.5, 0.5))
    figure.subplots().plot([0, 1])
    figure.savefig(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def render(tmp_path: Path, **content: object) -> tuple[str, Page]:
    path = tmp_path / "new" / "report.html"
    write_report(path, **{"title": "Report", **content})
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_markdown_table_shows_mean_and_deviation_and_marks_the_best():
    assert markdown_table(COLUMNS, ROWS) == "\n".join(
        [
            "|  | Dice | HD95 [mm] | failed |",
            "| --- | ---: | ---: | ---: |",
            "| teacher | 0.810 ± 0.014 | 3.00 | 2 |",
            f"| student | **0.860 ± 0.014** | **2.50** | {DASH} |",
        ]
    )


def cells_of(*values: object, better: str | None = "higher", digits: int = 2) -> list[str]:
    column = {"key": "x", "title": "x", "better": better, "digits": digits}
    table = markdown_table([column], [{"name": "row", "x": value} for value in values])
    return [line.split(" | ")[1].removesuffix(" |") for line in table.splitlines()[2:]]


def test_best_follows_the_columns_direction():
    assert cells_of(1.0, 3.0, 2.0) == ["1.00", "**3.00**", "2.00"]
    assert cells_of(1.0, 3.0, 2.0, better="lower") == ["**1.00**", "3.00", "2.00"]
    assert cells_of(1.0, 3.0, better=None) == ["1.00", "3.00"]
    with pytest.raises(ValueError, match="better"):
        cells_of(1.0, better="bigger")


def test_values_that_look_equal_are_equally_good():
    assert cells_of(0.851, 0.849, 0.5) == ["**0.85**", "**0.85**", "0.50"]
    assert cells_of(0.851, 0.849) == ["0.85", "0.85"]
    assert cells_of(0.851, None) == ["0.85", DASH]


@pytest.mark.parametrize("value", [NAN, float("inf"), None, [], [NAN, None], np.float32("nan")])
def test_what_does_not_exist_is_a_dash_and_never_the_best(value: object):
    assert cells_of(value, 1.0, 2.0, better="lower") == [DASH, "**1.00**", "2.00"]


def test_a_missing_key_is_a_dash():
    assert markdown_table([{"key": "x", "title": "x"}], [{"name": "row"}]).endswith(f"| row | {DASH} |")


def test_a_mean_over_some_seeds_says_so_and_is_not_the_best():
    assert cells_of([0.9, NAN, 0.7], [0.5, 0.5, 0.5], 0.4) == ["0.80 ± 0.14 (2 of 3)", "**0.50 ± 0.00**", "0.40"]


def test_numbers_of_other_kinds():
    assert cells_of(np.float32(0.5), 1, [0.25], -0.001, better=None) == ["0.50", "1.00", "0.25", "0.00"]
    with pytest.raises(TypeError, match="expected a number"):
        cells_of({"mean": 1.0})


def test_markdown_text_stays_in_its_cell():
    row = {"name": "a|b\n<i>*c* `d`", "x": "e|f"}
    last = markdown_table([{"key": "x", "title": "g|h"}], [row]).splitlines()[-1]
    assert last == r"| a\|b \<i>\*c\* `d` | e\|f |"


def test_report_shows_tables_with_the_best_in_bold(tmp_path: Path):
    tables = [{"title": "Segmentation", "note": "validation cases", "columns": COLUMNS, "rows": ROWS}]
    text, page = render(tmp_path, facts=[("seed", "0")], tables=tables, footnotes=["at the end"])
    assert page.texts["strong"] == ["0.860 ± 0.014", "2.50"]
    assert page.texts["td"] == ["", "0.810 ± 0.014", "3.00", "2", "0.860 ± 0.014", "2.50", DASH]
    assert page.texts["th"] == ["Dice", "HD95 [mm]", "failed", "teacher", "student"]
    assert page.texts["h1"] == page.texts["title"] == ["Report"]
    assert (page.texts["dt"], page.texts["dd"]) == (["seed"], ["0"])
    assert page.texts["p"] == ["validation cases", "at the end"]
    # Counts stand under numbers, words to the left.
    assert 'class="text"' not in text
    # On a narrow screen the table scrolls, not the page.
    assert '<div class="scroll"' in text
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", text)


def test_a_column_of_words_is_set_to_the_left(tmp_path: Path):
    columns = [{"key": "from", "title": "weights from"}, *COLUMNS]
    rows = [{**row, "from": "teacher"} for row in ROWS]
    text, _ = render(tmp_path, tables=[{"title": "t", "columns": columns, "rows": rows}])
    assert text.count('class="text"') == 3
    assert '<th scope="col" class="text">weights from</th>' in text


def test_a_table_without_rows_says_so(tmp_path: Path):
    _, page = render(tmp_path, tables=[{"title": "Empty", "columns": COLUMNS, "rows": []}])
    assert "table" not in page.texts
    assert page.texts["p"] == ["No results."]


def test_everything_is_escaped(tmp_path: Path, picture: Path):
    evil = "<script>alert('1')</script>\"& $title"
    text, page = render(
        tmp_path,
        title=evil,
        facts=[(evil, evil)],
        tables=[
            {
                "title": evil,
                "note": evil,
                "columns": [{"key": "x", "title": evil}],
                "rows": [{"name": evil, "x": evil}],
            }
        ],
        pictures=[{"title": evil, "path": picture}],
        commands=[(evil, evil)],
        footnotes=[evil],
    )
    assert "<script" not in text
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    for tag in ("title", "h1", "dt", "dd", "p", "th", "td", "figcaption", "code"):
        assert evil in page.texts[tag], tag
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert images[0]["alt"] == evil
    assert len(images[0]) == 2


def test_pictures_are_embedded_whole(tmp_path: Path, picture: Path):
    content = picture.read_bytes()
    _, page = render(tmp_path, pictures=[{"title": "curves", "path": picture}])
    (source,) = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    kind, data = source.split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data, validate=True) == content


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path, picture: Path):
    text, page = render(
        tmp_path,
        tables=[{"title": "t", "columns": COLUMNS, "rows": ROWS}],
        pictures=[{"title": "p", "path": picture}],
        commands=[("train", "python -m monai.bundle run")],
    )
    assert not re.search(r"https?:|//\w|@import|url\(", re.sub(r"base64,[^\"]*", "", text))
    for _, attributes in page.tags:
        assert "href" not in attributes
        assert attributes.get("src", "data:").startswith("data:")
    policy = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_commands_can_be_copied_as_they_are(tmp_path: Path):
    command = "python -m monai.bundle run \\\n  --config_file \"['a.json', 'b.json']\" && echo <done>"
    _, page = render(tmp_path, commands=[("train the teacher", command)])
    assert page.texts["code"] == [command]


def test_sections_come_in_the_order_asked_for(tmp_path: Path, picture: Path):
    content = {
        "facts": [("seed", "0")],
        "tables": [{"title": "Table", "columns": COLUMNS, "rows": ROWS}],
        "pictures": [{"title": "p", "path": picture}],
        "commands": [("train", "run")],
    }
    _, page = render(tmp_path, **content)
    assert page.texts["h2"] == ["Table", "Pictures", "Commands"]
    _, page = render(tmp_path, **content, order=("commands", "tables"))
    assert page.texts["h2"] == ["Commands", "Table"]
    assert "img" not in {tag for tag, _ in page.tags}
    with pytest.raises(ValueError, match="charts"):
        render(tmp_path, order=("charts",))


def test_an_empty_report_has_no_empty_headings(tmp_path: Path):
    _, page = render(tmp_path)
    assert "h2" not in page.texts


def test_a_bad_picture_is_named_and_leaves_the_older_report(tmp_path: Path):
    path = tmp_path / "report.html"
    write_report(path, "old")
    before = path.read_bytes()
    with pytest.raises(BadInput, match=r"missing\.png"):
        write_report(path, "new", pictures=[{"title": "p", "path": tmp_path / "missing.png"}])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(BadInput, match=r"text\.png"):
        write_report(path, "new", pictures=[{"title": "p", "path": tmp_path / "text.png"}])
    assert path.read_bytes() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["report.html", "text.png"]


def test_a_name_that_is_no_text_does_not_cost_the_report(tmp_path: Path):
    text, _ = render(tmp_path, facts=[("data", "folder\udcff")])
    assert "folder?" in text
