"""Files of predictions: CSV, JSON lines or Parquet, written batch by batch."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dl2pa.bulk.embeddings import utf8
from dl2pa.osutil import replacing

if TYPE_CHECKING:
    from dl2pa.model.inference import Prediction

Write = Callable[[Sequence[str], "Sequence[Sequence[Prediction]]"], None]
"""Appends images: their paths, and the most probable classes of each."""

SUFFIXES = (".csv", ".jsonl", ".parquet")


@contextmanager
def prediction_file(path: Path, count: int) -> Generator[Write]:
    """Yield the function that appends rows; the file appears when the context ends without an error.

    CSV and Parquet have the columns `path`, `class_1`, `probability_1`, `class_2` and so on; a line of JSON has the
    entries `image` and `top`, as in the output of `--json`.

    Args:
        count: classes per image.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, _OPEN[path.suffix.lower()](temporary, count) as write:
        yield write


def row_of(path: str, top: Sequence[Prediction]) -> dict[str, Any]:
    """JSON form of the prediction for one image."""
    return {"image": path, "top": [{"class": guess.name, "probability": guess.probability} for guess in top]}


def _names(count: int) -> list[str]:
    return [name for i in range(1, count + 1) for name in (f"class_{i}", f"probability_{i}")]


@contextmanager
def _open_csv(path: Path, count: int) -> Generator[Write]:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", *_names(count)])

        def write(paths: Sequence[str], tops: Sequence[Sequence[Prediction]]) -> None:
            for image, top in zip(paths, tops, strict=True):
                cells = (cell for guess in top for cell in (guess.name, f"{guess.probability:.9g}"))
                writer.writerow([image, *cells])

        yield write


@contextmanager
def _open_jsonl(path: Path, count: int) -> Generator[Write]:
    with path.open("w", encoding="utf-8") as file:

        def write(paths: Sequence[str], tops: Sequence[Sequence[Prediction]]) -> None:
            file.writelines(f"{json.dumps(row_of(*row))}\n" for row in zip(paths, tops, strict=True))

        yield write


_ROW_GROUP = 10_000


@contextmanager
def _open_parquet(path: Path, count: int) -> Generator[Write]:
    import pyarrow
    import pyarrow.parquet as pq

    arrow: Any = pyarrow
    parquet: Any = pq
    kinds = [arrow.string(), arrow.float32()] * count
    schema = arrow.schema([("path", arrow.string()), *zip(_names(count), kinds, strict=True)])
    rows: list[list[Any]] = []

    with parquet.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            columns = zip(*rows, strict=True)
            arrays = [arrow.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
            writer.write_table(arrow.Table.from_arrays(arrays, schema=schema))
            rows.clear()

        def write(paths: Sequence[str], tops: Sequence[Sequence[Prediction]]) -> None:
            for image, top in zip(paths, tops, strict=True):
                rows.append([utf8(image), *(c for guess in top for c in (guess.name, guess.probability))])
            if len(rows) >= _ROW_GROUP:
                flush()

        yield write
        if rows:
            flush()


_OPEN = {".csv": _open_csv, ".jsonl": _open_jsonl, ".parquet": _open_parquet}
