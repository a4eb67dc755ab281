"""Documents of headings, paragraphs, tables and figures, written as Markdown or as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dl2pa.reporting.render import CODE, render
from dl2pa.tracking.sanitize import escape_markdown

T = TypeVar("T")


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str
    is_lead: bool = False
    """Whether it summarizes the document, and is set in larger type."""


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """A table.

    Args:
        heads: column names; a trailing space marks a text column, the others are numeric.
        rows: one cell per column.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def columns(self) -> list[tuple[str, bool]]:
        """Name of each column and whether it contains text."""
        return [(head.strip(), head.endswith(" ")) for head in self.heads]


@dataclass(frozen=True)
class Picture:
    """A figure.

    Args:
        name: file name without suffix.
        svg: content.
        text: alternative text.
    """

    name: str
    svg: bytes
    text: str


@dataclass(frozen=True)
class Folded:
    """A section that the page shows only on request. Markdown has no such form and shows it under a heading."""

    title: str
    blocks: Sequence[Block]

    @property
    def parts(self) -> list[tuple[str, Block]]:
        """The blocks with their kinds."""
        return with_kinds(self.blocks)


Block = Heading | Paragraph | Bullets | Grid | Picture | Folded
PICTURES = "plots"
"""Folder of the figures, relative to the Markdown file."""


def grid(columns: Mapping[str, Callable[[T], str]], items: Iterable[T]) -> Grid:
    """Build a table with one row per item from the function of each column."""
    return Grid(list(columns), [[cell(item) for cell in columns.values()] for item in items])


def code(text: object) -> str:
    """Format a path, a key or a command as a code span."""
    return f"`{str(text).replace('`', chr(39))}`"


def to_html(blocks: Sequence[Block], title: str) -> str:
    """Render the document as one HTML page with embedded style and figures."""
    return render("report.html", title=title, blocks=with_kinds(blocks))


def with_kinds(blocks: Sequence[Block]) -> list[tuple[str, Block]]:
    """Return each block with the name of its class, by which the template selects its form."""
    return [(type(block).__name__, block) for block in blocks]


def pictures_of(blocks: Sequence[Block]) -> list[Picture]:
    """Return the figures of a document, also those in folded sections."""
    nested = (pictures_of(block.blocks) if isinstance(block, Folded) else [block] for block in blocks)
    return [block for part in nested for block in part if isinstance(block, Picture)]


def to_markdown(blocks: Sequence[Block]) -> str:
    """Render the document as Markdown; figures are linked as files in ``PICTURES``."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_md(text)}"
        case Paragraph(text):
            return _md(text)
        case Folded(title, parts):
            return "\n\n".join([f"## {_md(title)}", *map(_markdown, parts)])
        case Bullets(items):
            return "\n".join(f"- {_md(item)}" for item in items)
        case Grid(_, rows):
            lines = [
                [_md(name, True) for name, _ in block.columns],
                ["---" if is_text else "--:" for _, is_text in block.columns],
                *([_md(cell, True) for cell in row] for row in rows),
            ]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Picture(name, _, text):
            return f"![{_md(text)}]({PICTURES}/{name}.svg)"


def _md(text: str, in_table: bool = False) -> str:
    """Join lines and escape everything except code spans."""
    parts = CODE.split(" ".join(text.split()))
    plain = [escape_markdown(part) for part in parts[::2]]
    spans = [f"`{part}`" for part in parts[1::2]]
    joined = "".join(a + b for a, b in zip(plain, [*spans, ""], strict=True))
    return joined.replace("|", r"\|") if in_table else joined
