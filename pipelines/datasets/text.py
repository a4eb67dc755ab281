"""Text of small files that other programs wrote: class lists, labels and word lists."""

from __future__ import annotations

import codecs
import re

_LINE_END = re.compile(r"\r\n|\r|\n")


def decode_text(data: bytes) -> str:
    """Decode UTF-8 with or without byte-order mark, or UTF-16 with one; the mark is removed.

    Raises:
        ValueError: any other encoding.
    """
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from None


def lines_of(text: str) -> list[str]:
    """The lines of a text. ``str.splitlines`` would also divide names at characters such as U+2028."""
    return _LINE_END.split(text)
