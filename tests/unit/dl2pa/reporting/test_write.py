from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dl2pa.config.published import load_published
from dl2pa.errors import UserError
from dl2pa.reporting import compare, read_run, record, write_report
from dl2pa.reporting.verdict import verdict

MakeRun = Callable[..., Path]
SHIPPED = Path(__file__).resolve().parents[4] / "configs/published.yaml"
PUBLISHED, CELLS = load_published(SHIPPED)


def cell_of(table: str, row: str, column: Any) -> Any:
    return next(c for c in CELLS if (c.table, c.row, c.column) == (table, row, column))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def runs(folder: Path, make_runs_in: Callable[[Path], MakeRun]) -> list[Path]:
    """Three seeds of a balanced cell, a short run of it, two seeds of a suspect long-tailed cell, a run without a cell
    and an unfinished run."""
    make_run = make_runs_in(folder)
    ten, tail = cell_of("cifar100", "dl2pa", 10), cell_of("cifar100_lt", "psc", 0.01)
    size = {"num_validated": 10000}
    long_tail = {"top1_head": 70.0, "top1_medium": 45.0, "top1_tail": 12.5}
    return [
        *(make_run(ten.load([f"train.seed={s}"]), last=57.0 + s, best=58.0 + s, **size) for s in range(3)),
        make_run(ten.load(["train.max_steps=400"]), last=11.5, best=12.25, **size),
        *(
            make_run(tail.load([f"train.seed={s}"]), last=44.0 + s, best=44.5 + s, **size, **long_tail)
            for s in (0, 1)
        ),
        make_run({"method.name": "hpn"}, last=33.75, name="<script>alert(1)</script> | odd"),
        make_run({}, name="going", state="running", status={"step": 70, "total_steps": 2000}),
    ]


@pytest.fixture(scope="module")
def report(runs: list[Path], folder: Path) -> Path:
    """Report of the runs; read-only."""
    write_report(compare([read_run(path) for path in runs], SHIPPED), folder / "out")
    return folder / "out"


def rows_of(markdown: str) -> list[list[str]]:
    return [
        [c.strip() for c in line.strip("|").split(" | ")] for line in markdown.splitlines() if line[:1] == "|"
    ]


def section(markdown: str, title: str) -> str:
    return next(part for part in markdown.split("\n## ") if part.startswith(title))


def test_every_published_figure_is_shown_above_the_runs(report: Path) -> None:
    markdown = (report / "report.md").read_text(encoding="utf-8")
    for table in PUBLISHED.tables.values():
        shown = rows_of(section(markdown, table.title))
        for name, row in table.rows.items():
            (line,) = [
                cells for cells in shown if re.match(rf"{name}\b", cells[0]) and cells[1] == "published"
            ]
            figures = [re.sub(r" \[s\d+\]", "", cell) for cell in line[2:]]
            assert figures == ["–" if value is None else str(value) for value in row.top1]
    balanced = rows_of(section(markdown, PUBLISHED.tables["cifar100"].title))
    assert ["", "best epoch", "59.00 ± 1.00 (n = 3)", "–", "–", "–"] in balanced
    assert ["", "last epoch", "58.00 ± 1.00 (n = 3)", "–", "–", "–"] in balanced


def test_the_report_starts_with_a_verdict_and_the_tables_with_runs(report: Path) -> None:
    markdown = (report / "report.md").read_text(encoding="utf-8")
    lead = markdown.split("\n\n")[1]
    assert lead.startswith(f"2 of {len(CELLS)} published figures have runs of full length: 2 reached, 0 not;")
    assert "On synthetic, hpn (d = 6) has 33.75 % (n = 1)." in lead
    titles = [part.partition("\n")[0] for part in markdown.split("\n## ")[1:]]
    with_runs = [PUBLISHED.tables[name].title for name in ("cifar100", "cifar100_lt")]
    assert titles[:2] == [table.title for table in PUBLISHED.tables.values() if table.title in with_runs]
    html = (report / "report.html").read_text(encoding="utf-8")
    folded = re.findall(r"<summary>(.*?)</summary>", html)
    assert len(folded) == len(PUBLISHED.tables) - 2 and all(title.endswith("(no run)") for title in folded)


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (
            (60.0, 61.0, 62.0),
            "29.00 points above hpn (d = 6) with 61.00 ± 1.00 % (n = 3); seeds do not explain it.",
        ),
        (
            (89.0, 90.0, 91.0),
            "0.00 points above hpn (d = 6) with 90.00 ± 1.00 % (n = 3); seeds may explain it.",
        ),
        ((60.0,), "30.00 points above hpn (d = 6) with 60.00 % (n = 1); seeds"),
    ],
)
def test_the_verdict_names_the_best_runs_and_the_noise_of_seeds(
    make_run: MakeRun, second: tuple[float, ...], expected: str
) -> None:
    paths = [make_run({"train.seed": s}, last=89.0 + s) for s in range(3 if len(second) > 1 else 2)]
    paths += [make_run({"train.seed": s, "method.name": "hpn"}, last=v) for s, v in enumerate(second)]
    text = verdict(compare([read_run(path) for path in paths], None))
    assert text.startswith("On synthetic, ") and "is best with" in text
    assert "points above" in text and (expected.split(" with")[1] in text)


