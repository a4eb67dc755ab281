"""Build the index of tar shards in object storage: each shard is copied to this machine, inspected and removed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from dl2pa.errors import UserError
from dl2pa.osutil import private_temporary_folder
from pipelines.datasets.build_index import index_shards
from pipelines.datasets.classes import NAME_FILES
from pipelines.datasets.freshness import FileStates
from pipelines.datasets.index import Index, SplitIndex, write_index
from pipelines.datasets.pieces import Piece, Progress, digest, store
from pipelines.datasets.shards import PACK_OPTIONS_NAME, read_shard, shards_among
from pipelines.datasets.skipped import is_archive
from pipelines.datasets.table import PathTable
from pipelines.remote.address import RemotePath
from pipelines.remote.files import RemoteFiles
from pipelines.remote.open import FOLDERS, Listing, list_root, renamed
from pipelines.remote.store import RemoteObject, Store, store_of


def build_remote_index(root: RemotePath, out: Path, workers: int, progress: Progress, decode: bool) -> Index:
    """Build the index of the shards in `root`; continue an interrupted attempt.

    Args:
        out: a file, or an object.
        decode: decode every image.

    Raises:
        UserError: there are no shards, they are inconsistent, or `out` cannot be written.
        StorageUnavailable: the server does not answer.
    """
    connection = store_of(root.options)
    listing = list_root(connection, root, "ROOT")
    shards = shards_among(listing)
    if not shards:
        message, remedy = (
            "contains no tar shards",
            "Pack images with `dl2pa data pack`, and upload the shards.",
        )
        raise UserError("ROOT", str(root), message, remedy)
    objects = {name: [_object(listing, path) for path in paths] for name, paths in shards.items()}
    states = {name: _states(each) for name, each in objects.items()}
    parts = private_temporary_folder("index") / digest(decode, str(root))
    parts.mkdir(exist_ok=True)
    with _mirror(connection, root, listing) as mirror, renamed(str(mirror), str(root), "ROOT"):
        paths: dict[str, list[Path]] = {n: [root / path for path in each] for n, each in shards.items()}
        index = index_shards(mirror, paths, states, parts, workers, progress, decode, _inspect)
    _write(connection, root, out, index)
    shutil.rmtree(parts, ignore_errors=True)
    return replace(
        index, splits={name: _connected(split, objects[name]) for name, split in index.splits.items()}
    )


def _object(listing: dict[str, Listing], path: str) -> RemoteObject:
    folder, _, name = path.rpartition("/")
    return listing[folder][name]


def _states(objects: list[RemoteObject]) -> FileStates:
    times, sizes = ([one.modified_ns for one in objects], [one.size for one in objects])
    tags = PathTable.of(one.tag for one in objects)
    names = PathTable.of(one.name for one in objects)
    return FileStates(names, np.array(times, np.int64), np.array(sizes, np.int64), tags)


@contextmanager
def _mirror(connection: Store, root: RemotePath, listing: dict[str, Listing]) -> Generator[Path]:
    """A folder of this machine with the class names of `root`, and empty files for archives that are not read."""
    read = {path for paths in shards_among(listing).values() for path in paths}
    with tempfile.TemporaryDirectory(prefix="dl2pa-") as folder:
        mirror = Path(folder)
        for name in (*NAME_FILES, PACK_OPTIONS_NAME):
            if (one := listing[""].get(name)) is not None:
                with renamed(field="ROOT"):
                    (mirror / name).write_bytes(connection.content(root / name, one))
        for inner in FOLDERS:
            for name in listing[inner]:
                if is_archive(name) and f"{inner}/{name}".strip("/") not in read:
                    (mirror / inner).mkdir(exist_ok=True)
                    (mirror / inner / name).touch()
        yield mirror


def _inspect(piece: Piece) -> int:
    """Copy a shard, list its samples and inspect their images."""
    folder = piece.root
    assert isinstance(folder, RemotePath)
    path, connection = folder / piece.names[0], store_of(folder.options)
    with tempfile.TemporaryDirectory(prefix="dl2pa-") as place:
        local = Path(place) / path.name
        one = connection.list(folder).get(path.name)
        if one is None:
            raise UserError(
                "ROOT", str(path), "was removed while it was being indexed", "Index the data set again."
            )
        connection.download(path, one, local, durable=False)
        with renamed(str(local), str(path)):
            store(piece, read_shard(local, piece.decode).columns())
    return 1


def _write(connection: Store, root: RemotePath, out: Path, index: Index) -> None:
    if not isinstance(out, RemotePath):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_index(out, root, index)
        return
    with tempfile.TemporaryDirectory(prefix="dl2pa-") as place, renamed(field="--out"):
        file = Path(place) / "dl2pa.index"
        write_index(file, root, index)
        connection.upload(file, out)


def _connected(split: SplitIndex, objects: list[RemoteObject]) -> SplitIndex:
    folder = split.table.root
    assert isinstance(folder, RemotePath)
    return replace(split, table=replace(split.table, remote=RemoteFiles(folder, objects)))
