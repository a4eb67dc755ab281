"""Escaping of names from data in Markdown and CSV."""

from __future__ import annotations

import re
from typing import Any

from dl2pa.errors import printable

_MARKDOWN = re.compile(r"([\\*<]|\](?=[(\[:])|(?<!\w)_|_(?!\w))")


def escape_markdown(text: str) -> str:
    """Escape emphasis, links and HTML; the caller escapes code spans and table separators."""
    return _MARKDOWN.sub(r"\\\1", text)


def markdown_text(text: object) -> str:
    """Format text as one line of plain Markdown."""
    return escape_markdown(" ".join(str(text).split())).replace("`", "\\`").replace("|", "\\|")


def spreadsheet_cell(cell: Any) -> Any:
    """Format a CSV cell; an apostrophe precedes text that a spreadsheet would evaluate."""
    if not isinstance(cell, str):
        return cell
    text = printable(cell)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") else text
