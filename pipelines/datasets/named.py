"""Image files that a user names: files, folders, patterns and lists, in a fixed order."""

from __future__ import annotations

import csv
import errno
import glob
import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets.folder import is_image
from pipelines.datasets.lists import LABEL_COLUMNS, PATH_COLUMNS, file_lengths
from pipelines.datasets.skipped import SkippedFiles, is_ignored, reason_for
from pipelines.datasets.table import ImageTable, PathTable
from pipelines.datasets.text import decode_text, lines_of
from pipelines.images import unreadable_image

_LIST_SUFFIXES = (".txt", ".csv", ".tsv")
_REMEDY = "Give image files, folders, patterns, or lists of images as @FILE."


@dataclass(eq=False)
class NamedImages:
    """Image files in the order in which they are named; those of a folder or pattern are sorted by path.

    Attributes:
        paths: the N paths.
        labels: folder of each image below a named folder, or its label in a list; empty if unknown.
        listed: whether the label is from a list, where it may be a position.
        skipped: files in folders and patterns that have no image suffix.
    """

    paths: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    listed: list[bool] = field(default_factory=list)
    skipped: SkippedFiles = field(default_factory=SkippedFiles)

    def __len__(self) -> int:
        return len(self.paths)

    def add(self, path: str, label: str = "", listed: bool = False) -> None:
        """Add one image."""
        self.paths.append(path)
        self.labels.append(label)
        self.listed.append(listed)

    def table(self) -> ImageTable:
        """The images as a data set without labels; a missing file has the length -1."""
        absolute = [os.path.abspath(path)[1:] for path in self.paths]  # noqa: PTH100  # links are not followed
        lengths = file_lengths("", absolute)
        return ImageTable.of(Path("/"), PathTable.of(absolute), lengths, np.zeros(len(self), np.int64), ())

    def classes(self, names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
        """Class name of each image, empty if unknown, and its position in `names`, int64 [N], -1 if it has none.

        Labels of lists are names, or positions if all of them are.
        """
        position = {name: i for i, name in enumerate(names)}
        pairs = list(zip(self.labels, self.listed, strict=True))
        others = {label for label, listed in pairs if listed and label} - position.keys()
        positional = all(label.isdecimal() and int(label) < len(names) for label in others)

        def number(label: str, listed: bool) -> int:
            return int(label) if positional and listed and label in others else position.get(label, -1)

        numbers = [number(label, listed) for label, listed in pairs]
        texts = [label if i < 0 else names[i] for label, i in zip(self.labels, numbers, strict=True)]
        return texts, np.array(numbers, np.int64)


def find_images(words: Iterable[str], root: Path | None = None, lists: bool = False) -> NamedImages:
    """List the images of files, folders, patterns such as `photos/*.jpg`, and lists (`@FILE`, .txt, .csv, .tsv).

    Args:
        root: folder that the paths in lists are relative to; default: the current folder.
        lists: every word is a list.

    Raises:
        UserError: a file or folder does not exist, a list cannot be read, or one of them names no image (`image`).
    """
    images = NamedImages()
    for word in words:
        before = len(images)
        if lists or _is_list(word):
            _add_list(images, Path(word.removeprefix("@")), root)
        elif Path(word).is_dir():
            _add_folder(images, word)
        elif os.path.lexists(word):
            images.add(word)
        elif glob.has_magic(word):
            _add_pattern(images, word)
        else:
            raise unreadable_image(Path(word), OSError(errno.ENOENT, os.strerror(errno.ENOENT)))
        if len(images) == before:
            raise UserError("image", word, f"contains no images{images.skipped.because()}", _REMEDY)
    return images


def names_a_list(words: Iterable[str], lists: bool) -> bool:
    """Whether a word is a list of images."""
    return lists or any(map(_is_list, words))


def names_only_files(words: Iterable[str], lists: bool) -> bool:
    """Whether all words are names of single files."""
    return not lists and all(Path(word).is_file() and not _is_list(word) for word in words)


def _is_list(word: str) -> bool:
    if word.startswith("@"):
        return not os.path.lexists(word)
    return word.lower().endswith(_LIST_SUFFIXES) and not Path(word).is_dir()


def _add_folder(images: NamedImages, folder: str) -> None:
    """Add the images below a folder. Links are followed; hidden entries are left out."""
    found: list[str] = []
    _walk(folder, "", found, images.skipped, frozenset())
    for path in sorted(found):
        images.add(os.path.join(folder, path), path.partition("/")[0] if "/" in path else "")  # noqa: PTH118


def _walk(
    folder: str, below: str, found: list[str], skipped: SkippedFiles, above: frozenset[tuple[int, int]]
) -> None:
    """Collect the images of a folder and of those in it, as paths relative to `folder`.

    Args:
        above: the folders that contain this one, which a link may lead to again.
    """
    try:
        state = os.stat(os.path.join(folder, below))  # noqa: PTH116, PTH118
        with os.scandir(os.path.join(folder, below)) as entries:  # noqa: PTH118
            visible = [e for e in entries if not e.name.startswith(".") and not is_ignored(e.name)]
    except OSError as error:
        message = f"the folder {below or '.'} cannot be read ({error.strerror})"
        raise UserError("image", folder, message, "Make it readable, or name other folders.") from None
    key = (state.st_dev, state.st_ino)
    if key in above:
        return
    for entry in visible:
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.is_dir():
            _walk(folder, path, found, skipped, above | {key})
        elif is_image(entry.name):
            found.append(path)
        else:
            skipped.add(reason_for(entry.name), path)


def _add_pattern(images: NamedImages, pattern: str) -> None:
    for path in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207  # Path.glob refuses absolute patterns
        if Path(path).is_dir():
            continue
        if is_image(path):
            images.add(path)
        else:
            images.skipped.add(reason_for(path), path)


def _add_list(images: NamedImages, file: Path, root: Path | None) -> None:
    """Add the images of a list: lines of a path and, optionally, a label; or CSV."""
    try:
        text = decode_text(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        remedy = "Give a text file with the path of one image per line, or CSV."
        raise UserError("image", f"@{file}", f"cannot be read: {reason}", remedy) from None
    read: Callable[[Path, str], list[tuple[str, str]]]
    read = _read_table if file.suffix.lower() in (".csv", ".tsv") else _read_lines
    entries = read(file, text)
    folder = root or Path()
    if entries and not any((folder / path).exists() for path, _ in entries):
        near = (file.parent / entries[0][0]).exists()
        remedy = f"Add --root {file.parent}." if near else "Give the folder of the images with --root DIR."
        message = f"none of its {len(entries):,} files exists, for example {folder / entries[0][0]}"
        raise UserError("image", f"@{file}", message, remedy)
    for path, label in entries:
        images.add(str(folder / path), label, True)


def _read_lines(file: Path, text: str) -> list[tuple[str, str]]:
    """A path per line, or a path and a label after a tab or the last white space; # begins a comment."""
    lines = (line.strip() for line in lines_of(text) if not line.startswith("#"))
    return [_split(line) for line in lines if line]


def _split(line: str) -> tuple[str, str]:
    path, tab, label = line.rpartition("\t")
    if not tab:
        path, _, label = ("", "", line) if is_image(line) else line.rpartition(" ")
    return (path.strip(), label.strip()) if path else (label, "")


def _read_table(file: Path, text: str) -> list[tuple[str, str]]:
    """Paths and labels of a table with or without a header; the labels may be missing."""
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    except csv.Error as error:
        remedy = "Correct the file; a quotation mark inside a quoted text is doubled."
        raise UserError("image", f"@{file}", f"cannot be read: {error}", remedy) from None
    names = [name.strip().lower() for name in rows[0]] if rows else []
    paths = [k for k, name in enumerate(names) if name in PATH_COLUMNS]
    labels = [k for k, name in enumerate(names) if name in LABEL_COLUMNS]
    if len(paths) == 1:
        return [(_cell(row, paths[0]), _cell(row, labels[0]) if labels else "") for row in rows[1:]]
    if len(paths) > 1:
        message = f"its columns {', '.join(rows[0][k] for k in paths)} can all contain the paths"
        raise UserError("image", f"@{file}", message, "Rename all but one of them.")
    if rows and not is_image(names[0]):
        message = f"its first row has no column of paths: {', '.join(rows[0])}"
        raise UserError("image", f"@{file}", message, f"Name it {' or '.join(PATH_COLUMNS[:2])}.")
    return [(_cell(row, 0), _cell(row, 1)) for row in rows]


def _cell(row: Sequence[str], column: int) -> str:
    return row[column].strip() if column < len(row) else ""
