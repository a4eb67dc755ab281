"""Parquet files with image bytes, as Hugging Face data sets store them: their splits, columns and images.

A column of images is a structure {bytes, path} or the bytes alone; the names of the classes are in the metadata of the
file under the key `huggingface`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dl2pa.errors import UserError
from pipelines.datasets.folder import image_folders
from pipelines.datasets.parquet_pages import Chunk, Unsupported, Value, values_of
from pipelines.datasets.pieces import Piece, store
from pipelines.datasets.probe import Flag, probe_data
from pipelines.datasets.skipped import SkippedFiles

if TYPE_CHECKING:
    import pyarrow

_SPLIT_NAME = re.compile(r"(?:^|[-_.])(train|validation|valid|val|dev|test)(?=$|[-_.0-9])", re.IGNORECASE)
_VALIDATION = ("validation", "valid", "val", "dev", "test")
"""Names of the validation split, in order of preference."""
_DEPTH = 2
_SPAN_COLUMNS = ("starts", "span_sizes", "raw_sizes", "codecs", "rows")


@dataclass(frozen=True)
class ParquetOptions:
    """Columns of the images and labels; None: found by their type and name. File of the class names, if any."""

    image: str | None = None
    label: str | None = None
    classes: Path | None = None


@dataclass(frozen=True)
class ParquetColumns:
    """Columns of a file, and the class names in label order if the file has them."""

    image: str
    label: str
    names: tuple[str, ...] | None


@dataclass(frozen=True)
class ParquetFiles:
    """Files of each split by their paths relative to the folder, sorted; files of other splits are counted."""

    splits: dict[str, list[str]] = field(default_factory=dict)
    skipped: SkippedFiles = field(default_factory=SkippedFiles)


def find_parquet(root: Path) -> ParquetFiles:
    """The Parquet files of a folder without class folders: in it, or one or two folders below.

    The split is in the name of the file (``train-00000-of-00002.parquet``) or of its folder. Without a split in
    any name, all files are ``all``.

    Raises:
        UserError: the files belong to several data sets (``ROOT``).
    """
    if not root.is_dir() or any(len(image_folders(root / name, limit=2)) == 2 for name in ("", "train")):
        return ParquetFiles()
    paths = sorted(
        path.relative_to(root)
        for depth in range(_DEPTH + 1)
        for path in root.glob("*/" * depth + "*.parquet")
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    named = [(path, *_split_of(path)) for path in paths]
    configurations = sorted({folder for _, split, folder in named if split})
    if len(configurations) > 1:
        message = f"contains Parquet files of several data sets: {', '.join(configurations)}"
        raise UserError("ROOT", str(root), message, f"Specify one of them: {root / configurations[0]}.")
    present = {split for _, split, _ in named}
    if paths and not any(present):
        return ParquetFiles({"all": [str(path) for path in paths]})
    return _choose(named, next((name for name in _VALIDATION if name in present), None))


def _split_of(path: Path) -> tuple[str, str]:
    """Name of the split of a file, empty if it has none, and the folder of its data set."""
    if match := _SPLIT_NAME.search(path.stem):
        return match[1].lower(), str(path.parent)
    if match := _SPLIT_NAME.fullmatch(path.parent.name):
        return match[1].lower(), str(path.parent.parent)
    return "", str(path.parent)


def _choose(named: Iterable[tuple[Path, str, str]], validation: str | None) -> ParquetFiles:
    files = ParquetFiles()
    for path, split, _ in named:
        if split in ("train", validation):
            files.splits.setdefault("train" if split == "train" else "val", []).append(str(path))
        else:
            files.skipped.add(f"Parquet file of the split {split!r}" if split else "Parquet file", str(path))
    return files


def columns_of(path: Path, options: ParquetOptions) -> ParquetColumns:
    """Columns of a Parquet file.

    Raises:
        UserError: the file cannot be read, or has no such columns.
    """
    import pyarrow.parquet

    try:
        schema: pyarrow.Schema = pyarrow.parquet.read_schema(path)
        content: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features: dict[str, Any] = content.get("info", {}).get("features", {})
        kinds = {name: about.get("_type") for name, about in features.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise broken(path, f"is not a readable Parquet file ({_first_line(error)})") from None
    image = _image_column(path, schema, kinds, options.image)
    label = _label_column(path, schema, kinds, options.label)
    names: Any = features.get(label, {}).get("names")
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        names = None
    return ParquetColumns(image, label, None if names is None else tuple(names))


def _image_column(path: Path, schema: pyarrow.Schema, kinds: Mapping[str, Any], chosen: str | None) -> str:
    holding = [name for name in schema.names if _has_bytes(schema.field(name).type)]
    if chosen is not None:
        if chosen in holding:
            return chosen
        message = f"is not a column of image bytes in {path}, which has {_list(holding)}"
        raise UserError("--image-column", chosen, message, "Specify one of them, or leave the option out.")
    images = [name for name in holding if kinds.get(name) == "Image"] or holding
    if len(images) == 1:
        return images[0]
    problem = f"has {len(images)} columns of image bytes: {_list(images)}" if images else "has no image bytes"
    remedy = (
        "Specify --image-column NAME." if images else "See docs/data.md for the contents of Parquet files."
    )
    raise UserError("ROOT", str(path), problem, remedy)


def _has_bytes(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        position = kind.get_field_index("bytes")
        return position >= 0 and _has_bytes(kind.field(position).type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _label_column(path: Path, schema: pyarrow.Schema, kinds: Mapping[str, Any], chosen: str | None) -> str:
    import pyarrow.types as types

    usable = [
        name
        for name in schema.names
        for kind in [schema.field(name).type]
        if types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)
    ]
    if chosen is not None:
        if chosen in usable:
            return chosen
        message = f"is not a column of numbers or text in {path}, which has {_list(usable)}"
        raise UserError("--label-column", chosen, message, "Specify one of them.")
    if "label" in usable:
        return "label"
    labels = [name for name in usable if kinds.get(name) == "ClassLabel"]
    if len(labels) == 1:
        return labels[0]
    problem = f"has no column 'label', but {_list(labels or usable)}"
    raise UserError(
        "ROOT", str(path), problem, f"Specify --label-column {(labels or usable or ['NAME'])[0]}."
    )


def _list(names: list[str]) -> str:
    return ", ".join(names) or "none"


def inspect_parquet(piece: Piece) -> int:
    """Locate and inspect the images of one Parquet file."""
    path = piece.root / piece.names[0]
    try:
        content = _read(path, *piece.columns, piece.decode)
    except Unsupported as error:
        remedy = f"Write the file again with pyarrow: `pq.write_table(pq.read_table({path.name!r}), 'new.parquet')`."
        raise UserError("ROOT", str(path), f"uses {error}", remedy) from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise broken(path, f"cannot be read ({_first_line(error)})") from None
    store(piece, content)
    return 1


def _read(path: Path, image: str, label: str, decode: bool) -> dict[str, Any]:
    """Columns to store: one entry per row with image bytes."""
    import pyarrow.parquet

    rows: list[tuple[Any, ...]] = []
    labels: list[int | str] = []
    skipped = SkippedFiles()
    with pyarrow.parquet.ParquetFile(path) as file, path.open("rb") as raw:
        count, size = file.metadata.num_rows, path.stat().st_size
        if count > size:  # compressed to less than a byte, they would need any amount of memory
            raise ValueError(f"{count:,} rows in {size:,} bytes")
        given: list[Any] = file.read(columns=[label]).column(0).to_pylist()
        row = 0
        for chunk in _chunks(file.metadata, image):
            for value in values_of(lambda at, size: _pread(raw, at, size), chunk):
                name = f"{path.name} row {row}"
                if value is None:
                    skipped.add("row without image bytes", name)
                elif given[row] is None:
                    skipped.add("row without a label", name)
                else:
                    rows.append((row, value.start, value.size, value.raw_size, *_inspect(value, decode)))
                    labels.append(given[row])
                row += 1
    return _as_columns(rows, labels, skipped)


def _pread(file: Any, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _inspect(value: Value, decode: bool) -> tuple[int, ...]:
    height, width, flags = probe_data(value.data, decode)
    return value.codec, value.offset, len(value.data), height, width, flags & ~int(Flag.WRONG_EXTENSION)


def _as_columns(
    rows: list[tuple[Any, ...]], labels: list[int | str], skipped: SkippedFiles
) -> dict[str, Any]:
    table = np.array(rows, dtype=np.int64).reshape(-1, 10)
    row, start, size, raw_size, codec, offset, length, height, width, flags = table.T
    return {
        "offsets": offset,
        "lengths": length,
        "sizes": np.stack([height, width], axis=1).astype(np.int32),
        "flags": flags.astype(np.uint8),
        "labels": np.array([json.dumps(label) for label in labels], dtype=np.str_),
        "skipped": np.array(json.dumps(skipped.as_dict())),
        **dict(zip(_SPAN_COLUMNS, (start, size, raw_size, codec, row), strict=True)),
    }


def _chunks(metadata: Any, image: str) -> Iterable[Chunk]:
    """The column of image bytes in each row group."""
    leaves = [metadata.schema.column(k) for k in range(metadata.num_columns)]
    number = next(k for k, leaf in enumerate(leaves) if leaf.path in (f"{image}.bytes", image))
    leaf = leaves[number]
    if leaf.max_repetition_level:
        raise Unsupported("a list of images per row")
    for k in range(metadata.num_row_groups):
        column = metadata.row_group(k).column(number)
        start = column.data_page_offset
        if column.has_dictionary_page and column.dictionary_page_offset:
            start = min(start, column.dictionary_page_offset)
        end = start + column.total_compressed_size
        if column.num_values > metadata.num_rows:
            raise ValueError(f"a column claims {column.num_values:,} values")
        yield Chunk(start, end, column.compression, leaf.max_definition_level, column.num_values)


def broken(path: Path, problem: str) -> UserError:
    """The error for a Parquet file that cannot be read."""
    return UserError("ROOT", str(path), problem, "Restore the file, for example by downloading it again.")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
