"""Load class lists and readable class names, and check class lists against the data."""

from __future__ import annotations

import difflib
import json
import logging
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets.text import decode_text, lines_of

CLASSES_NAME = "classes.json"
"""Next to packed shards: class names in label order, each with its readable name."""

_CLASSES_TEXT = "classes.txt"
_WORDS_FILES = ("LOC_synset_mapping.txt", "words.txt", _CLASSES_TEXT)
NAME_FILES = (CLASSES_NAME, *_WORDS_FILES)
"""Files with class names or their readable forms, in order of preference."""
_MAX_SHOWN = 5
_NO_NAMES: tuple[str, ...] = ()

log = logging.getLogger(__name__)


class HasClasses(Protocol):
    """Any data set."""

    @property
    def classes(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class ClassList:
    """Class names in label order.

    A line of several words, such as ``n01440764 tench`` or ``polar bear``, can be read in several ways, which give
    different names at the same positions.

    Attributes:
        readings: the class names in each way, in order of preference.
    """

    readings: tuple[tuple[str, ...], ...]

    @classmethod
    def load(cls, value: str | Path | Sequence[str]) -> ClassList:
        """Load a text file or a list; see ``load_classes``."""
        if isinstance(value, str | Path):
            candidates, shown = _readings(_read_lines(Path(value))), str(value)
        else:
            candidates, shown = [tuple(value)], list(value)
        if not candidates[0]:
            remedy = "List one class per line, or leave data.classes out."
            raise UserError("data.classes", shown, "contains no class names", remedy)
        readings = [names for names in candidates if len(set(names)) == len(names)]
        if not readings:
            remedy = "List every class once; its position in the list is its label."
            repeated = _repeated(candidates[0])
            raise UserError("data.classes", repeated, "appears more than once in the class list", remedy)
        _check_characters(readings[0], shown, isinstance(value, str | Path))
        return cls(tuple(dict.fromkeys(readings)))

    def names(self, present: Callable[[], Collection[str]] = lambda: _NO_NAMES) -> tuple[str, ...]:
        """The names in the way that contains most of the class names in the data; by default the first.

        Args:
            present: returns the class names in the data; called only if there are several ways.
        """
        if len(self.readings) == 1:
            return self.readings[0]
        in_data = set(present())
        return max(self.readings, key=lambda names: len(in_data.intersection(names)))


def load_classes(value: str | Path | Sequence[str] | None) -> tuple[str, ...] | None:
    """Load the class names in label order from a text file or a list.

    A file has one class per line: the first word, as in ``n01440764 tench``, unless the first words are not unique.
    Blank lines and lines that start with # are ignored.

    Args:
        value: a path, the names, or None to use the classes of the data set.

    Raises:
        UserError: the file cannot be read, there are no names, or a name appears twice (``data.classes``).
    """
    return None if value is None else ClassList.load(value).names()


def shard_classes(root: Path, labels: Collection[str]) -> tuple[str, ...] | None:
    """Class names of shards in label order, from classes.json or classes.txt; None without either.

    Args:
        labels: the labels of the shards that are text.

    Raises:
        UserError: the file is damaged or contains a name twice (``ROOT``).
    """
    file = next((root / name for name in (CLASSES_NAME, _CLASSES_TEXT) if (root / name).is_file()), None)
    if file is None:
        return None
    is_json = file.name == CLASSES_NAME
    try:
        names = ClassList.load(tuple(_read_class_json(file)) if is_json else file).names(lambda: labels)
    except UserError as error:
        value = error.value if isinstance(error.value, str) and error.value != str(file) else ""
        message = f"{value!r} {error.message}" if value else error.message
        raise UserError("ROOT", str(file), message, "Correct or remove this file.") from None
    line = None if is_json else _divided_line(file, names)
    if line is not None:
        message = "%s: the class name is the first word of %r; put a tab after a name of several words"
        log.warning(message, file, line)
    return names


def read_words(root: Path, classes: Sequence[str]) -> dict[str, str]:
    """Readable class names, from files such as ImageNet's: ``n01440764 tench, Tinca tinca``.

    A file that cannot be read only causes a warning, because readable names are optional.
    """
    candidates = (root / name for name in NAME_FILES)
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        return {}
    try:
        if file.name == CLASSES_NAME:
            return {key: words for key, words in _read_class_json(file).items() if words}
        lines = lines_of(decode_text(file.read_bytes()))
    except (UserError, ValueError, OSError) as error:
        reason = error.message if isinstance(error, UserError) else error
        log.warning("%s: %s. The classes have no readable names", file, reason)
        return {}
    split = (line.split(maxsplit=1) for line in lines)
    words = {parts[0]: parts[1].strip() for parts in split if len(parts) == 2}
    return {key: words[key] for key in classes if key in words}


def nearest(name: str, candidates: Iterable[str]) -> str:
    """A hint such as ``; the nearest is 'n01440764'``, empty if no candidate is similar."""
    names = list(candidates)
    form = unicodedata.normalize("NFC", name)
    if same := next(
        (other for other in names if other != name and unicodedata.normalize("NFC", other) == form), None
    ):
        return f"; {same!r} is the same text in another Unicode form"
    matches = difflib.get_close_matches(name, names, n=1)
    return f"; the nearest is {matches[0]!r}" if matches else ""


def empty_classes(labels: NDArray[np.int64], classes: Sequence[str]) -> str | None:
    """Text about the classes without images, such as ``2 of 4 classes have no images: 'ant', 'bee'``; None if none."""
    counts = np.bincount(labels, minlength=len(classes))
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return None
    first = ", ".join(repr(classes[label]) for label in empty[:_MAX_SHOWN].tolist())
    more = ", …" if len(empty) > _MAX_SHOWN else ""
    return f"{len(empty):,} of {len(classes):,} classes have no images: {first}{more}"


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


def _read_lines(path: Path) -> list[str]:
    """Lines with content, without comments."""
    try:
        text = decode_text(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        remedy = "Specify a text file with one class per line, or a list."
        if not isinstance(error, OSError):
            remedy = (
                "Convert it to UTF-8, for example with `iconv -f LATIN1 -t UTF-8 FILE`, or specify a list."
            )
        raise UserError("data.classes", str(path), f"cannot be read: {reason}", remedy) from error
    lines = (line.strip() for line in lines_of(text))
    return [line for line in lines if line and not line.startswith("#")]


def _readings(lines: Sequence[str]) -> list[tuple[str, ...]]:
    """The names in each way: first words, text before the tab, lines, and text after a number."""
    words = [line.split(maxsplit=1) for line in lines]
    ways = [[parts[0] for parts in words], [line.partition("\t")[0].strip() for line in lines], list(lines)]
    if words and all(len(parts) == 2 and parts[0].rstrip(".:").isdigit() for parts in words):
        ways.append([parts[1] for parts in words])
    return [tuple(names) for names in ways]


def _divided_line(file: Path, names: Sequence[str]) -> str | None:
    """The first line of words of which `names` has only the first, as in ``polar bear``; codes are no words."""
    for line, name in zip(_read_lines(file), names, strict=True):
        if name.isalpha() and "\t" not in line and name != line and name == line.split()[0]:
            return line
    return None


def _read_class_json(file: Path) -> dict[str, str]:
    """Class names in label order, each with its readable name or an empty text.

    The file contains ``{class: readable name}`` in label order, ``{class: label}``, or a list of the names.

    Raises:
        UserError: it contains something else (``ROOT``).
    """
    remedy = "Write {class: readable name} in label order."
    try:
        content: Any = json.loads(decode_text(file.read_bytes()), object_pairs_hook=_unique_keys)
        if isinstance(content, list) and _all_text(content):
            content = _unique_keys([(name, "") for name in cast(list[str], content)])
    except (ValueError, OSError, RecursionError) as error:
        raise UserError("ROOT", str(file), f"cannot be read ({error})", remedy) from None
    if not isinstance(content, dict):
        raise UserError("ROOT", str(file), "is neither a JSON object nor a list of names", remedy)
    classes = cast(dict[str, Any], content)
    if classes and all(type(label) is int for label in classes.values()):
        in_order = sorted(classes, key=lambda name: classes[name])
        if [classes[name] for name in in_order] != list(range(len(classes))):
            raise UserError("ROOT", str(file), "contains labels that are not 0, 1, 2, …", remedy)
        return dict.fromkeys(in_order, "")
    if not _all_text(classes.values()):
        raise UserError("ROOT", str(file), "contains values that are not text", remedy)
    return classes


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = _repeated([key for key, _ in pairs])
    if repeated is not None:
        raise ValueError(f"the class {repeated!r} appears more than once")
    return dict(pairs)


def _all_text(values: Iterable[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _check_characters(names: Sequence[str], shown: object, from_text: bool) -> None:
    """Refuse names that no file can contain, and control characters, which a text in another encoding has."""
    refused = ("Cc", "Cs") if from_text else ("Cs",)
    for name in names:
        if not name or any(unicodedata.category(character) in refused for character in name):
            message = f"the name {name!r} is empty or contains characters that are not text"
            raise UserError("data.classes", shown, message, "Save the list as UTF-8 text.")


def _repeated(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
