"""Table of a data set's encoded images: file, bytes, label and size."""

from __future__ import annotations

import errno
import hashlib
import os
import tarfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.datasets.arrays import subset_fingerprint
from pipelines.datasets.skipped import SkippedFiles
from pipelines.datasets.spans import NONE, SpanCache, Spans, decompress
from pipelines.images import read_image_file

if TYPE_CHECKING:
    from pipelines.datasets.own import OwnImages
    from pipelines.remote.files import RemoteFiles

_MAX_OPEN = 512
_BLOCK = 512


class PathTable(Sequence[str]):
    """Sequence of relative paths in one block of bytes: small, fast to pickle, and shared between processes.

    A list of 1.28 million strings would be copied into every forked worker, because reference counting writes to
    each string.

    Attributes:
        blob: the concatenated UTF-8 paths.
        ends: [N], end of each path in ``blob``.
    """

    def __init__(self, blob: bytes | NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.blob = blob
        self.ends = ends

    @classmethod
    def of(cls, paths: Iterable[str]) -> PathTable:
        """Build from paths, in order."""
        encoded = [path.encode("utf-8", "surrogateescape") for path in paths]
        return cls(b"".join(encoded), np.cumsum([len(path) for path in encoded], dtype=np.int64))

    def part(self, low: int, high: int) -> PathTable:
        """The paths `low` to `high` - 1."""
        start = int(self.ends[low - 1]) if low else 0
        ends = self.ends[low:high] - start
        return PathTable(bytes(self.blob[start : start + int(ends[-1])]) if len(ends) else b"", ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        start = self.ends.item(position - 1) if position else 0
        path = memoryview(self.blob)[start : self.ends.item(position)]  # pyright: ignore[reportArgumentType]
        return str(path, "utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class Members:
    """Location of images in tar shards or Parquet files.

    Attributes:
        shards: int32 [N], file number of each image.
        offsets: int64 [N], offset of its bytes in that file, or in the decompressed bytes of its span.
        spans: compressed spans of Parquet files; None for tar shards.
    """

    shards: NDArray[np.int32]
    offsets: NDArray[np.int64]
    spans: Spans | None = None

    def take(self, samples: NDArray[np.int64]) -> Members:
        """The locations of ``samples`` [M] in that order."""
        spans = None if self.spans is None else self.spans.take(samples)
        return Members(self.shards[samples], self.offsets[samples], spans)


class _OpenFiles:
    """Cache of open shards: on a shared file system, opening costs more than reading."""

    def __init__(self) -> None:
        self._files: dict[int, FileIO] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[_OpenFiles], tuple[()]]:
        return _OpenFiles, ()  # another process opens the files itself

    def read(self, shard: int, path: Callable[[int], Path], offset: int, length: int) -> bytes:
        file = self._open(shard, path)  # kept until it has been read: it may not be in the cache
        try:
            return os.pread(file.fileno(), length, offset)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        # A network file system was restarted: open files are lost, and can be opened again.
        with self._lock:
            self._files.pop(shard, None)
        file = self._open(shard, path)
        return os.pread(file.fileno(), length, offset)

    def _open(self, shard: int, path: Callable[[int], Path]) -> FileIO:
        file = self._files.get(shard)
        if file is None:
            file = FileIO(path(shard))
            with self._lock:
                if len(self._files) < _MAX_OPEN:
                    file = self._files.setdefault(shard, file)
        return file


@dataclass(frozen=True, eq=False)
class ImageTable:
    """Encoded images on disk with labels; the arrays may be mapped from an index.

    Attributes:
        root: the folder that the paths are relative to.
        files: paths of the N images, or of their shards.
        lengths: int64 [N], bytes per image.
        labels: int64 [N], indices into ``classes``.
        classes: the class names in label order; some may have no images.
        fingerprint: 16 hexadecimal digits that change with any path, offset, length or label, not with ``root``.
        members: location of the images in shards or Parquet files; None if image i is file i.
        sizes: int32 [N, 2], (height, width), zeros if the header could not be read; None if not inspected.
        skipped: the files next to the images that are not read.
        own: images of a user's function; None if they are read from ``files``.
        remote: the shards, if they are in object storage.
    """

    root: Path
    files: PathTable
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    fingerprint: str
    members: Members | None = None
    sizes: NDArray[np.int32] | None = None
    skipped: SkippedFiles = field(default_factory=SkippedFiles, repr=False)
    own: OwnImages | None = None
    remote: RemoteFiles | None = None
    _open: _OpenFiles = field(default_factory=_OpenFiles, repr=False)
    _spans: SpanCache = field(default_factory=SpanCache, repr=False)

    @classmethod
    def of(
        cls,
        root: Path,
        files: PathTable,
        lengths: ArrayLike,
        labels: ArrayLike,
        classes: tuple[str, ...],
        members: Members | None = None,
        own: OwnImages | None = None,
    ) -> ImageTable:
        """Build a table and compute its fingerprint."""
        label_array, length_array = np.asarray(labels, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
        fingerprint = _fingerprint(files, length_array, label_array, members, own)
        return cls(root, files, length_array, label_array, classes, fingerprint, members, own=own)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, samples: NDArray[np.int64]) -> ImageTable:
        """The images ``samples`` [M] in that order."""
        files, members = self.files, self.members
        if members is None:
            files = PathTable.of(self.files[i] for i in samples.tolist())
        else:
            members = members.take(samples)
        labels = self.labels[samples]
        return replace(
            self,
            files=files,
            lengths=self.lengths[samples],
            labels=labels,
            fingerprint=subset_fingerprint(self.fingerprint, samples, labels),
            members=members,
            own=None if self.own is None else self.own.subset(samples),
            sizes=None if self.sizes is None else self.sizes[samples],
        )

    def relabeled(self, classes: tuple[str, ...], label_of: NDArray[np.int64]) -> ImageTable:
        """The same images with label l replaced by ``label_of[l]``, and other class names."""
        labels = label_of[self.labels]
        fingerprint = _fingerprint(self.files, self.lengths, labels, self.members, self.own)
        return replace(self, labels=labels, classes=classes, fingerprint=fingerprint)

    def path(self, i: int) -> Path:
        """Path of image ``i``; in a shard, the path of the shard and the member name."""
        if self.members is None:
            return self.root / self.files[i]
        return self._shard_path(self.members.shards.item(i)) / self._member_name(i)

    def read(self, i: int) -> bytes:
        """The encoded bytes of image ``i``.

        Raises:
            OSError: the file cannot be read.
            BadImage: it is not a regular file, or has more than 256 MiB.
        """
        if self.own is not None:
            return self.own.read(i)
        if self.members is None:
            return read_image_file(os.path.join(self._root, self.files[i]))  # noqa: PTH118  # a Path costs more
        shard, offset = self.members.shards.item(i), self.members.offsets.item(i)
        length = self.lengths.item(i)
        if self.members.spans is None:
            return self._files.read(shard, self._shard_path, offset, length)
        return self._read_span(self.members.spans, i, shard)[offset : offset + length]

    def will_read(self, samples: Sequence[int]) -> None:
        """Announce that ``samples`` will be read soon: those in object storage are requested now, together."""
        if self.remote is not None and self.members is not None:
            shards, offsets = self.members.shards, self.members.offsets
            self.remote.will_read((shards.item(i), offsets.item(i), self.lengths.item(i)) for i in samples)

    @property
    def _files(self) -> _OpenFiles | RemoteFiles:
        return self._open if self.remote is None else self.remote

    def _read_span(self, spans: Spans, i: int, shard: int) -> bytes:
        start, size, codec = spans.starts.item(i), spans.sizes.item(i), spans.codecs.item(i)

        def make() -> bytes:
            data = self._files.read(shard, self._shard_path, start, size)
            return decompress(data, codec, spans.raw_sizes.item(i))

        return make() if codec == NONE else self._spans.get((shard, start, size), make)

    @cached_property
    def _root(self) -> str:
        return str(self.root)

    def _shard_path(self, shard: int) -> Path:
        return self.root / self.files[shard]

    def _member_name(self, i: int) -> str:
        """Member name from the tar header before the image, which may store only its first 100 to 255 bytes."""
        assert self.members is not None
        if self.members.spans is not None:
            return f"row {self.members.spans.rows.item(i)}"
        shard, offset = self.members.shards.item(i), self.members.offsets.item(i)
        try:
            header = self._files.read(shard, self._shard_path, offset - _BLOCK, _BLOCK)
            return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (OSError, tarfile.TarError):
            return f"byte {offset}"


def _fingerprint(
    files: PathTable,
    lengths: NDArray[np.int64],
    labels: NDArray[np.int64],
    members: Members | None,
    own: OwnImages | None,
) -> str:
    digest = hashlib.sha256(memoryview(files.blob))  # pyright: ignore[reportArgumentType]
    location = () if members is None else (members.shards, members.offsets)
    if members is not None and members.spans is not None:
        location = (*location, members.spans.starts)
    for column in (files.ends, lengths, labels, *location):
        digest.update(np.ascontiguousarray(column, dtype="<i8").data)
    digest.update(b"" if own is None else own.digest.encode())
    return digest.hexdigest()[:16]
