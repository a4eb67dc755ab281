"""Load the class list and check it against the data."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from dl2pa.errors import UserError


class HasClasses(Protocol):
    """Any data set."""

    @property
    def classes(self) -> tuple[str, ...]: ...


def load_classes(value: str | Path | Sequence[str] | None) -> tuple[str, ...] | None:
    """Load the class names in label order from a text file or a list.

    A file has one class per line: the first word, as in ``n01440764 tench``. Blank lines and lines that start with
    # are ignored.

    Args:
        value: a path, the names, or None to use the classes of the data set.

    Raises:
        UserError: the file cannot be read, there are no names, or a name appears twice (``data.classes``).
    """
    if value is None:
        return None
    classes = _read_file(Path(value)) if isinstance(value, str | Path) else tuple(value)
    shown = str(value) if isinstance(value, str | Path) else list(value)
    if not classes:
        raise UserError(
            "data.classes",
            shown,
            "contains no class names",
            "List one class per line, or leave data.classes out.",
        )
    if repeated := _repeated(classes):
        remedy = "List every class once; its position in the list is its label."
        raise UserError("data.classes", repeated, "appears more than once in the class list", remedy)
    return classes


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint such as ``; the nearest is 'n01440764'``, empty if no candidate is similar."""
    matches = difflib.get_close_matches(name, list(candidates), n=1)
    return f"; the nearest is {matches[0]!r}" if matches else ""


def check_known(
    folders: Sequence[str], classes: Sequence[str], where: Path, field: str, value: str | None, remedy: str
) -> None:
    """Check that every class folder has a label.

    Args:
        folders: names of the class folders.
        classes: the classes in label order.
        where: the folder or file that contains the folders, for the message.
        field: the config key for the message.
        value: its value. Default: the first folder without a label.
        remedy: what to do.

    Raises:
        UserError: a folder has no label; the message names the first, the number of others and the nearest class.
    """
    known = set(classes)
    unknown = [name for name in folders if name not in known]
    if not unknown:
        return
    more = f" (and {len(unknown) - 1:,} more)" if len(unknown) > 1 else ""
    hint = nearest(unknown[0], classes)
    message = f"{unknown[0]!r}{more} in {where} is not among the {len(classes):,} classes{hint}"
    raise UserError(field, value or unknown[0], message, remedy)


def check_num_classes(dataset: HasClasses, num_classes: int | None) -> None:
    """Check the configured number of classes, if any, against the data set.

    Raises:
        UserError: they differ (``data.num_classes``).
    """
    actual = len(dataset.classes)
    if num_classes is not None and num_classes != actual:
        remedy = (
            f"Set data.num_classes={actual} or leave it out; "
            "to include classes without images, list every class with data.classes."
        )
        raise UserError("data.num_classes", num_classes, f"the data set has {actual:,} classes", remedy)


def _read_file(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"
        remedy = "Specify a text file with one class per line, or a list."
        raise UserError("data.classes", str(path), f"cannot be read: {reason}", remedy) from error
    words = (line.split(maxsplit=1) for line in text.splitlines())
    return tuple(line[0] for line in words if line and not line[0].startswith("#"))


def _repeated(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
