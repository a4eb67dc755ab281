"""Files of embeddings: computed in chunks, so that a stopped command continues, then written as .npz or Parquet."""

from __future__ import annotations

import shutil
import threading
import zipfile
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from dl2pa.osutil import LockResult, read_json, replacing, try_lock, write_json

if TYPE_CHECKING:
    from dl2pa.bulk.classifier import BulkClassifier, Progress
    from pipelines.datasets.table import ImageTable

_IMAGES = 2048
"""Approximate number of images in a chunk."""
SUFFIXES = (".npz", ".parquet")
_EARLIER = {"--loader": "torchvision"}
"""Settings of embeddings whose record does not name them."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Content of a chunk: embeddings [n, d], their positions int64 [n], and the unreadable images with the reasons."""

    embedding: NDArray[Any]
    samples: NDArray[np.int64]
    failures: dict[int, str]


@dataclass(frozen=True, eq=False)
class Columns:
    """Columns of the images, in the order of the table.

    Attributes:
        paths: as they were named.
        classes, labels: class name and position int64 [N]; None if no class is known.
    """

    paths: Sequence[str]
    classes: Sequence[str] | None
    labels: NDArray[np.int64] | None


class EmbeddingFile:
    """The file that `dl2pa embed` writes, and the folder next to it in which the chunks are kept until then."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self.dtype = dtype
        self.parts = path.with_name(f"{path.name}.parts")
        self.record = self.parts / "record.json"

    def chunk(self, number: int) -> Path:
        return self.parts / f"{number:06d}.npz"

    def compute(
        self,
        bulk: BulkClassifier,
        table: ImageTable,
        columns: Columns,
        progress: Progress,
        elsewhere: Callable[[], None] | None = None,
    ) -> dict[int, str]:
        """Compute the missing chunks and write the file; return the unreadable images with the reasons.

        Args:
            elsewhere: computes the missing chunks in other processes, by ``compute_share``.

        Raises:
            UserError: the folder of chunks has those of other images or another model, or is in use (``--out``).
        """
        identity = {
            "images": table.fingerprint,
            "model": bulk.digest(),
            "--dtype": self.dtype,
            "--batch-size": bulk.options.batch,
            "--precision": bulk.precision,
            "--loader": bulk.options.loader,
        }
        self.parts.mkdir(parents=True, exist_ok=True)
        with _locked(self.parts / ".lock", self.path):
            self._check(identity)
            write_json(self.record, identity, indent=1)
            missing = self.missing_chunks(bulk, table)
            progress(self._done(bulk, table, missing), len(table))
            if missing and elsewhere is not None:
                with self._watch(bulk, table, progress):
                    elsewhere()
            elif missing:
                self.compute_share(bulk, table, missing, progress)
            chunks = [self.chunk(i) for i in range(self._count(bulk, table))]
            _WRITERS[self.path.suffix.lower()](self.path, chunks, columns)
            failures: dict[int, str] = {}
            for chunk in map(_read, chunks):
                failures |= chunk.failures
            shutil.rmtree(self.parts, ignore_errors=True)
        return failures

    def _check(self, identity: dict[str, Any]) -> None:
        before = read_json(self.record)
        before = {**_EARLIER, **before} if before else {}
        changed = next((key for key in identity if before and before.get(key) != identity[key]), None)
        if changed is not None:
            message = f"{self.parts} contains unfinished embeddings with another value of {changed}"
            if before.get(changed) is not None:
                message += f", {before[changed]}"
            remedy = "Repeat the earlier command with that value, give another --out, or remove that folder."
            raise UserError("--out", str(self.path), message, remedy)

    def missing_chunks(self, bulk: BulkClassifier, table: ImageTable) -> list[int]:
        """Numbers of the chunks that do not exist, ascending."""
        return [i for i in range(self._count(bulk, table)) if not self.chunk(i).is_file()]

    def compute_share(
        self, bulk: BulkClassifier, table: ImageTable, numbers: Sequence[int], progress: Progress
    ) -> None:
        """Compute and write some chunks, given by ascending numbers."""
        batch, steps = bulk.options.batch, _steps(bulk)
        samples = [i for number in numbers for i in _samples(bulk, table, number)]
        before, rows = self._done(bulk, table, self.missing_chunks(bulk, table)), list[Chunk]()
        last = -(-len(samples) // batch) - 1
        with closing(bulk.embeddings(table, samples)) as embedded:
            for step, (images, vectors) in enumerate(embedded):
                rows.append(Chunk(vectors.numpy().astype(self.dtype), images.samples, images.failures))
                progress(before + min((step + 1) * batch, len(samples)), len(table))
                if (step + 1) % steps == 0 or step == last:
                    _write(self.chunk(numbers[step // steps]), rows)
                    rows = []

    def _count(self, bulk: BulkClassifier, table: ImageTable) -> int:
        return -(-len(table) // (_steps(bulk) * bulk.options.batch))

    def _done(self, bulk: BulkClassifier, table: ImageTable, missing: Sequence[int]) -> int:
        return len(table) - sum(len(_samples(bulk, table, number)) for number in missing)

    @contextmanager
    def _watch(self, bulk: BulkClassifier, table: ImageTable, progress: Progress) -> Generator[None]:
        """Context in which the chunks that other processes write are shown as progress, once a second."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(1.0):
                progress(self._done(bulk, table, self.missing_chunks(bulk, table)), len(table))

        thread = threading.Thread(target=watch, name="dl2pa-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _steps(bulk: BulkClassifier) -> int:
    """Batches of a chunk."""
    return max(1, _IMAGES // bulk.options.batch)


def _samples(bulk: BulkClassifier, table: ImageTable, number: int) -> range:
    """Images of a chunk, readable or not."""
    size = _steps(bulk) * bulk.options.batch
    return range(number * size, min((number + 1) * size, len(table)))


def _write(path: Path, rows: Sequence[Chunk]) -> None:
    failures = {i: reason for row in rows for i, reason in row.failures.items()}
    with replacing(path, sum(row.embedding.nbytes for row in rows)) as temporary:
        np.savez(
            temporary,
            embedding=np.concatenate([row.embedding for row in rows]),
            samples=np.concatenate([row.samples for row in rows]),
            failed=np.array(list(failures), np.int64),
            reasons=np.array(list(failures.values()), np.str_),
        )


def _read(path: Path) -> Chunk:
    with np.load(path, allow_pickle=False) as stored:
        failures = dict(zip(stored["failed"].tolist(), stored["reasons"].tolist(), strict=True))
        return Chunk(stored["embedding"], stored["samples"], failures)


@contextmanager
def _locked(path: Path, out: Path) -> Generator[None]:
    """Context in which this process alone writes to the folder of chunks, where the file system has locks."""
    with path.open("w") as file:
        if try_lock(file.fileno()) is LockResult.HELD:
            message = "is being written by another process"
            raise UserError("--out", str(out), message, "Wait for it, or give another --out.")
        yield


def _rows(columns: Columns, samples: NDArray[np.int64]) -> dict[str, Any]:
    """The columns of some images, without the embedding."""
    rows: dict[str, Any] = {"path": [columns.paths[i] for i in samples.tolist()]}
    if columns.classes is not None and columns.labels is not None:
        rows["class"] = [columns.classes[i] for i in samples.tolist()]
        rows["label"] = columns.labels[samples]
    return rows


def _write_npz(path: Path, chunks: Sequence[Path], columns: Columns) -> None:
    """Write arrays `path`, `embedding` [N, d] and, if known, `class` and `label`, without all embeddings in memory."""
    samples = np.concatenate([_read(chunk).samples for chunk in chunks])
    first = _read(chunks[0]).embedding
    shape = (len(samples), first.shape[1])
    with (
        replacing(path, shape[0] * shape[1] * first.itemsize) as temporary,
        zipfile.ZipFile(temporary, "w", allowZip64=True) as archive,
    ):
        with archive.open("embedding.npy", "w", force_zip64=True) as file:
            header = {"descr": first.dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                file.write(np.ascontiguousarray(_read(chunk).embedding).data)
        for name, values in _rows(columns, samples).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                array = values if name == "label" else np.array(values, np.str_)
                np.lib.format.write_array(file, array, allow_pickle=False)


def _write_parquet(path: Path, chunks: Sequence[Path], columns: Columns) -> None:
    """Write the same columns as Parquet, one row group per chunk; `embedding` is a list of fixed size."""
    import pyarrow
    import pyarrow.parquet as pq

    arrow: Any = pyarrow
    parquet: Any = pq
    with replacing(path) as temporary:
        writer: Any = None
        for chunk in map(_read, chunks):
            rows = _rows(columns, chunk.samples)
            texts = {
                name: arrow.array(list(map(utf8, rows[name])), arrow.string())
                for name in rows
                if name != "label"
            }
            values = arrow.array(chunk.embedding.reshape(-1))
            vectors = arrow.FixedSizeListArray.from_arrays(values, chunk.embedding.shape[1])
            content = {"path": texts.pop("path"), "embedding": vectors, **texts}
            if "label" in rows:
                content["label"] = arrow.array(rows["label"])
            batch = arrow.table(content)
            writer = writer or parquet.ParquetWriter(temporary, batch.schema)
            writer.write_table(batch)
        writer.close()


def utf8(text: str) -> str:
    """Text that UTF-8 can encode: bytes of a path that are not UTF-8 are replaced."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


_WRITERS: dict[str, Callable[[Path, Sequence[Path], Columns], None]] = {
    ".npz": _write_npz,
    ".parquet": _write_parquet,
}
