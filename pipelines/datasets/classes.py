"""The class list: where it comes from, and whether it agrees with the data."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from dl2pa.errors import UserError


class HasClasses(Protocol):
    """Any data set here."""

    @property
    def classes(self) -> tuple[str, ...]: ...


def load_classes(value: str | Path | Sequence[str] | None) -> tuple[str, ...] | None:
    """The class names in label order, from a text file or a list.

    A file has a class a line; blank lines and lines starting with # are left out, and of a line such as
    ``n01440764 tench`` the first word counts, which is the folder's name.

    Args:
        value: a path, the names themselves, or None where the data set is to name them.

    Raises:
        UserError: the file cannot be read, there are no names, or one appears twice (``data.classes``).
    """
    if value is None:
        return None
    classes = _read_file(Path(value)) if isinstance(value, str | Path) else tuple(value)
    shown = str(value) if isinstance(value, str | Path) else list(value)
    if not classes:
        raise UserError(
            "data.classes", shown, "names no class", "List one class a line, or leave data.classes out."
        )
    if repeated := _repeated(classes):
        remedy = "Name every class once; its place in the list is its label."
        raise UserError("data.classes", repeated, "appears more than once in the class list", remedy)
    return classes


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint such as ``; the nearest is 'n01440764'``, empty where nothing is near."""
    found = difflib.get_close_matches(name, list(candidates), n=1)
    return f"; the nearest is {found[0]!r}" if found else ""


def check_known(
    folders: Sequence[str], classes: Sequence[str], where: Path, field: str, value: str | None, remedy: str
) -> None:
    """Refuse class folders that have no label.

    Args:
        folders: their names.
        classes: the classes with a label.
        where: the folder or file that has them, for the message.
        field: the config key at fault.
        value: its value; None says the first name without a label.
        remedy: what to do.

    Raises:
        UserError: naming the first such folder, how many more there are, and the nearest class.
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
    """Refuse a configured number of classes that is not the data set's; None agrees with any.

    Raises:
        UserError: they differ (``data.num_classes``).
    """
    found = len(dataset.classes)
    if num_classes is not None and num_classes != found:
        remedy = (
            f"Set data.num_classes={found} or leave it out; "
            "to include classes without images, list every class with data.classes."
        )
        raise UserError("data.num_classes", num_classes, f"the data set has {found:,} classes", remedy)


def _read_file(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"
        remedy = "Name a text file with a class a line, or give the list itself."
        raise UserError("data.classes", str(path), f"cannot be read: {why}", remedy) from error
    words = (line.split(maxsplit=1) for line in text.splitlines())
    return tuple(line[0] for line in words if line and not line[0].startswith("#"))


def _repeated(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
