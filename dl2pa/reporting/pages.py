"""Pages that need no network: the confusions to zoom into, the classes to sort."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

from dl2pa.escaping import spreadsheet_cell
from dl2pa.reporting.class_metrics import ClassRow, Confusion, Labels, Pair, worst_pairs
from dl2pa.reporting.document import Heading, Html, Paragraph, to_html

_COLUMNS: Mapping[str, str] = {
    "label": "label",
    "name": "class",
    "group": "group",
    "trained": "trained on",
    "images": "images",
    "top1": "top-1 %",
    "top5": "top-5 %",
    "precision": "precision %",
    "confidence": "confidence %",
    "taken_for": "most taken for",
    "taken_for_count": "times",
}
_TEXT = ("name", "group", "taken_for")


def confusion_page(confusion: Confusion, order: Labels, names: Sequence[str], title: str) -> str:
    """The whole matrix on a canvas: zoomed, searched, by row or column, with the worst pairs beside it."""
    hits = int(confusion.count[confusion.true == confusion.predicted].sum())
    images = int(confusion.totals.sum())
    data = {
        "title": title,
        "told": f"{images:,} images, {hits:,} right. Point at a cell.",
        "names": list(names),
        "totals": confusion.totals.tolist(),
        "order": order.tolist(),
        "true": confusion.true.tolist(),
        "predicted": confusion.predicted.tolist(),
        "count": confusion.count.tolist(),
    }
    template = (
        resources.files("dl2pa.reporting").joinpath("templates/confusion.html").read_text(encoding="utf-8")
    )
    inside = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("/*DATA*/", inside, 1)


def pairs_csv(confusion: Confusion, names: Sequence[str]) -> str:
    """Every pair of classes that was confused, worst first."""
    return _csv(
        ("true", "predicted", "images", "share_of_true", "other_way_round"),
        (
            (names[p.true], names[p.predicted], p.count, round(p.share, 6), p.back)
            for p in worst_pairs(confusion, len(confusion.count))
        ),
    )


def classes_csv(rows: Sequence[ClassRow]) -> str:
    """The classes as CSV, in label order."""
    return _csv(tuple(_COLUMNS), (tuple(_plain(v) for v in asdict(row).values()) for row in rows))


def classes_json(rows: Sequence[ClassRow]) -> str:
    """The classes as JSON, in label order."""
    return json.dumps([asdict(row) for row in rows], indent=1) + "\n"


def classes_page(rows: Sequence[ClassRow], title: str) -> str:
    """The classes as a table that sorts by a click and narrows by a search."""
    used = [name for name in _COLUMNS if any(getattr(row, name) is not None for row in rows)]
    heads = {_COLUMNS[name]: name in _TEXT for name in used}
    cells = [[getattr(row, name) for name in used] for row in rows]
    return to_html([Heading(1, title), Paragraph(_HOW), sortable(heads, cells)], title)


_HOW = (
    "Click a column to sort by it, again to turn it round. `top-1` is the share of the class's own images that were \
right, `precision` that of the images taken for the class."
)


def sortable(heads: Mapping[str, bool], rows: Sequence[Sequence[Any]]) -> Html:
    """A table with a search field, sorted by a click on a head.

    Args:
        heads: names of the columns, and whether each is text.
        rows: figures are shown with a digit behind the point; None is empty and sorts last.
    """
    first = "".join(
        f"<th{' class=text' if text else ''} tabindex=0>{html.escape(n)}</th>" for n, text in heads.items()
    )
    texts = list(heads.values())
    body = "".join(
        "<tr>" + "".join(_cell(value, text) for value, text in zip(row, texts, strict=True)) + "</tr>"
        for row in rows
    )
    return Html(
        f'<p><input type=search placeholder="search" aria-label=search></p><div class="wide"><table id="sortable">'
        f"<thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div><script>{_SORT}</script>"
    )


def pair_rows(pairs: Sequence[Pair], names: Sequence[str]) -> list[tuple[str, str, str, str, str]]:
    """Pairs as the cells of a report's table."""
    return [
        (names[p.true], names[p.predicted], f"{p.count:,}", f"{100 * p.share:.0f} %", f"{p.back:,}")
        for p in pairs
    ]


def _cell(value: Any, text: bool) -> str:
    shown = "" if value is None else f"{value:.1f}" if isinstance(value, float) else html.escape(str(value))
    return f"<td class=text>{shown}</td>" if text else f"<td>{shown}</td>"


def _plain(value: Any) -> Any:
    return "" if value is None else round(value, 4) if isinstance(value, float) else value


def _csv(heads: Sequence[str], rows: Any) -> str:
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows([spreadsheet_cell(cell) for cell in row] for row in rows)
    return target.getvalue()


_SORT = """
(() => {
  const table = document.getElementById("sortable"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const style = document.createElement("style");
  style.textContent = "#sortable th{cursor:pointer;position:sticky;top:0}" +
    "#sortable th[aria-sort=ascending]::after{content:' ▲'}" +
    "#sortable th[aria-sort=descending]::after{content:' ▼'}#sortable tbody tr:hover{background:var(--shade)}";
  document.head.append(style);
  heads.forEach((head, column) => {
    const sort = () => {
      const text = head.className === "text", up = head.ariaSort ? head.ariaSort !== "ascending" : true;
      heads.forEach(h => h.ariaSort = null); head.ariaSort = up ? "ascending" : "descending";
      const key = row => row.cells[column].textContent;
      const rows = [...body.rows].sort((a, b) => {
        const x = key(a), y = key(b); if (x === "" || y === "") return (x === "") - (y === "");
        return (up ? 1 : -1) * (text ? x.localeCompare(y, "en", {numeric: true}) : x - y);
      });
      body.append(...rows);
    };
    head.onclick = sort; head.onkeydown = e => { if (e.key === "Enter") sort(); };
  });
  document.querySelector("input[type=search]").oninput = e => {
    const wanted = e.target.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  };
})();
"""
