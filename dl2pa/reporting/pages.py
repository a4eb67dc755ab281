"""Confusion matrix and per-class results as HTML pages and tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dl2pa.errors import printable
from dl2pa.reporting.class_metrics import ClassRow, Confusion, Labels, worst_pairs
from dl2pa.reporting.render import render
from dl2pa.rundir import RunDirectory
from dl2pa.terms import term

_COLUMNS = {
    "label": "label",
    "name": "class",
    "group": "group",
    "trained": "training images",
    "images": "images",
    "top1": "top-1 %",
    "top5": "top-5 %",
    "precision": "precision %",
    "confidence": f"{term('confidence')} %",
    "confidence_calibrated": f"{term('confidence_calibrated')} %",
    "taken_for": "most confused with",
    "taken_for_count": "times",
}
_TEXT = ("name", "group", "taken_for")
Links = Sequence[tuple[str, str]]
"""Text and file of the links to other pages."""


def page_links(run: RunDirectory, page: Path, nearest: bool = False) -> list[tuple[str, str]]:
    """Return text and file of the links from a page of a run to its other pages, which are in the same folder.

    Args:
        nearest: whether the run has the page of nearest images.
    """
    pages = {
        run.summary_page: "summary of the run",
        run.per_class_page: "accuracy of all classes",
        run.confusion_page: "confusion matrix",
        **({run.nearest_page: "nearest images"} if nearest else {}),
    }
    return [(text, path.name) for path, text in pages.items() if path != page]


def confusion_page(
    confusion: Confusion, order: Labels, names: Sequence[str], title: str, links: Links = ()
) -> str:
    """Render the confusion matrix as a page with zoom, search and the most frequent confusions."""
    hits = int(confusion.count[confusion.true == confusion.predicted].sum())
    images = int(confusion.totals.sum())
    data = {
        "overview": f"{images:,} images, {hits:,} correct. Point at a cell for details.",
        "names": list(names),
        "totals": confusion.totals.tolist(),
        "order": order.tolist(),
        "true": confusion.true.tolist(),
        "predicted": confusion.predicted.tolist(),
        "count": confusion.count.tolist(),
    }
    return render("confusion.html", title=title, data=data, links=links)


def classes_page(rows: Sequence[ClassRow], title: str, links: Links = ()) -> str:
    """Render the classes as a table with sorting and search; columns without values are left out."""
    used = [name for name in _COLUMNS if any(getattr(row, name) is not None for row in rows)]
    columns = [(name, _COLUMNS[name], name in _TEXT) for name in used]
    content = {"columns": columns, "rows": [asdict(row) for row in rows], "links": links}
    return render("per_class.html", title=title, **content)


def pairs_csv(confusion: Confusion, names: Sequence[str]) -> str:
    """Return every confused pair of classes as CSV, most frequent first."""
    return _csv(
        ("true", "predicted", "images", "share_of_true", "other_way_round"),
        (
            (names[p.true], names[p.predicted], p.count, round(p.share, 6), p.back)
            for p in worst_pairs(confusion, len(confusion.count))
        ),
    )


def classes_csv(rows: Sequence[ClassRow]) -> str:
    """Return the classes as CSV, in label order."""
    return _csv(tuple(_COLUMNS), (tuple(_plain(asdict(row)[name]) for name in _COLUMNS) for row in rows))


def classes_json(rows: Sequence[ClassRow]) -> str:
    """Return the classes as JSON, in label order."""
    return json.dumps([asdict(row) for row in rows], indent=1) + "\n"


def _plain(value: Any) -> Any:
    return "" if value is None else round(value, 4) if isinstance(value, float) else value


def spreadsheet_cell(cell: Any) -> Any:
    """Format a CSV cell; an apostrophe precedes text that a spreadsheet would evaluate."""
    if not isinstance(cell, str):
        return cell
    text = printable(cell)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") else text


def _csv(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows([spreadsheet_cell(cell) for cell in row] for row in rows)
    return target.getvalue()
