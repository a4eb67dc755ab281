"""Run a Python file with `# %%` cells and write its text, code and printed output as a Markdown page.

PYTHONPATH=.:tests python -m support.notebook docs/examples/NAME.py > docs/examples/NAME.md
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)
_COMMENT = re.compile(r"^# ?", re.MULTILINE)
_SECONDS = re.compile(r"\d+(\.\d+)? s\b")
_DECIMAL = re.compile(r"-?\d+\.\d+")


def render(file: Path, folder: Path) -> str:
    """Run the cells in one namespace with `folder` as the current folder; return the page."""
    parts = [f"<!-- Generated from {file.name} by tests/support/notebook.py; do not edit. -->"]
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.chdir(folder):
        for kind, source in _cells(file.read_text(encoding="utf-8")):
            if kind == "[markdown]":
                parts.append(_COMMENT.sub("", source))
                continue
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(source, file.name, "exec"), namespace)
            parts.append(f"```python\n{source}\n```")
            if output.getvalue():
                parts.append(f"```text\n{output.getvalue().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def _cells(text: str) -> Iterator[tuple[str, str]]:
    """Kind and source of each cell; what precedes the first one is no part of the page."""
    _, *parts = _CELL.split(text)
    for kind, source in zip(parts[::2], parts[1::2], strict=True):
        yield kind.strip(), source.strip()


def without_numbers(page: str) -> tuple[str, list[float]]:
    """The page without durations and decimal numbers, which depend on the machine, and the decimal numbers."""
    timeless = _SECONDS.sub("N s", page)
    return _DECIMAL.sub("N", timeless), [float(number) for number in _DECIMAL.findall(timeless)]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        sys.stdout.write(render(Path(sys.argv[1]).absolute(), Path(scratch)))
