"""Inspect the files of an index in pieces: in parallel, and continued after an interruption."""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dl2pa.osutil import replacing
from pipelines.datasets.probe import Flag, Probe, probe
from pipelines.datasets.shards import ShardContent, read_shard
from pipelines.datasets.table import PathTable
from pipelines.images import is_fault_of_process
from pipelines.parallel import in_parallel

log = logging.getLogger(__name__)

_PIECE_VERSION = 3
"""Pieces of other versions are not continued."""

Progress = Callable[[int, int], None]
"""Called with (done, total): images, shards or files."""


@dataclass(frozen=True)
class Piece:
    """Files to inspect: some images of a folder, or one shard or Parquet file (one name, no lengths).

    Attributes:
        columns: of a Parquet file: images and labels.
    """

    root: Path
    names: PathTable
    lengths: NDArray[np.int64] | None
    result: Path
    decode: bool
    columns: tuple[str, str] = ("", "")


def inspect(work: Callable[[Piece], int], pieces: list[Piece], workers: int, progress: Progress) -> None:
    """Process the pieces that no earlier attempt finished."""
    total, missing = sum(len(p.names) for p in pieces), [p for p in pieces if not _is_complete(p)]
    done = total - sum(len(p.names) for p in missing)
    progress(done, total)
    for count in in_parallel(work, missing, min(workers, len(missing))):
        done += count
        progress(done, total)


def inspect_images(piece: Piece) -> int:
    assert piece.lengths is not None
    pairs = zip(piece.names, piece.lengths.tolist(), strict=True)
    probes = [inspect_image(piece.root / name, length, piece.decode) for name, length in pairs]
    sizes = np.array([(one.height, one.width) for one in probes], dtype=np.int32).reshape(-1, 2)
    store(piece, {"sizes": sizes, "flags": np.array([one.flags for one in probes], dtype=np.uint8)})
    return len(probes)


def inspect_image(path: Path, length: int, decode: bool) -> Probe:
    """Inspect an image file of `length` bytes; see `probe.probe`.

    Raises:
        OSError: too many open files, or no memory.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if is_fault_of_process(error):
            raise
        return Probe(0, 0, Flag.UNREADABLE)
    try:
        return probe(handle, 0, length, path.name, decode)
    finally:
        os.close(handle)


def inspect_shard(piece: Piece) -> int:
    store(piece, read_shard(piece.root / piece.names[0], piece.decode).columns())
    return 1


def store(piece: Piece, columns: dict[str, Any]) -> None:
    with replacing(piece.result) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **{key: np.asarray(value) for key, value in columns.items()})


def load(piece: Piece) -> dict[str, Any]:
    with np.load(piece.result) as stored:
        return {key: stored[key] for key in stored}


def _is_complete(piece: Piece) -> bool:
    """Whether an earlier attempt has finished a piece; its file may be empty after a power failure."""
    if not piece.result.exists():
        return False
    try:
        _check_columns(piece, load(piece))
    except (*_DAMAGE, OSError) as error:
        log.warning("%s is damaged (%s): the files are inspected again", piece.result, error)
        return False
    return True


_DAMAGE = (
    *(ValueError, TypeError, EOFError, KeyError, AttributeError, RecursionError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)
"""Errors of reading a damaged piece."""


def _check_columns(piece: Piece, columns: dict[str, Any]) -> None:
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


def digest(*about: object) -> str:
    return hashlib.sha256(repr((_PIECE_VERSION, *about)).encode()).hexdigest()[:32]
