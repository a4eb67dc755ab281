"""Build the index of an image folder, of lists, tar shards or Parquet files, in parallel and resumable."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets.arrays import Split
from pipelines.datasets.classes import read_words, shard_classes
from pipelines.datasets.folder import index_folder, is_split_folder, open_folders
from pipelines.datasets.freshness import (
    FileStates,
    folder_states,
    listed_states,
    shard_states,
    text_digests,
)
from pipelines.datasets.index import (
    CLASS_FILES,
    INDEX_NAME,
    Index,
    Source,
    SplitIndex,
    open_index,
    write_index,
)
from pipelines.datasets.labels import number_labels
from pipelines.datasets.lists import ListOptions, open_lists
from pipelines.datasets.parquet import ParquetFiles, ParquetOptions, find_parquet
from pipelines.datasets.parquet_index import index_parquet
from pipelines.datasets.pieces import Piece, Progress, digest, inspect, inspect_images, inspect_shard, load
from pipelines.datasets.probe import Flag, describe
from pipelines.datasets.shards import (
    PACK_OPTIONS_NAME,
    ShardContent,
    find_shards,
    skipped_next_to,
)
from pipelines.datasets.skipped import SkippedFiles
from pipelines.datasets.table import ImageTable, Members, PathTable

log = logging.getLogger(__name__)

_PIECE_SIZE = 4096
_MAX_READ_AGAIN = 1000
"""Number of images whose damage is described from their content."""


def build_index(
    root: Path,
    out: Path,
    workers: int,
    progress: Progress = lambda done, total: None,
    decode: bool = False,
    options: ListOptions | ParquetOptions | None = None,
) -> Index:
    """Build the index of `root` in the file `out`; continue an interrupted attempt.

    Args:
        root: class folders, ``train`` and ``val`` folders of them, tar shards (``shards.find_shards``), Parquet files
            (``parquet.find_parquet``), or the folder of the images of lists.
        out: written at the end; until then, a hidden folder next to it keeps the pieces.
        decode: decode every image, to find all that training cannot read.
        options: lists of images, or columns of Parquet files; None: default columns.

    Raises:
        UserError: there is nothing to index, the data is inconsistent, or `out` cannot be written.
    """
    if not root.is_dir():
        raise UserError("ROOT", str(root), "is not a directory", "Specify the folder of the data set.")
    if out.is_dir():
        raise UserError(
            "--out", str(out), "is a folder", f"Specify a file, for example {out / 'imagenet.index'}."
        )
    parts = out.with_name(f".{out.name}.parts")
    try:
        parts.mkdir(parents=True, exist_ok=True)
        if not os.access(parts, os.W_OK):
            raise PermissionError(13, "Permission denied", str(parts))
    except OSError as error:
        remedy = "Specify --out FILE, and train with data.index=FILE."
        raise UserError("--out", str(out), f"cannot be written: {error.strerror}", remedy) from None
    index = _build(root, parts, workers, progress, decode, options)
    write_index(out, root, index)
    shutil.rmtree(parts, ignore_errors=True)
    return index


def _build(
    root: Path,
    parts: Path,
    workers: int,
    progress: Progress,
    decode: bool,
    options: ListOptions | ParquetOptions | None,
) -> Index:
    if isinstance(options, ListOptions):
        return _index_lists(root, options, parts, workers, progress, decode)
    shards = find_shards(root)
    parquet = ParquetFiles() if shards else find_parquet(root)
    if parquet.splits:
        return index_parquet(root, parquet, options or ParquetOptions(), parts, workers, progress, decode)
    if options is not None:
        remedy = "Specify their folder, or leave out --image-column, --label-column and --classes."
        raise UserError("ROOT", str(root), "contains no Parquet files of a training split", remedy)
    if shards:
        states = {name: shard_states(paths) for name, paths in shards.items()}
        return index_shards(root, shards, states, parts, workers, progress, decode)
    return _index_folders(root, parts, workers, progress, decode)


def list_source(root: Path, index_file: Path | None = None) -> Index:
    """Open a data set from its index, else list an image folder without inspecting the images.

    Args:
        index_file: default: the index in `root`, if any.

    Raises:
        UserError: there are no images, or they are in tar shards (``ROOT``).
    """
    remedy = "Specify a folder of class folders."
    already_packed = UserError("ROOT", str(root), "already contains tar shards", remedy)
    file = index_file or default_out(root)
    if index_file is not None or file.is_file():
        index = open_index(file, root)
    else:
        if find_shards(root):
            raise already_packed
        if find_parquet(root).splits:
            remedy = f"Create their index with `dl2pa data index {root}`."
            raise UserError("ROOT", str(root), "contains Parquet files without an index", remedy)
        tables = _list_folders(root)
        splits = {name: SplitIndex(table, np.zeros(len(table), np.uint8)) for name, table in tables.items()}
        classes = next(iter(tables.values())).classes
        index = Index(splits, classes, read_words(root, classes))
    members = [split.table.members for split in index.splits.values()]
    if any(each is not None and each.spans is None for each in members):
        raise already_packed
    return index


def problems_of(index: Index, root: Path) -> Iterator[dict[str, str]]:
    """Yield split, path relative to `root` (in a shard with the member name), kinds and reason of flagged images."""
    num_read = 0
    for name, split in index.splits.items():
        for i in np.flatnonzero(split.flags).tolist():
            kinds = [str(flag.name).lower() for flag in Flag(int(split.flags[i]))]
            path = os.path.relpath(split.table.path(i), root)
            reason = describe(split.table, i, Flag(int(split.flags[i])), read=num_read < _MAX_READ_AGAIN)
            num_read += 1
            yield {"half": name, "path": path, "kinds": ", ".join(kinds), "reason": reason}


def _index_folders(root: Path, parts: Path, workers: int, progress: Progress, decode: bool) -> Index:
    listed_ns = time.time_ns()
    tables = _list_folders(root)
    states = {name: folder_states(table, listed_ns) for name, table in tables.items()}
    return Index(*_index_tables(root, tables, states, parts, workers, progress, decode))


def _index_lists(
    root: Path, options: ListOptions, parts: Path, workers: int, progress: Progress, decode: bool
) -> Index:
    listed_ns = time.time_ns()
    tables = open_lists(root, options)
    states = {name: listed_states(table, listed_ns) for name, table in tables.items()}
    content = _index_tables(root, tables, states, parts, workers, progress, decode)
    return Index(*content, source=_source_of(options))


def _source_of(options: ListOptions) -> Source:
    files = {**dict(options.files().values()), "--classes": options.classes}
    given = {"--columns": ",".join(options.columns)} if options.columns else {}
    return Source.of({**given, **({"--skip-missing": ""} if options.skip_missing else {})}, files)


def _index_tables(
    root: Path,
    tables: dict[str, ImageTable],
    states: dict[str, FileStates],
    parts: Path,
    workers: int,
    progress: Progress,
    decode: bool,
) -> tuple[dict[str, SplitIndex], tuple[str, ...], dict[str, str]]:
    """Inspect the images of files; return the splits, the class names and their readable names."""
    pieces = {name: list(_pieces_of(table, parts, decode)) for name, table in tables.items()}
    inspect(inspect_images, [p for each in pieces.values() for p in each], workers, progress)
    splits: dict[str, SplitIndex] = {}
    for name, table in tables.items():
        stored = [load(piece) for piece in pieces[name]]
        sizes = np.concatenate([part["sizes"] for part in stored])
        flags = np.concatenate([part["flags"] for part in stored])
        splits[name] = SplitIndex(replace(table, sizes=sizes), flags, states[name])
    classes = next(iter(tables.values())).classes
    return splits, classes, read_words(root, classes)


def _list_folders(root: Path) -> dict[str, ImageTable]:
    if not is_split_folder(root / "train"):
        return {"all": index_folder(root, None, "ROOT")}
    splits: list[Split] = ["train", "val"] if (root / "val").is_dir() else ["train"]
    return {split: open_folders(root, None, None, split) for split in splits}


def _pieces_of(table: ImageTable, parts: Path, decode: bool) -> Iterator[Piece]:
    for start in range(0, len(table), _PIECE_SIZE):
        names = table.files.part(start, min(start + _PIECE_SIZE, len(table)))
        lengths = np.array(table.lengths[start : start + _PIECE_SIZE])
        key = digest(decode, str(table.root), bytes(names.blob), names.ends.tobytes(), lengths.tobytes())
        yield Piece(table.root, names, lengths, parts / f"{key}.npz", decode)


def index_shards(
    root: Path,
    shards: dict[str, list[Path]],
    states: dict[str, FileStates],
    parts: Path,
    workers: int,
    progress: Progress,
    decode: bool,
    work: Callable[[Piece], int] = inspect_shard,
) -> Index:
    """Index the shards of each split.

    Args:
        root: folder with the files of class names, and of archives that are not read.
        states: of the shards, before they are read.
        parts: folder of the finished pieces.
        work: inspects one shard.

    Raises:
        UserError: a split has no images, or the shards are damaged or inconsistent (``ROOT``).
    """
    texts = text_digests(root, CLASS_FILES)
    pieces: dict[str, list[Piece]] = {name: [] for name in shards}
    for name, paths in shards.items():
        tags = states[name].tags
        for i, path in enumerate(paths):
            about = (str(path), states[name].sizes.item(i), states[name].times.item(i))
            about = about if tags is None else (*about, tags[i])
            result = parts / f"{digest(decode, *about)}.npz"
            pieces[name].append(Piece(path.parent, PathTable.of([path.name]), None, result, decode))
    inspect(work, [p for each in pieces.values() for p in each], workers, progress)
    contents = {name: [ShardContent.of(load(piece)) for piece in each] for name, each in pieces.items()}
    skipped = {name: SkippedFiles() for name in shards}
    for name, each in contents.items():
        for content in each:
            skipped[name].update(content.skipped)
        if not any(len(content.labels) for content in each):
            message = f"its shards of the split {name!r} contain no images{skipped[name].because()}"
            raise UserError("ROOT", str(root), message, "See docs/data.md for the contents of a shard.")
    next(iter(skipped.values())).update(skipped_next_to(root, shards))
    distinct = {label for each in contents.values() for content in each for label in content.labels}
    classes = shard_classes(root, [label for label in distinct if isinstance(label, str)])
    positions = (root / PACK_OPTIONS_NAME).is_file()
    number_of = number_labels(distinct, classes, root, positions=positions)
    labels = {
        name: np.array([number_of[label] for content in each for label in content.labels], dtype=np.int64)
        for name, each in contents.items()
    }
    if classes is None:
        classes = tuple(str(k) for k in range(1 + max(number_of.values())))
    splits = {
        name: _join(pieces[name], contents[name], labels[name], classes, skipped[name], states[name])
        for name in shards
    }
    return Index(splits, classes, read_words(root, classes), texts)


def _join(
    pieces: Sequence[Piece],
    contents: Sequence[ShardContent],
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    skipped: SkippedFiles,
    states: FileStates,
) -> SplitIndex:
    counts = [len(content.labels) for content in contents]
    members = Members(
        np.repeat(np.arange(len(contents), dtype=np.int32), counts),
        np.concatenate([content.offsets for content in contents]),
    )
    lengths = np.concatenate([content.lengths for content in contents])
    files = PathTable.of(piece.names[0] for piece in pieces)
    table = ImageTable.of(pieces[0].root, files, lengths, labels, classes, members)
    sizes = np.concatenate([content.sizes for content in contents])
    flags = np.concatenate([content.flags for content in contents])
    return SplitIndex(replace(table, sizes=sizes, skipped=skipped), flags, states)


def default_out(root: Path) -> Path:
    """The index file that training opens by default."""
    return root / INDEX_NAME
