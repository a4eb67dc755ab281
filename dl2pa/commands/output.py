"""Output of commands: a table for people, one JSON line for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dl2pa.terms import term


def say(result: Mapping[str, Any], as_json: bool, title: str) -> None:
    """Print a result: JSON as the last line of standard output, or a two-column table."""
    if as_json:
        print(json.dumps(result), flush=True)  # noqa: T201
        return
    width = max((len(term(key)) for key in result), default=0)
    lines = [title, *(f"  {term(key):<{width}}  {short(value)}" for key, value in result.items())]
    print("\n".join(lines), flush=True)  # noqa: T201


def note(text: str) -> None:
    """Print a line on standard error, so that standard output contains only the result."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def table(rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns; the first row is the header."""
    print("\n".join(aligned(rows)), flush=True)  # noqa: T201


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def short(value: Any) -> str:
    """Format a value for people: four significant digits, at most 12 entries of a list."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    if isinstance(value, list) and len(value) > 12:
        return f"{', '.join(str(v) for v in value[:12])}, … ({len(value)} in all)"
    return ", ".join(str(v) for v in value) if isinstance(value, list) else str(value)


@contextmanager
def progress_bar(title: str) -> Generator[Callable[[int, int], None]]:
    """Show a progress bar if standard error is a terminal; yields the function that updates it."""
    from tqdm import tqdm

    with tqdm(desc=title, leave=False, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
