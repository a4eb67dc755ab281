"""Names from data, written so that the place where they are shown takes them as text. Almost a leaf."""

from __future__ import annotations

import re
from typing import Any

from dl2pa.errors import printable

_MARKDOWN = re.compile(r"([\\*<`|]|\](?=[(\[:])|(?<!\w)_|_(?!\w))")


def markdown_text(text: object) -> str:
    """Text on one line whose Markdown and HTML do nothing."""
    return _MARKDOWN.sub(r"\\\1", " ".join(str(text).split()))


def spreadsheet_cell(cell: Any) -> Any:
    """A cell of a CSV file; a text that a spreadsheet would calculate gets an apostrophe in front."""
    if not isinstance(cell, str):
        return cell
    text = printable(cell)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") else text
