"""Build the index of Parquet files: the location of each image, without a copy of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets.classes import read_words
from pipelines.datasets.freshness import FileStates, file_states
from pipelines.datasets.index import Index, Source, SplitIndex
from pipelines.datasets.labels import Label, number_known
from pipelines.datasets.lists import load_class_names
from pipelines.datasets.parquet import (
    ParquetColumns,
    ParquetFiles,
    ParquetOptions,
    columns_of,
    inspect_parquet,
)
from pipelines.datasets.pieces import Piece, Progress, digest, inspect, load
from pipelines.datasets.shards import ShardContent
from pipelines.datasets.skipped import SkippedFiles
from pipelines.datasets.spans import Spans
from pipelines.datasets.table import ImageTable, Members, PathTable

_MAX_NAMED = 10
"""Rows that are looked up for a message, which names fewer."""


def index_parquet(
    root: Path,
    files: ParquetFiles,
    options: ParquetOptions,
    parts: Path,
    workers: int,
    progress: Progress,
    decode: bool,
) -> Index:
    """Index the Parquet files of each split.

    Raises:
        UserError: a file cannot be read, or labels have no class; they are counted in one message.
    """
    columns = _common_columns(root, files, options)
    states = {split: file_states(root, names) for split, names in files.splits.items()}
    pieces = {
        split: list(_pieces(root, states[split], (columns.image, columns.label), parts, decode))
        for split in files.splits
    }
    inspect(inspect_parquet, [piece for each in pieces.values() for piece in each], workers, progress)
    skipped, labels = _labels(root, pieces)
    next(iter(skipped.values())).update(files.skipped)
    number_of, classes = _number(root, columns, options, labels)
    _refuse_unknown(root, pieces, labels, number_of, classes)
    splits: dict[str, SplitIndex] = {}
    for split, each in pieces.items():
        numbers = np.array([number_of[label] for label in labels[split]], dtype=np.int64)
        joined = _join(root, each, numbers, classes, states[split])
        splits[split] = replace(joined, table=replace(joined.table, skipped=skipped[split]))
    return Index(splits, classes, read_words(root, classes), source=_source(options))


def _number(
    root: Path, columns: ParquetColumns, options: ParquetOptions, labels: dict[str, list[Label]]
) -> tuple[Mapping[Label, int], tuple[str, ...]]:
    """Position of each distinct label that has a class, and the class names."""
    names = columns.names
    if options.classes is not None:
        names = load_class_names(options.classes, {str(label) for each in labels.values() for label in each})
    first = next(iter(labels))
    others = {label for split, each in labels.items() if split != first for label in each}
    return number_known(set(labels[first]), others, names, root)


def _refuse_unknown(
    root: Path,
    pieces: dict[str, list[Piece]],
    labels: dict[str, list[Label]],
    number_of: Mapping[Label, int],
    classes: tuple[str, ...],
) -> None:
    """Raise one error for all labels without a class."""
    problems = SkippedFiles()
    for split, each in labels.items():
        for i in (i for i, label in enumerate(each) if label not in number_of):
            reason = f"label that is not among the {len(classes):,} classes"
            first = problems.total < _MAX_NAMED
            problems.add(reason, f"{_row(pieces[split], i)}: {each[i]}" if first else "")
    if problems.total:
        message = f"has {problems.total:,} rows that cannot be used: {problems}"
        remedy = "Choose another column with --label-column, or list the classes in label order with --classes FILE."
        raise UserError("ROOT", str(root), message, remedy)


def _source(options: ParquetOptions) -> Source:
    given = {"--image-column": options.image, "--label-column": options.label}
    return Source.of({key: value for key, value in given.items() if value}, {"--classes": options.classes})


def _common_columns(root: Path, files: ParquetFiles, options: ParquetOptions) -> ParquetColumns:
    """The columns of all files.

    Raises:
        UserError: two files have other columns or class names (``ROOT``).
    """
    paths = [root / name for names in files.splits.values() for name in names]
    columns = columns_of(paths[0], options)
    for path in paths[1:]:
        if columns_of(path, options) != columns:
            message = f"has other columns or class names than {paths[0]}"
            raise UserError("ROOT", str(path), message, "Specify a folder with the files of one data set.")
    return columns


def _pieces(
    root: Path, states: FileStates, columns: tuple[str, str], parts: Path, decode: bool
) -> Sequence[Piece]:
    rows = zip(states.paths, states.sizes.tolist(), states.times.tolist(), strict=True)
    return [
        Piece(
            root,
            PathTable.of([name]),
            None,
            parts / f"{digest(decode, str(root / name), size, modified, columns)}.npz",
            decode,
            columns,
        )
        for name, size, modified in rows
    ]


def _labels(
    root: Path, pieces: dict[str, list[Piece]]
) -> tuple[dict[str, SkippedFiles], dict[str, list[Label]]]:
    """Skipped rows and labels of each split.

    Raises:
        UserError: a split has no images (``ROOT``).
    """
    skipped = {split: SkippedFiles() for split in pieces}
    labels: dict[str, list[Label]] = {split: [] for split in pieces}
    for split, each in pieces.items():
        for piece in each:
            content = ShardContent.of(load(piece))
            labels[split] += content.labels
            skipped[split].update(content.skipped)
        if not labels[split]:
            message = f"its Parquet files of the split {split!r} contain no images{skipped[split].because()}"
            remedy = (
                "Files with paths instead of image bytes are not supported: write the bytes of the images."
            )
            raise UserError("ROOT", str(root), message, remedy)
    return skipped, labels


def _row(pieces: Sequence[Piece], i: int) -> str:
    """File and row of image `i` of a split."""
    for piece in pieces:
        rows = load(piece)["rows"]
        if i < len(rows):
            return f"{piece.names[0]} row {rows[i]}"
        i -= len(rows)
    raise IndexError(i)


def _join(
    root: Path,
    pieces: Sequence[Piece],
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    states: FileStates,
) -> SplitIndex:
    stored = [load(piece) for piece in pieces]
    column = {key: np.concatenate([each[key] for each in stored]) for key in stored[0] if key in _JOINED}
    counts = [len(each["rows"]) for each in stored]
    spans = Spans(
        column["starts"],
        column["span_sizes"],
        column["raw_sizes"],
        column["codecs"].astype(np.uint8),
        column["rows"],
    )
    shards = np.repeat(np.arange(len(stored), dtype=np.int32), counts)
    members = Members(shards, column["offsets"], spans)
    files = PathTable.of(piece.names[0] for piece in pieces)
    table = ImageTable.of(root, files, column["lengths"], labels, classes, members)
    return SplitIndex(replace(table, sizes=column["sizes"]), column["flags"], states)


_JOINED = (
    *("offsets", "lengths", "sizes", "flags"),
    *("starts", "span_sizes", "raw_sizes", "codecs", "rows"),
)
