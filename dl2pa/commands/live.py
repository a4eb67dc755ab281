"""A block of lines on a terminal that is drawn again in place."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Sequence
from typing import TextIO

from dl2pa.errors import printable
from dl2pa.redaction import redact

_UP_AND_CLEAR = "\x1b[{}F\x1b[J"
"""Move to the start of the line N lines above and clear the screen from there."""


def can_redraw(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal on which lines can be drawn again."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


class LiveBlock:
    """Lines at the end of a terminal's output; each `show` replaces them.

    Text is shown without secrets and control characters. Lines that are wider than the terminal are cut, and lines
    that do not fit in its height are left out, because they could not be drawn again.

    Args:
        stream: the terminal itself, not a stream that escapes control characters.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = 0

    @property
    def height(self) -> int:
        """Number of lines that fit."""
        return max(1, shutil.get_terminal_size().lines - 1)

    def show(self, lines: Sequence[str]) -> None:
        """Replace the block; no line removes it."""
        columns = shutil.get_terminal_size().columns
        kept = [cut(one_line(line), columns - 1) for line in lines[: self.height]]
        text = _UP_AND_CLEAR.format(self._shown) if self._shown else ""
        self._stream.write(text + "".join(f"{line}\n" for line in kept))
        self._stream.flush()
        self._shown = len(kept)


def one_line(text: str) -> str:
    """Text as one line without secrets and control characters."""
    return printable(redact(text)).replace("\n", " ").replace("\t", " ")


def cut(text: str, columns: int) -> str:
    """Cut a line that is wider than a number of terminal columns; the last column then shows `…`."""
    if text.isascii() and len(text) <= columns:
        return text
    width = 0
    for position, character in enumerate(text):
        width += _columns_of(character)
        if width > columns:
            return _cut_before(text[:position], columns - 1) + "…"
    return text


def _cut_before(text: str, columns: int) -> str:
    while sum(map(_columns_of, text)) > columns:
        text = text[:-1]
    return text


def _columns_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
