"""Lists of images with labels: `path label` lines as in ImageNet-LT, Places-LT and iNaturalist, or CSV files.

All entries are checked before anything is written. Those that cannot be used are counted by reason.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets.classes import ClassList
from pipelines.datasets.folder import is_image
from pipelines.datasets.labels import Label, number_known
from pipelines.datasets.skipped import SkippedFiles, reason_for
from pipelines.datasets.table import ImageTable, PathTable
from pipelines.datasets.text import decode_text, lines_of

log = logging.getLogger(__name__)

MISSING = "file that does not exist"
_THREADS = 16
_CHUNK = 512
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "target", "category", "class_name", "category_id", "label_name")
_MAX_FOLDERS = 64


@dataclass(frozen=True)
class ListOptions:
    """Lists of a data set.

    Attributes:
        train, val: the files; ``val`` may be None.
        classes: file of the class names in label order.
        columns: names of the columns of paths and labels in a CSV file; None: the usual names.
        skip_missing: skip files that do not exist, instead of refusing the list.
    """

    train: Path
    val: Path | None = None
    classes: Path | None = None
    columns: tuple[str, str] | None = None
    skip_missing: bool = False

    def files(self) -> dict[str, tuple[str, Path]]:
        """Option and file of each split that has a list."""
        files = {"train": ("--list", self.train)}
        return files if self.val is None else {**files, "val": ("--val-list", self.val)}


@dataclass(frozen=True)
class _Entries:
    """Entries of a list: paths and labels as they are written, and their line numbers."""

    paths: list[str]
    labels: list[str]
    lines: list[int]
    problems: SkippedFiles


def open_lists(root: Path, options: ListOptions) -> dict[str, ImageTable]:
    """The images of each list, in its order.

    Args:
        root: the folder that the paths are relative to.

    Raises:
        UserError: a list cannot be read, or has entries that cannot be used; all of them are counted in one message.
    """
    files = options.files()
    entries = {split: _read(option, file, options.columns) for split, (option, file) in files.items()}
    names = None
    if options.classes is not None:
        names = load_class_names(
            options.classes, {label for each in entries.values() for label in each.labels}
        )
    distinct = {split: set(each.labels) for split, each in entries.items()}
    number_of, classes = number_known(distinct["train"], distinct.get("val", ()), names, root)
    tables: dict[str, ImageTable] = {}
    for split, each in entries.items():
        listed = _Listed(root, each)
        listed.add_all(number_of, len(classes))
        tables[split] = listed.table(classes, options.skip_missing)
    _refuse(root, files, entries, tables)
    _warn_of_overlap(tables)
    return tables


def load_class_names(file: Path, labels: set[str]) -> tuple[str, ...]:
    """Class names of ``--classes``, read in the way that contains most of the `labels`.

    Raises:
        UserError: the file cannot be read or has a name twice (``--classes``).
    """
    try:
        return ClassList.load(file).names(lambda: labels)
    except UserError as error:
        value = "" if error.value == str(file) else f"{error.value!r} "
        raise UserError("--classes", str(file), f"{value}{error.message}", error.remedy) from None


class _Listed:
    """The usable entries of a list, and the reasons for which the others are not used."""

    def __init__(self, root: Path, entries: _Entries) -> None:
        self._root = root
        self._entries = entries
        self._skipped = SkippedFiles()
        self._label_of: dict[str, int] = {}
        self._line_of: dict[str, int] = {}

    def add_all(self, number_of: Mapping[Label, int], num_classes: int) -> None:
        """Check all labels and paths, without reading the files."""
        base = os.path.abspath(self._root)  # noqa: PTH100  # links are not followed
        entries = self._entries
        for path, text, line in zip(entries.paths, entries.labels, entries.lines, strict=True):
            label = number_of.get(text)
            if label is None:
                reason = f"label that is not among the {num_classes:,} classes"
                entries.problems.add(reason, f"line {line}: {text}")
                continue
            name = relative_path(base, path)
            if name is None:
                entries.problems.add("path outside ROOT", f"line {line}: {path}")
            elif name in self._label_of:
                self._add_again(name, label, line)
            elif not is_image(name):
                self._skipped.add(reason_for(name), name)
            else:
                self._label_of[name], self._line_of[name] = label, line

    def _add_again(self, name: str, label: int, line: int) -> None:
        if self._label_of[name] == label:
            self._skipped.add("listed more than once", name)
        else:
            self._entries.problems.add("file listed with two labels", f"line {line}: {name}")

    def table(self, classes: tuple[str, ...], skip_missing: bool) -> ImageTable:
        """The images whose files exist."""
        names = list(self._label_of)
        lengths = file_lengths(str(self._root), names)
        for i in np.flatnonzero(lengths < 0).tolist():
            if skip_missing:
                self._skipped.add(MISSING, names[i])
            else:
                self._entries.problems.add(MISSING, f"line {self._line_of[names[i]]}: {names[i]}")
        present = np.flatnonzero(lengths >= 0)
        labels = np.fromiter(self._label_of.values(), np.int64, len(names))[present]
        files = PathTable.of(names[i] for i in present.tolist())
        return replace(
            ImageTable.of(self._root, files, lengths[present], labels, classes), skipped=self._skipped
        )


def relative_path(base: str, path: str) -> str | None:
    """A listed path relative to the absolute path `base`; None if it leaves this folder.

    A leading slash, as in the lists of Places365, is removed unless the path begins with `base`.
    """
    if path.startswith("/"):
        path = path[len(base) + 1 :] if path.startswith(f"{base}/") else path.lstrip("/")
    if "//" in path or "./" in path:
        path = os.path.normpath(path)
    return None if path in ("", ".") or path == ".." or path.startswith("../") else path


def file_lengths(root: str, names: Sequence[str]) -> NDArray[np.int64]:
    """Bytes of each file, int64 [N]; -1 if it does not exist or is not a regular file."""
    parts = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]

    def lengths(part: Sequence[str]) -> list[int]:
        return [_length(f"{root}/{name}") for name in part]

    with ThreadPoolExecutor(_THREADS) as pool:
        return np.array([n for part in pool.map(lengths, parts) for n in part], dtype=np.int64)


def _length(path: str) -> int:
    try:
        state = os.stat(path)  # noqa: PTH116  # a Path costs more
    except (OSError, ValueError):
        return -1
    return state.st_size if stat.S_ISREG(state.st_mode) else -1


def _refuse(
    root: Path,
    files: dict[str, tuple[str, Path]],
    entries: dict[str, _Entries],
    tables: dict[str, ImageTable],
) -> None:
    """Raise one error for all entries that cannot be used."""
    bad = [split for split, each in entries.items() if each.problems.total]
    if bad:
        (option, file), others = files[bad[0]], bad[1:]
        texts = [
            f"has {entries[bad[0]].problems.total:,} entries that cannot be used: {entries[bad[0]].problems}"
        ]
        texts += [f"{files[split][1].name}: {entries[split].problems}" for split in others]
        remedy = "Correct the list: a label is the position of a class, from 0, or its name (--classes FILE)."
        if any(MISSING in entries[split].problems for split in bad):
            remedy = f"Correct the list, or add --skip-missing to skip files that do not exist.{_hint(root, entries)}"
        raise UserError(option, str(file), ". In ".join(texts), remedy)
    for split, table in tables.items():
        if not len(table):
            option, file = files[split]
            message = f"lists no images{table.skipped.because()}"
            raise UserError(option, str(file), message, "Write one image per line: its path and its label.")


def _hint(root: Path, entries: dict[str, _Entries]) -> str:
    """The folder in which the first listed file is, if it is near ROOT."""
    base = os.path.abspath(root)  # noqa: PTH100
    paths = [relative_path(base, each.paths[0]) for each in entries.values() if each.paths]
    inner = [folder.path for folder in os.scandir(root) if folder.is_dir()][:_MAX_FOLDERS]
    for path in filter(None, paths):
        if (root / path).exists():
            continue
        folder = next((f for f in (str(root.parent), *sorted(inner)) if Path(f, path).exists()), None)
        if folder is not None:
            return f" {path} is in {folder}: specify that folder as ROOT."
    return ""


def _warn_of_overlap(tables: dict[str, ImageTable]) -> None:
    if "val" in tables and (both := sorted(set(tables["train"].files) & set(tables["val"].files))):
        message = "%s images are in both lists, such as %s: validation does not measure generalization"
        log.warning(message, f"{len(both):,}", both[0])


def _read(option: str, file: Path, columns: tuple[str, str] | None) -> _Entries:
    try:
        text = decode_text(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        remedy = "Specify a text file with one image per line: its path and its label."
        raise UserError(option, str(file), f"cannot be read: {reason}", remedy) from None
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv") or columns is not None:
        delimiter = "\t" if suffix == ".tsv" or "\t" in text.partition("\n")[0] else ","
        return _read_table(option, file, text, delimiter, columns)
    return _read_lines(text)


def _read_lines(text: str) -> _Entries:
    """Lines of a path and a label, separated by a tab or by the last white space; # begins a comment."""
    entries = _Entries([], [], [], SkippedFiles())
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip() or line.startswith("#"):
            continue
        path, separator, label = (
            line.strip().rpartition("\t") if "\t" in line.strip() else _split(line.strip())
        )
        _add(entries, number, path.strip(), label.strip() if separator else "")
    return entries


