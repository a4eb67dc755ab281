"""Build the index of an image folder or of tar shards, in parallel and resumable."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from dl2pa.osutil import replacing
from pipelines.datasets.arrays import Split
from pipelines.datasets.classes import read_words, shard_classes
from pipelines.datasets.folder import index_folder, is_split_folder, open_folders
from pipelines.datasets.freshness import FileStates, folder_states, shard_states, text_digests
from pipelines.datasets.index import CLASS_FILES, INDEX_NAME, Index, SplitIndex, open_index, write_index
from pipelines.datasets.labels import number_labels
from pipelines.datasets.probe import Flag, Probe, describe, probe
from pipelines.datasets.shards import (
    PACK_OPTIONS_NAME,
    ShardContent,
    find_shards,
    read_shard,
    skipped_next_to,
)
from pipelines.datasets.skipped import SkippedFiles
from pipelines.datasets.table import ImageTable, Members, PathTable
from pipelines.parallel import in_parallel

log = logging.getLogger(__name__)

_PIECE_SIZE = 4096
_MAX_READ_AGAIN = 1000
"""Number of images whose damage is described from their content."""
_PIECE_VERSION = 3
"""Pieces of other versions are not continued."""

Progress = Callable[[int, int], None]
"""Called with (done, total): images, or shards."""


@dataclass(frozen=True)
class _Piece:
    """Files to inspect: some images of a folder, or one shard (one name, no lengths)."""

    root: Path
    names: PathTable
    lengths: NDArray[np.int64] | None
    result: Path
    decode: bool


def build_index(
    root: Path,
    out: Path,
    workers: int,
    progress: Progress = lambda done, total: None,
    decode: bool = False,
) -> Index:
    """Build the index of `root` in the file `out`; continue an interrupted attempt.

    Args:
        root: class folders, ``train`` and ``val`` folders of them, or tar shards (``shards.find_shards``).
        out: written at the end; until then, a hidden folder next to it keeps the pieces.
        decode: decode every image, to find all that training cannot read.

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
    shards = find_shards(root)
    if shards:
        index = _index_shards(root, shards, parts, workers, progress, decode)
    else:
        index = _index_folders(root, parts, workers, progress, decode)
    write_index(out, root, index)
    shutil.rmtree(parts, ignore_errors=True)
    return index


def list_source(root: Path) -> Index:
    """Open an image folder from its index, else list it without inspecting the images.

    Raises:
        UserError: there are no images, or they are in tar shards (``ROOT``).
    """
    remedy = "Specify a folder of class folders."
    already_packed = UserError("ROOT", str(root), "already contains tar shards", remedy)
    file = default_out(root)
    if file.is_file():
        index = open_index(file, root)
    else:
        if find_shards(root):
            raise already_packed
        tables = _list_folders(root)
        splits = {name: SplitIndex(table, np.zeros(len(table), np.uint8)) for name, table in tables.items()}
        classes = next(iter(tables.values())).classes
        index = Index(splits, classes, read_words(root, classes))
    if any(split.table.members is not None for split in index.splits.values()):
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
    pieces = {name: list(_pieces_of(table, parts, decode)) for name, table in tables.items()}
    _inspect(_inspect_images, [p for each in pieces.values() for p in each], workers, progress)
    splits: dict[str, SplitIndex] = {}
    for name, table in tables.items():
        stored = [_load(piece) for piece in pieces[name]]
        sizes = np.concatenate([part["sizes"] for part in stored])
        flags = np.concatenate([part["flags"] for part in stored])
        splits[name] = SplitIndex(replace(table, sizes=sizes), flags, folder_states(table, listed_ns))
    classes = next(iter(tables.values())).classes
    return Index(splits, classes, read_words(root, classes))


def _list_folders(root: Path) -> dict[str, ImageTable]:
    if not is_split_folder(root / "train"):
        return {"all": index_folder(root, None, "ROOT")}
    splits: list[Split] = ["train", "val"] if (root / "val").is_dir() else ["train"]
    return {split: open_folders(root, None, None, split) for split in splits}


def _pieces_of(table: ImageTable, parts: Path, decode: bool) -> Iterator[_Piece]:
    for start in range(0, len(table), _PIECE_SIZE):
        names = table.files.part(start, min(start + _PIECE_SIZE, len(table)))
        lengths = np.array(table.lengths[start : start + _PIECE_SIZE])
        digest = _digest(decode, str(table.root), bytes(names.blob), names.ends.tobytes(), lengths.tobytes())
        yield _Piece(table.root, names, lengths, parts / f"{digest}.npz", decode)


