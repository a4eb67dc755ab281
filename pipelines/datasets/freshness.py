"""Refuse an index that is older than the files it describes.

An index records the size and modification time of each shard, or the modification time of each folder of images, which
changes when a file is added, removed or renamed. Folders with another time, for example those of a copy, are listed and
their files compared. Images that were overwritten in place are not noticed here; one of another length is reported when
it is read.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets.folder import class_folders, list_images
from pipelines.datasets.lists import file_lengths
from pipelines.datasets.table import ImageTable, PathTable

log = logging.getLogger(__name__)

_SCAN_THREADS = 16
_TICKS = (1, 100, 1_000, 1_000_000, 1_000_000_000, 2_000_000_000)
"""Units in nanoseconds in which file systems and archives store times."""
_CLOCK_NS = 10_000_000
"""Time that the times of files may lag behind the clock: the kernel's timer tick."""
_GONE = -1


@dataclass(frozen=True, eq=False)
class FileStates:
    """State of the shards of a split, or of its folders, when it was indexed.

    Attributes:
        paths: M paths relative to the folder of the split; "" is that folder.
        times: int64 [M], modification times in nanoseconds; 0 if the folder changed while it was listed.
        sizes: int64 [M], bytes of each shard; zeros for folders.
        tags: ETags of shards that were indexed in object storage.
    """

    paths: PathTable
    times: NDArray[np.int64]
    sizes: NDArray[np.int64]
    tags: PathTable | None = None


def shard_states(shards: Iterable[Path]) -> FileStates:
    """States of shards, before they are read."""
    names = [shard.name for shard in shards]
    states = [shard.stat() for shard in shards]
    times, sizes = ([s.st_mtime_ns for s in states], [s.st_size for s in states])
    return FileStates(PathTable.of(names), np.array(times, np.int64), np.array(sizes, np.int64))


def file_states(root: Path, names: Sequence[str]) -> FileStates:
    """States of files, before they are read.

    Args:
        names: paths relative to `root`.
    """
    paths = PathTable.of(names)
    return FileStates(paths, *_now(root, paths))


def listed_states(table: ImageTable, listed_ns: int) -> FileStates:
    """States of the folders that contain the images of a list; see ``folder_states``."""
    return _states_of(table, {name.rpartition("/")[0] for name in table.files}, listed_ns)


def folder_states(table: ImageTable, listed_ns: int) -> FileStates:
    """States of the folders of a table's images and of their parents.

    Args:
        listed_ns: time at which the listing began.
    """
    folders = {""}
    for folder in {name.rpartition("/")[0] for name in table.files}:
        parts = folder.split("/")
        folders.update("/".join(parts[: k + 1]) for k in range(len(parts)))
    return _states_of(table, folders, listed_ns)


def _states_of(table: ImageTable, folders: set[str], listed_ns: int) -> FileStates:
    paths = PathTable.of(sorted(folders))
    times = _now(table.root, paths)[0]
    return FileStates(
        paths, np.where(times < listed_ns - _CLOCK_NS, times, 0), np.zeros(len(paths), np.int64)
    )


def check_shards(
    file: Path, table: ImageTable, states: FileStates, present: Iterable[str], command: str
) -> None:
    """Refuse an index whose shards have changed.

    Args:
        file: the index.
        present: the shards or Parquet files that the split has now, relative to the folder of the split.
        command: the command that builds the index again.

    Raises:
        UserError: a shard has changed, is missing or is new (``data.index``).
    """
    times, sizes = _now(table.root, states.paths)
    changed = ~_same_time(states.times, times)
    resized = states.sizes != sizes
    new = sorted(set(present) - set(states.paths))
    kind = "shard" if table.members is None or table.members.spans is None else "Parquet file"
    remedy = f"Run `{command}` again."
    if (gone := np.flatnonzero(times == _GONE)).size:
        raise stale(
            file, f"{_named(states, gone)} no longer exists", f"Restore it, or run `{command}` again."
        )
    if (where := np.flatnonzero(resized)).size:
        raise stale(file, f"{_named(states, where)} has another size than when it was indexed", remedy)
    if (where := np.flatnonzero(changed)).size:
        remedy = f"{remedy} Copies keep their times with `cp -p` or `rsync -t`."
        raise stale(file, f"{_named(states, where)} was modified after it was indexed, or copied", remedy)
    if new:
        more = f" (and {len(new) - 1:,} more)" if len(new) > 1 else ""
        raise stale(file, f"it does not contain the {kind} {new[0]!r}{more}", remedy)


