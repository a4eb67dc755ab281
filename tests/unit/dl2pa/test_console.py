"""Names from data, where they are shown: on a terminal, in a spreadsheet, in MLflow's Markdown and in a page."""

from __future__ import annotations

import csv
import io
import logging
import sys

import pytest

from dl2pa.cli import main
from dl2pa.console import SafeFormatter, safe_output
from dl2pa.errors import UserError, printable
from dl2pa.reporting.class_metrics import confuse
from dl2pa.reporting.document import Bullets, Grid, Heading, Paragraph, to_html, to_markdown
from dl2pa.reporting.pages import pairs_csv, spreadsheet_cell
from dl2pa.tracking.sanitize import markdown_text

TERMINAL = "\x1b]0;title\x07\x1b[2J\x1b[31mred\r\x08\x9b1m\u202eabc"
NAMES = ("=cmd|'/c calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1")
MARKUP = (
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "![x](http://host/pixel)",
    "<script>1</script>",
)


def test_control_characters_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        stream = io.StringIO()
        monkeypatch.setattr(sys, name, stream)
        with safe_output():
            print(TERMINAL, file=getattr(sys, name))
        shown = stream.getvalue()
        assert shown.rstrip("\n").isprintable() and "\\x1b[31mred" in shown
    record = logging.LogRecord("x", logging.INFO, "", 0, "class %s", (TERMINAL,), None)
    assert SafeFormatter().format(record).isprintable()
    assert str(UserError("data.root", "a", f"a folder {TERMINAL}", "Rename it.")).isprintable()
    assert printable("line one\nline\ttwo é 猫") == "line one\nline\ttwo é 猫"


def test_a_file_name_with_control_characters_is_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", f"no such {TERMINAL}"]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\\x1b" in said


@pytest.mark.parametrize("name", NAMES)
def test_class_names_are_not_spreadsheet_formulas(name: str) -> None:
    assert spreadsheet_cell(name) == f"'{name}"
    assert spreadsheet_cell("\r=1") == "\\r=1"
    assert [spreadsheet_cell(cell) for cell in ("cat", -1.5, 3, "", "a=b")] == ["cat", -1.5, 3, "", "a=b"]
    confusion = confuse([0, 1], [1, 0], 2)  # type: ignore[arg-type]
    rows = list(csv.reader(io.StringIO(pairs_csv(confusion, [name, "cat"]), newline="")))
    assert any(name in cell for row in rows for cell in row)
    assert not [cell for row in rows for cell in row if cell[:1] in "=+-@\t\r" and cell[:1]]


@pytest.mark.parametrize("name", MARKUP)
def test_names_are_escaped_in_markdown_and_pages(name: str) -> None:
    blocks = [Heading(1, name), Paragraph(name), Bullets([name]), Grid(["class "], [[name]])]
    markdown = to_markdown(blocks) + markdown_text(name)
    assert "](" not in markdown.replace("\\](", "") and "<" not in markdown.replace("\\<", "")
    page = to_html(blocks, name)
    assert "<img" not in page and "<script>1" not in page and "javascript:" not in page.replace(name, "")
