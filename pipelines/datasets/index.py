"""The index of a data set on disk: every image's place, length, label and size, mapped into memory.

One safetensors file, so that any reader of that format can open it: for each half (``train`` and ``val``, or
``all`` where the class folders stand alone) the columns ``names`` (uint8, the files' paths in UTF-8 one after the
other), ``ends`` (int64, where each path ends), ``lengths`` and ``labels`` (int64 [N]), ``sizes`` (int32 [N, 2], height
and width), ``flags`` (uint8 [N], see ``probe.Flag``), and for tar shards ``shards`` (int32 [N]) and ``offsets``
(int64 [N]). Its metadata holds, as one JSON text, the format's name, the classes, their words and the halves.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from dl2pa.osutil import follow_umask
from pipelines.datasets.classes import check_known
from pipelines.datasets.table import ImageTable, Members, PathTable

INDEX_NAME = "dl2pa.index"
"""Where the index lies in the folder it is of."""

_FORMAT = "dl2pa index 1"
_TYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}
_LOOKED_AT = 8


@dataclass(frozen=True)
class SplitIndex:
    """Images of one split and their problems (``probe.Flag`` bits, uint8 [N])."""

    table: ImageTable
    flags: NDArray[np.uint8]


@dataclass(frozen=True)
class Index:
    """A data set as its index has it.

    Attributes:
        splits: by name: ``train`` and ``val``, or ``all``.
        classes: the class names (ImageNet: wnids) in label order.
        words: what a class is called, where the data set says so.
    """

    splits: dict[str, SplitIndex]
    classes: tuple[str, ...]
    words: dict[str, str]


def write_index(file: Path, root: Path, index: Index) -> None:
    """Write aside, sync and rename: a reader meets a whole index or none.

    Args:
        root: the folder that the index is of; its halves lie in it or below.
    """
    from safetensors.numpy import save_file

    columns: dict[str, NDArray[Any]] = {}
    folders: dict[str, dict[str, str]] = {}
    for name, split in index.splits.items():
        table = split.table
        below = os.path.relpath(table.root, root)
        folders[name] = {"folder": "" if below == "." else below, "fingerprint": table.fingerprint}
        sizes = table.sizes if table.sizes is not None else np.zeros((len(table), 2), np.int32)
        parts: dict[str, Any] = {
            "names": np.frombuffer(table.files.blob, dtype=np.uint8),
            "ends": table.files.ends,
            "lengths": table.lengths,
            "labels": table.labels,
            "sizes": sizes,
            "flags": split.flags,
        }
        if table.members is not None:
            parts |= {"shards": table.members.shards, "offsets": table.members.offsets}
        columns |= {f"{name}/{key}": np.ascontiguousarray(value) for key, value in parts.items()}
    # One text: safetensors writes several in no fixed order, and the same images shall make the same file.
    about = {"format": _FORMAT, "classes": index.classes, "words": index.words, "halves": folders}
    metadata = {"dl2pa": json.dumps(about)}
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(columns, aside, metadata)
        follow_umask(aside)
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def open_index(file: Path, root: Path) -> Index:
    """Map an index of `root`; of its columns only labels and lengths are read, to check them.

    Raises:
        UserError: there is no such file, it is no index, damaged, or of another folder (``data.index``).
    """
    metadata, columns = _map(file)
    try:
        if not isinstance(metadata["classes"], list):
            raise TypeError("its classes are no list")
        classes = tuple(_text(name) for name in metadata["classes"])
        words = {_text(key): _text(value) for key, value in metadata["words"].items()}
        splits = {
            name: _read_split(name, about, columns, root, classes)
            for name, about in metadata["halves"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from None
    for split in splits.values():
        _check_place(file, split.table)
    return Index(splits, classes, words)


def _read_split(
    name: str, about: dict[str, str], columns: dict[str, NDArray[Any]], root: Path, classes: tuple[str, ...]
) -> SplitIndex:
    """One half from its columns; damage raises what `open_index` catches."""
    part = {key.partition("/")[2]: column for key, column in columns.items() if key.startswith(f"{name}/")}
    members = Members(part["shards"], part["offsets"]) if "shards" in part else None
    count = len(part["labels"])
    files = PathTable(part["names"], part["ends"])
    table = ImageTable(
        root / _text(about["folder"]),
        files,
        part["lengths"],
        part["labels"],
        classes,
        _text(about["fingerprint"]),
        members,
        part["sizes"],
    )
    of_images = ("lengths", "labels", "sizes", "flags") + (("shards", "offsets") if members else ())
    if any(len(part[key]) != count for key in of_images) or part["sizes"].shape != (count, 2):
        raise ValueError("its columns differ in length")
    if members is None and len(files) != count:
        raise ValueError("it has more or fewer names than images")
    _check_range(part["labels"], len(classes), "label")
    _check_range(part["lengths"], 1 << 62, "length")
    if members is not None:
        _check_range(members.shards, len(files), "shard")
        _check_range(members.offsets, 1 << 62, "offset")
    return SplitIndex(table, part["flags"])


def _check_range(column: NDArray[Any], end: int, what: str) -> None:
    if column.size and not (int(column.min()) >= 0 and int(column.max()) < end):
        raise ValueError(f"a {what} is out of range")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def with_classes(table: ImageTable, classes: tuple[str, ...] | None, file: Path) -> ImageTable:
    """The table with its labels in the order of `classes`; None leaves them.

    Raises:
        UserError: a class with images is not among them (``data.classes``).
    """
    if classes is None or classes == table.classes:
        return replace(table, classes=classes or table.classes)
    present = [table.classes[label] for label in np.unique(table.labels).tolist()]
    remedy = "Add the class to data.classes, or leave data.classes out."
    check_known(present, classes, file, "data.classes", None, remedy)
    place = {name: label for label, name in enumerate(classes)}
    label_of = np.array([place.get(name, -1) for name in table.classes], dtype=np.int64)
    return table.relabeled(classes, label_of)


def _map(file: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    remedy = "Write it with `dl2pa data index ROOT`, or leave data.index out."
    if file.exists() and not file.is_file():
        raise UserError("data.index", str(file), "is a folder, a pipe or a device, not a file", remedy)
    try:
        with file.open("rb") as stored:
            size = int.from_bytes(stored.read(8), "little")
            total = file.stat().st_size
            header: dict[str, Any] = json.loads(stored.read(size)) if size < min(total, 1 << 27) else {}
        metadata: Any = json.loads(header.pop("__metadata__", {}).get("dl2pa", "{}"))
    except OSError as error:
        raise UserError("data.index", str(file), f"cannot be read: {error.strerror}", remedy) from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        metadata, header, total, size = {}, {}, 0, 0
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise UserError("data.index", str(file), f"is not an index of this version ({_FORMAT})", remedy)
    begin = 8 + size
    columns: dict[str, NDArray[Any]] = {}
    try:
        if begin + max((column["data_offsets"][1] for column in header.values()), default=0) != total:
            raise _damaged(file, "it is cut short")
        # One mapping for all columns: its pages belong to the node, not to the process.
        whole = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))
        for key, column in header.items():
            low, high = column["data_offsets"]
            if not 0 <= low <= high <= total - begin:
                raise ValueError(f"{key} lies outside the file")
            if not all(isinstance(side, int) and side >= 0 for side in column["shape"]):
                raise ValueError(f"{key} has the shape {column['shape']}")
            part = whole[begin + low : begin + high].view(_TYPES[column["dtype"]])
            columns[key] = part.reshape(column["shape"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from None
    return metadata, columns


def _damaged(file: Path, why: str) -> UserError:
    return UserError(
        "data.index", str(file), f"is damaged ({why})", "Write it again with `dl2pa data index ROOT`."
    )


def _check_place(file: Path, table: ImageTable) -> None:
    """Refuse an index none of whose files is there; one file that has gone is a fault, told when it is met."""
    count = len(table.files)
    looked_at = [
        table.root / table.files[i] for i in sorted({count * k // _LOOKED_AT for k in range(_LOOKED_AT)})
    ]
    if looked_at and not any(path.exists() for path in looked_at):
        message = f"its files are not in data.root: there is no {looked_at[0]}"
        remedy = "Give the folder that was indexed, or write the index again with `dl2pa data index ROOT`."
        raise UserError("data.index", str(file), message, remedy)