def check_folders(file: Path, table: ImageTable, states: FileStates, command: str) -> None:
    """Refuse an index whose folders have other files now.

    Raises:
        UserError: images or class folders were added, removed or changed in length (``data.index``).
    """
    times = _now(table.root, states.paths)[0]
    remedy = f"Run `{command}` again."
    if (gone := np.flatnonzero(times == _GONE)).size:
        raise stale(
            file, f"{_named(states, gone)} no longer exists", f"Restore it, or run `{command}` again."
        )
    changed = [states.paths[i] for i in np.flatnonzero(~_same_time(states.times, times)).tolist()]
    known = {path for path in states.paths if path and "/" not in path}
    if "" in changed and (new := sorted(set(class_folders(table.root, "data.root").values()) - known)):
        more = f" (and {len(new) - 1:,} more)" if len(new) > 1 else ""
        raise stale(file, f"it does not contain the class folder {new[0]!r}{more}", remedy)
    folders = sorted({path.partition("/")[0] for path in changed if path})
    recorded = _images_of(table, set(folders))
    for folder in folders:
        current = {(image.path, image.size) for image in list_images(table.root, folder, "data.root")}
        if current != recorded[folder]:
            added, removed = len(current - recorded[folder]), len(recorded[folder] - current)
            problem = f"the class folder {folder!r} has changed since it was indexed"
            raise stale(file, f"{problem}: {added:,} images are new or other, {removed:,} are gone", remedy)
    if folders:
        message = "%s folders of %s have other times than in the index, but the same files; `%s` saves the comparison"
        log.info(message, f"{len(folders):,}", table.root, command)


def check_listed(file: Path, table: ImageTable, states: FileStates, command: str) -> None:
    """Refuse an index of a list whose images are gone or have another length; other files may come and go.

    Raises:
        UserError: images were removed, renamed or changed in length (``data.index``).
    """
    times = _now(table.root, states.paths)[0]
    changed = {states.paths[i] for i in np.flatnonzero(~_same_time(states.times, times)).tolist()}
    if not changed:
        return
    images = {i: name for i, name in enumerate(table.files) if name.rpartition("/")[0] in changed}
    lengths = file_lengths(str(table.root), list(images.values()))
    differ = np.flatnonzero(lengths != table.lengths[np.array(list(images), np.int64)]).tolist()
    if differ:
        first = list(images.values())[differ[0]]
        problem = f"{len(differ):,} listed images are gone or have another length, the first is {first!r}"
        raise stale(file, problem, f"Restore them, or correct the list and run `{command}` again.")


def _images_of(table: ImageTable, folders: set[str]) -> dict[str, set[tuple[str, int]]]:
    """(path, length) of the indexed images in some class folders."""
    images: dict[str, set[tuple[str, int]]] = {folder: set() for folder in folders}
    for path, length in zip(table.files, table.lengths.tolist(), strict=True) if folders else ():
        if (folder := path.partition("/")[0]) in folders:
            images[folder].add((path, length))
    return images


def text_digests(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Digest of each of the files `names` in `root` that exists."""
    files = {name: root / name for name in names}
    return {name: digest_of(f.read_bytes()) for name, f in files.items() if f.is_file()}


def digest_of(content: bytes) -> str:
    """Digest of the content of a text file."""
    return hashlib.sha256(content).hexdigest()[:16]


def _now(root: Path, paths: PathTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Modification times in nanoseconds and sizes of files or folders; -1 for missing ones."""

    def state(name: str) -> tuple[int, int]:
        try:
            found = (root / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return _GONE, _GONE
        return found.st_mtime_ns, found.st_size

    with ThreadPoolExecutor(min(_SCAN_THREADS, 1 + len(paths) // 16)) as pool:
        states = np.array(list(pool.map(state, paths)), dtype=np.int64).reshape(-1, 2)
    return states[:, 0], states[:, 1]


def _same_time(recorded: NDArray[np.int64], now: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether times are equal, or the time now is the recorded one in the coarser unit of another file system."""
    return np.any([recorded // tick * tick == now for tick in _TICKS], axis=0)


def _named(states: FileStates, indices: NDArray[np.int64]) -> str:
    more = f" (and {len(indices) - 1:,} more)" if len(indices) > 1 else ""
    return f"{states.paths[int(indices[0])]!r}{more}"


def stale(file: Path, problem: str, remedy: str) -> UserError:
    """The error for an index that is older than its data."""
    return UserError("data.index", str(file), f"is older than the data: {problem}", remedy)