def test_suspect_figures_are_marked_and_the_reason_is_given(report: Path) -> None:
    markdown = (report / "report.md").read_text(encoding="utf-8")
    for cell in CELLS:
        text = section(markdown, PUBLISHED.tables[cell.table].title)
        line = next(c for c in rows_of(text) if re.match(rf"{cell.row}\b", c[0]) and c[1] == "published")
        shown = line[2 + PUBLISHED.tables[cell.table].columns.index(cell.column)]
        mark = re.search(r"\[(s\d+)\]", shown)
        assert (mark is not None) == (cell.suspect is not None), cell
        if mark is not None:
            assert f"- [{mark[1]}] suspect: {cell.suspect}." in text
        note = PUBLISHED.tables[cell.table].rows[cell.row].note
        assert note is None or note in text


def test_full_and_short_runs_have_separate_lines(report: Path) -> None:
    text = section((report / "report.md").read_text(encoding="utf-8"), PUBLISHED.tables["cifar100"].title)
    full, short = [cells for cells in rows_of(text) if cells[:2] == ["dl2pa", "10"]]
    assert full[2:9] == ["57.21", "59.00 ± 1.00", "+1.79", "58.00 ± 1.00", "3", "3.00 ± 0.00", "25,000"]
    assert full[9] == "full"
    assert full[10].startswith("squared_cosine, dynamic; sgd 1.28") and "250 epochs, batch 128" in full[10]
    assert short[2:9] == ["57.21", "12.25", "–", "11.50", "1", "3.00", "400"]
    assert short[9] == "SHORT: 400 steps, 4 epochs done"


def test_only_long_tailed_tables_show_head_medium_and_tail(report: Path) -> None:
    markdown = (report / "report.md").read_text(encoding="utf-8")
    table = PUBLISHED.tables["cifar100_lt"]
    shown = rows_of(section(markdown, table.title))
    heads = next(cells for cells in shown if cells[:2] == ["method", "imbalance"])
    line = next(cells for cells in shown if cells[:2] == ["psc", "0.01"])
    values = dict(zip(heads, line, strict=True))
    assert [values[name] for name in ("head", "medium", "tail")] == [
        "70.00 ± 0.00",
        "45.00 ± 0.00",
        "12.50 ± 0.00",
    ]
    assert (values["d"], values["n"], values["published"]) == ("128", "2", "43.0 [s1]")
    assert "head" not in section(markdown, PUBLISHED.tables["cifar100"].title)


def test_unmatched_and_unfinished_runs_are_listed(report: Path, runs: list[Path]) -> None:
    markdown = (report / "report.md").read_text(encoding="utf-8")
    others = section(markdown, "Runs without a published figure")
    (line,) = [cells for cells in rows_of(others) if cells[0] == "hpn"]
    assert line[2:6] == ["6", "33.75", "33.75", "1"]
    unfinished = section(markdown, "Unfinished runs")
    assert f"| `{runs[-1]}` | running | at step 70 of 2,000 |" in unfinished
    finished = section(markdown, "Finished runs")
    counted = [cells[0] for cells in rows_of(finished) if cells[0].startswith("`")]
    assert counted[:6] == [f"`{path}`" for path in runs[:6]]
    assert len(counted) == 7