def _index_shards(
    root: Path,
    shards: dict[str, list[Path]],
    parts: Path,
    workers: int,
    progress: Progress,
    decode: bool,
) -> Index:
    states = {name: shard_states(paths) for name, paths in shards.items()}
    texts = text_digests(root, CLASS_FILES)
    pieces: dict[str, list[_Piece]] = {name: [] for name in shards}
    for name, paths in shards.items():
        for path, size, modified in zip(
            paths, states[name].sizes.tolist(), states[name].times.tolist(), strict=True
        ):
            result = parts / f"{_digest(decode, str(path), size, modified)}.npz"
            pieces[name].append(_Piece(path.parent, PathTable.of([path.name]), None, result, decode))
    _inspect(_inspect_shard, [p for each in pieces.values() for p in each], workers, progress)
    contents = {name: [ShardContent.of(_load(piece)) for piece in each] for name, each in pieces.items()}
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
    pieces: Sequence[_Piece],
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


def _inspect(work: Callable[[_Piece], int], pieces: list[_Piece], workers: int, progress: Progress) -> None:
    """Process the pieces that no earlier attempt finished."""
    total, missing = sum(len(p.names) for p in pieces), [p for p in pieces if not _is_complete(p)]
    done = total - sum(len(p.names) for p in missing)
    progress(done, total)
    for count in in_parallel(work, missing, min(workers, len(missing))):
        done += count
        progress(done, total)


def _inspect_images(piece: _Piece) -> int:
    assert piece.lengths is not None
    pairs = zip(piece.names, piece.lengths.tolist(), strict=True)
    probes = [inspect_image(piece.root / name, length, piece.decode) for name, length in pairs]
    sizes = np.array([(one.height, one.width) for one in probes], dtype=np.int32).reshape(-1, 2)
    _store(piece, {"sizes": sizes, "flags": np.array([one.flags for one in probes], dtype=np.uint8)})
    return len(probes)


def inspect_image(path: Path, length: int, decode: bool) -> Probe:
    """Inspect an image file of `length` bytes; see `probe.probe`."""
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return Probe(0, 0, Flag.UNREADABLE)
    try:
        return probe(handle, 0, length, path.name, decode)
    finally:
        os.close(handle)


def _inspect_shard(piece: _Piece) -> int:
    _store(piece, read_shard(piece.root / piece.names[0], piece.decode).columns())
    return 1


def _store(piece: _Piece, columns: dict[str, Any]) -> None:
    with replacing(piece.result) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **{key: np.asarray(value) for key, value in columns.items()})


def _load(piece: _Piece) -> dict[str, Any]:
    with np.load(piece.result) as stored:
        return {key: stored[key] for key in stored}


def _is_complete(piece: _Piece) -> bool:
    """Whether an earlier attempt has finished a piece; its file may be empty after a power failure."""
    if not piece.result.exists():
        return False
    try:
        _check_columns(piece, _load(piece))
    except (*_DAMAGE, OSError) as error:
        log.warning("%s is damaged (%s): the files are inspected again", piece.result, error)
        return False
    return True


_DAMAGE = (
    *(ValueError, TypeError, EOFError, KeyError, AttributeError, RecursionError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)
"""Errors of reading a damaged piece."""


def _check_columns(piece: _Piece, columns: dict[str, Any]) -> None:
    """Check types and lengths of the columns of a piece.

    Raises:
        Any of `_DAMAGE`: they are damaged.
    """
    count = len(columns["flags"]) if piece.lengths is None else len(piece.names)
    shapes = {"sizes": (count, 2), "flags": (count,)}
    if piece.lengths is None:
        shapes |= {"offsets": (count,), "lengths": (count,)}
        if len(ShardContent.of(columns).labels) != count:
            raise ValueError("labels are missing")
    for name, shape in shapes.items():
        column = columns[name]
        if column.shape != shape or column.dtype.kind not in "iu":
            raise ValueError(f"{name} has shape {column.shape} and type {column.dtype}")


def _digest(*about: object) -> str:
    return hashlib.sha256(repr((_PIECE_VERSION, *about)).encode()).hexdigest()[:32]


def default_out(root: Path) -> Path:
    """The index file that training opens by default."""
    return root / INDEX_NAME
