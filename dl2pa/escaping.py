"""Names from data, written so that the place where they are shown takes them as text."""

from __future__ import annotations

import re
from typing import Any

from dl2pa.errors import printable

_MARKDOWN = re.compile(r"([\\*<]|\](?=[(\[:])|(?<!\w)_|_(?!\w))")


def escape_markdown(text: str) -> str:
    """Emphasis, links and HTML escaped; code spans and the bars of a table are the caller's."""
    return _MARKDOWN.sub(r"\\\1", text)


def markdown_text(text: object) -> str:
    """Any text as one line of plain Markdown."""
    return escape_markdown(" ".join(str(text).split())).replace("`", "\\`").replace("|", "\\|")


def spreadsheet_cell(cell: Any) -> Any:
    """A cell of a CSV file; a text that a spreadsheet would calculate gets an apostrophe in front."""
    if not isinstance(cell, str):
        return cell
    text = printable(cell)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") else text