def _split(line: str) -> tuple[str, str, str]:
    parts = line.rsplit(None, 1)
    return (parts[0], " ", parts[1]) if len(parts) == 2 else (line, "", "")


def _add(entries: _Entries, line: int, path: str, label: str) -> None:
    if not path or not label:
        entries.problems.add("line without a path and a label", f"line {line}: {(path or label)[:80]}")
        return
    entries.paths.append(path)
    entries.labels.append(label)
    entries.lines.append(line)


def _read_table(
    option: str, file: Path, text: str, delimiter: str, columns: tuple[str, str] | None
) -> _Entries:
    entries = _Entries([], [], [], SkippedFiles())
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    positions: tuple[int, int] | None = None
    try:
        for row in reader:
            if not row or not any(cell.strip() for cell in row):
                continue
            if positions is None:
                positions, is_header = _columns_of(option, file, row, columns)
                if is_header:
                    continue
            cells = [row[k].strip() if k < len(row) else "" for k in positions]
            _add(entries, reader.line_num, *cells)
    except csv.Error as error:
        remedy = "Correct this line; a quotation mark inside a quoted text is doubled."
        raise UserError(option, str(file), f"line {reader.line_num}: {error}", remedy) from None
    return entries


def _columns_of(
    option: str, file: Path, first: list[str], columns: tuple[str, str] | None
) -> tuple[tuple[int, int], bool]:
    """Positions of paths and labels, and whether the first row contains the names of the columns."""
    names = [cell.strip() for cell in first]
    lower = [name.lower() for name in names]
    if columns is not None:
        absent = next((name for name in columns if name not in names), None)
        if absent is None:
            return (names.index(columns[0]), names.index(columns[1])), True
        message = f"{file} has the columns {', '.join(names)}"
        raise UserError("--columns", absent, message, "Specify two of them: --columns PATHS,LABELS.")
    paths = [k for k, name in enumerate(lower) if name in PATH_COLUMNS]
    labels = [k for k, name in enumerate(lower) if name in LABEL_COLUMNS]
    if len(paths) == 1 and len(labels) == 1:
        return (paths[0], labels[0]), True
    if len(names) == 2 and is_image(names[0]):
        return (0, 1), False
    message = f"its columns {', '.join(names)} do not tell which contain the paths and the labels"
    raise UserError(option, str(file), message, "Specify them with --columns PATHS,LABELS.")
