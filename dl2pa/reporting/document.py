"""A document of headings, sentences, tables and pictures; as Markdown and as one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dl2pa.escaping import escape_markdown


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """A table.

    Args:
        heads: column names; a column whose name ends in a space is text, the others are figures.
        rows: as many cells each.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """Args:
    name: of its file, without a suffix.
    svg: the picture; on a page of its own PNG will do too.
    text: what it shows, for those who do not see it.
    """

    name: str
    svg: bytes
    text: str


@dataclass(frozen=True)
class Html:
    """Ready HTML, trusted as it is; Markdown leaves it out."""

    text: str


Block = Heading | Paragraph | Bullets | Grid | Picture | Html
PICTURES = "plots"
"""Folder of the pictures beside the Markdown file."""
_CODE = re.compile(r"`([^`]*)`")


def code(text: object) -> str:
    """Text to be shown as it is: a path, a key, a command."""
    return f"`{str(text).replace('`', chr(39))}`"


def to_markdown(blocks: Sequence[Block]) -> str:
    """Pictures are named as files in ``PICTURES``."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_md(text)}"
        case Paragraph(text):
            return _md(text)
        case Bullets(items):
            return "\n".join(f"- {_md(item)}" for item in items)
        case Grid(heads, rows):
            rule = ["---" if _is_text(head) else "--:" for head in heads]
            lines = [
                [_md(h.strip(), True) for h in heads],
                rule,
                *([_md(c, True) for c in row] for row in rows),
            ]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Picture(name, _, text):
            return f"![{_md(text)}]({PICTURES}/{name}.svg)"
        case Html():
            return ""


def _md(text: str, in_table: bool = False) -> str:
    """Text on one line, its special characters harmless; code spans stay."""
    parts = _CODE.split(" ".join(text.split()))
    plain = [escape_markdown(part) for part in parts[::2]]
    spans = [f"`{part}`" for part in parts[1::2]]
    joined = "".join(a + b for a, b in zip(plain, [*spans, ""], strict=True))
    return joined.replace("|", r"\|") if in_table else joined


def to_html(blocks: Sequence[Block], title: str) -> str:
    """One page with its style and its pictures inside."""
    body = "\n".join(_html(block) for block in blocks)
    head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_inline(item)}</li>" for item in items) + "\n</ul>"
        case Grid(heads, rows):
            kinds = [' class="text"' if _is_text(head) else "" for head in heads]
            first = _row("th", [head.strip() for head in heads], kinds)
            inside = "\n".join(_row("td", row, kinds) for row in rows)
            return f'<div class="wide"><table>\n<thead>{first}</thead>\n<tbody>\n{inside}\n</tbody></table></div>'
        case Picture(_, svg, text):
            return f'<p><img alt="{html.escape(text)}" src="{data_url(svg)}"></p>'
        case Html(text):
            return text


def data_url(picture: bytes) -> str:
    """A picture (PNG, JPEG, else SVG) as an address that holds it."""
    kinds = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg"}
    kind = next((kind for magic, kind in kinds.items() if picture.startswith(magic)), "svg+xml")
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _row(tag: str, cells: Sequence[str], kinds: Sequence[str]) -> str:
    inside = "".join(f"<{tag}{kind}>{_inline(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
    return f"<tr>{inside}</tr>"


def _inline(text: str) -> str:
    return _CODE.sub(r"<code>\1</code>", html.escape(text))


def _is_text(head: str) -> bool:
    return head.endswith(" ")


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c22; --paper: #fff; --line: #d5d5dd; --shade: #f4f4f7 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6ea; --paper: #17171b; --line: #3c3c45; --shade: #222228 } }
body { margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, sans-serif }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .75rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap }
th { background: var(--shade) }
.text { text-align: left; white-space: normal }
td.text:last-child { min-width: 22rem }
code { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere }
img { max-width: 100%; background: #fff; border-radius: 4px }
"""