class Page(HTMLParser):
    """References, images and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "poster", "action", "style", "background"):
                (self.images if tag == "img" and name == "src" else self.references).append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_html_is_self_contained(report: Path) -> None:
    text = (report / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.references == []
    assert (
        page.tags & {"script", "link", "iframe", "object", "embed", "base", "video", "audio", "svg"} == set()
    )
    assert re.search(r"url\(|@import|@font-face", text) is None
    assert len(page.images) == 5
    for source in page.images:
        kind, _, data = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        svg = base64.b64decode(data)
        assert b"DOCTYPE" not in svg
        names = {b"http://www.w3.org/2000/svg", b"http://www.w3.org/1999/xlink"}
        assert set(re.findall(rb"\w+://[^\"\s]+", svg)) == names, "XML namespaces only"
        drawing = ElementTree.fromstring(svg)
        assert drawing.tag.endswith("svg")
        targets = [
            v for e in drawing.iter() for k, v in e.attrib.items() if k.endswith("href") or "url(" in v
        ]
        assert targets and all(re.fullmatch(r"(url\()?#[\w-]+\)?", target) for target in targets)


def test_html_and_markdown_have_the_same_cells(report: Path) -> None:
    page = Page((report / "report.html").read_text(encoding="utf-8"))
    markdown = (report / "report.md").read_text(encoding="utf-8")
    for cells in rows_of(markdown):
        for cell in cells:
            plain = cell.strip("`").replace("\\", "")
            assert set(cell) <= set("-:") or plain in page.text, cell
    assert "<script>alert(1)</script> | odd" in page.text


def test_the_figures_of_the_markdown_exist(report: Path) -> None:
    named = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", (report / "report.md").read_text(encoding="utf-8"))
    assert len(named) == 5
    assert {report / name for name in named} == set((report / "plots").iterdir())


def test_the_same_runs_give_the_same_report(runs: list[Path], report: Path, tmp_path: Path) -> None:
    written = write_report(compare([read_run(path) for path in runs], SHIPPED), tmp_path / "again")
    for path in written:
        assert path.read_bytes() == (report / path.relative_to(tmp_path / "again")).read_bytes()


def test_the_json_record(runs: list[Path], report: Path) -> None:
    values = json.loads((report / "report.json").read_text(encoding="utf-8"))
    assert values == json.loads(json.dumps(record(compare([read_run(path) for path in runs], SHIPPED))))
    cell = next(c for c in values["tables"]["cifar100"] if (c["row"], c["column"]) == ("dl2pa", 10))
    full, short = cell["ours"]
    assert (cell["published"], cell["suspect"], full["length"], short["length"]) == (
        57.21,
        None,
        "full",
        "short",
    )
    assert full["top1_best"] == {"mean": 59.0, "std": 1.0, "n": 3}
    assert (full["seeds"], full["runs"]) == ([0, 1, 2], [str(path) for path in runs[:3]])
    assert (short["steps"], short["top1_last"]) == (400, {"mean": 11.5, "std": None, "n": 1})
    suspect = next(c for c in values["tables"]["cifar100_lt"] if (c["row"], c["column"]) == ("psc", 0.01))
    assert suspect["suspect"] and suspect["ours"][0]["top1_tail"]["mean"] == 12.5
    assert [entry["run_dir"] for entry in values["unfinished"]] == [str(runs[-1])]
    assert sum(len(cells) for cells in values["tables"].values()) == len(CELLS)


def test_an_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        write_report(compare([], None), tmp_path / "file")
    assert caught.value.field == "--out"


def test_the_calibrated_error_has_a_column_if_runs_have_a_temperature(
    make_run: MakeRun, tmp_path: Path
) -> None:
    fitted = [make_run({"train.seed": s}, ece_last=50.0, ece_calibrated=2.0 + s) for s in (0, 1)]
    other = make_run({"method.name": "hpn"}, ece_last=4.0)
    content = compare([read_run(path) for path in (*fitted, other)], None)
    write_report(content, tmp_path / "out")
    rows = rows_of((tmp_path / "out/report.md").read_text())
    head = next(row for row in rows if row[0] == "method")
    column = head.index("ECE, calibrated")
    assert head[column - 1] == "ECE, raw"
    values = {row[0]: row[column - 1 : column + 1] for row in rows if len(row) == len(head)}
    assert values["dl2pa"] == ["50.00 ± 0.00", "2.50 ± 0.71"]
    assert values["hpn"] == ["4.00", "–"]
    (group,) = [g for g in record(content)["others"] if g["method"] == "dl2pa"]
    assert group["ece_calibrated"]["mean"] == 2.5 and group["nll"] is None
