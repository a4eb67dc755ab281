"""Places of keys in configuration and sweep files, found only when an error names them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from os.path import normpath
from pathlib import Path
from typing import Any

from dl2pa.config.paths import expand_path
from dl2pa.config.yaml_core import YAML_ERRORS, key_lines, parse_yaml
from dl2pa.errors import UserError

_MAX_FILES = 64


def place_problems(error: UserError, find: Callable[[str], str | None]) -> UserError:
    """Set the place of each problem that has none; return the error."""
    for problem in error.problems:
        problem.place = problem.place or find(problem.field)
    error.place = error.problems[0].place
    return error


@contextmanager
def placed(find: Callable[[str], str | None]) -> Generator[None]:
    """Add places to the problems that are raised inside."""
    try:
        yield
    except UserError as error:
        place_problems(error, find)
        raise


def finder(sources: Sequence[tuple[Path, Sequence[str]]]) -> Callable[[str], str | None]:
    """Return a function that finds `FILE:LINE` of a key in configurations, each a file and its overrides.

    It returns None for a key that an override sets, or that no file sets.
    """
    files, lines = cache(_files), cache(_lines_of)

    def place_of(file: Path, overrides: Sequence[str], field: str) -> str | None:
        for text in overrides:
            key = text.partition("=")[0].strip()
            if f"{field}.".startswith(f"{key}.") or f"{key}.".startswith(f"{field}."):
                return None
        parent, _, last = field.rpartition(".")
        names = [field, parent] if last.isdecimal() else [field]  # the position of an item of a list
        found = ((path, name) for path in files(file) for name in names if name in lines(path))
        return next((f"{path}:{lines(path)[name]}" for path, name in found), None)

    def find(field: str) -> str | None:
        places = (place_of(file, overrides, field) for file, overrides in sources)
        return next((place for place in places if place), None)

    return find


def place_in_sweep(file: Path, field: str) -> str | None:
    """Return `FILE:LINE` where a sweep file sets a key, in `overrides`, `variants` or `grid`."""
    lines = _lines_of(file)
    known = [name for name in lines if name == field or name.endswith(f".{field}")]
    return f"{file}:{lines[known[0]]}" if known else None


def _files(file: Path) -> list[Path]:
    """Return a configuration and the files that it extends, in the order of their precedence."""
    found: list[Path] = []
    waiting = [file]
    while waiting and len(found) < _MAX_FILES:
        path = waiting.pop(0)
        if path in found:
            continue
        found.append(path)
        bases = _tree_of(path).get("base")
        names = [name for name in (bases if isinstance(bases, list) else [bases]) if isinstance(name, str)]
        with suppress(UserError):  # an undefined variable is reported when the files are read
            waiting[:0] = [
                Path(normpath(path.parent / expand_path("base", name))) for name in reversed(names)
            ]
    return found


def _tree_of(path: Path) -> dict[str, Any]:
    try:
        tree = parse_yaml(_text_of(path))
    except YAML_ERRORS:
        return {}
    return tree if isinstance(tree, dict) else {}


def _lines_of(path: Path) -> dict[str, int]:
    try:
        return key_lines(_text_of(path))
    except YAML_ERRORS:
        return {}


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else ""
    except OSError:
        return ""
