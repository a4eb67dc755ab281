"""Typed readers of the small JSON files that dl2pa writes. A damaged file is never read as an empty one."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dl2pa.errors import UserError

Fields = Mapping[str, type]
"""Type of each known field. `float` includes integers, NaN and infinity; `int` and `float` exclude true and false."""

_MAX_DEPTH = 12
"""Maximum depth of a record; those of dl2pa have at most six levels."""
_MAX_INTEGER = 1 << 63
_NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false", list: "a list"}


class DamagedFile(UserError):
    """A file of a run that is empty, damaged or has values of the wrong type.

    Attributes:
        reason: what is wrong with it, as a clause.
    """

    def __init__(
        self, path: Path, reason: str, remedy: str = "Restore it from a backup.", field: str | None = None
    ) -> None:
        super().__init__(field or path.name, str(path), f"is damaged ({reason})", remedy)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (Path(str(self.value)), self.reason, self.remedy, self.field)

    @property
    def problem(self) -> str:
        """File name and reason, without the remedy."""
        return f"{Path(str(self.value)).name} {self.message}"


def read_record(
    path: Path, fields: Fields, required: Collection[str] = (), remedy: str = "Restore it from a backup."
) -> dict[str, Any] | None:
    """Read a JSON object; None if the file is missing.

    A known field may be null or missing unless it is required. Unknown fields may have any value: a later version may
    have written them.

    Raises:
        DamagedFile: an unreadable file, other content, or a value of the wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedFile(path, f"it cannot be read: {error.strerror or error}", remedy) from None
    except UnicodeDecodeError:
        raise DamagedFile(path, "it is not text in UTF-8", remedy) from None
    try:
        return check_record(parse_record(text), fields, required)
    except ValueError as error:
        raise DamagedFile(path, str(error), remedy) from None


def parse_record(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: naming the problem.
    """
    if not text.strip():
        raise ValueError("it is empty")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is not valid JSON: {error}") from None
    if _depth(value) > _MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    return value


def check_record(value: Any, fields: Fields, required: Collection[str] = ()) -> dict[str, Any]:
    """Check that a value is an object with fields of the right types, see `read_record`.

    Raises:
        ValueError: naming the first wrong field.
    """
    if not isinstance(value, dict):
        raise ValueError(f"it contains {_name_of(value)} in place of an object")
    for name in required:
        if value.get(name) is None:
            raise ValueError(f"{name} is missing")
    for name, kind in fields.items():
        field = value.get(name)
        if field is not None and not _fits(field, kind):
            raise ValueError(f"{name} is {_name_of(field)}, not {_NAMES.get(kind, 'an object')}")
    return value


def _fits(value: Any, kind: type) -> bool:
    if kind in (int, float):
        kinds = int if kind is int else (int, float)
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        return is_number and (isinstance(value, float) or abs(value) < _MAX_INTEGER)
    return isinstance(value, kind)


def _name_of(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _MAX_INTEGER:
        return "a number out of range"
    return "null" if value is None else _NAMES.get(type(value), "an object")


def _depth(value: Any) -> int:
    """Levels of lists and objects, counted without recursion."""
    depth, level = 0, [value]
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        if depth > _MAX_DEPTH:
            break
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    return depth
