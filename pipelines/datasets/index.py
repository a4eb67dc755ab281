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
from pipelines.datasets.classes import check_known
from pipelines.datasets.table import ImageTable, Members, PathTable

INDEX_NAME = "dl2pa.index"
"""Where the index lies in the folder it is of."""

_FORMAT = "dl2pa index 1"
_TYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}
_LOOKED_AT = 8


@dataclass(frozen=True)
class Half:
    """One half: its images, and what is remarkable about each (``probe.Flag`` bits, uint8 [N])."""

    table: ImageTable
    flags: NDArray[np.uint8]


@dataclass(frozen=True)
class Index:
    """A data set as its index has it.

    Attributes:
        halves: by name: ``train`` and ``val``, or ``all``.
        classes: the class names (ImageNet: wnids) in label order.
        words: what a class is called, where the data set says so.
    """

    halves: dict[str, Half]
    classes: tuple[str, ...]
    words: dict[str, str]


def write_index(file: Path, root: Path, index: Index) -> None:
    """Write aside, sync and rename: a reader meets a whole index or none.

    Args:
        root: the folder that the index is of; its halves lie in it or below.
    """
    from safetensors.numpy import save_file

    columns: dict[str, NDArray[Any]] = {}
    halves: dict[str, dict[str, str]] = {}
    for name, half in index.halves.items():
        table = half.table
        below = os.path.relpath(table.root, root)
        halves[name] = {"folder": "" if below == "." else below, "fingerprint": table.fingerprint}
        sizes = table.sizes if table.sizes is not None else np.zeros((len(table), 2), np.int32)
        parts: dict[str, Any] = {
            "names": np.frombuffer(table.files.blob, dtype=np.uint8),
            "ends": table.files.ends,
            "lengths": table.lengths,
            "labels": table.labels,
            "sizes": sizes,
            "flags": half.flags,
        }
        if table.members is not None:
            parts |= {"shards": table.members.shards, "offsets": table.members.offsets}
        columns |= {f"{name}/{key}": np.ascontiguousarray(value) for key, value in parts.items()}
    # One text: safetensors writes several in no fixed order, and the same images shall make the same file.
    about = {"format": _FORMAT, "classes": index.classes, "words": index.words, "halves": halves}
    metadata = {"dl2pa": json.dumps(about)}
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(columns, aside, metadata)
        mask = os.umask(0)
        os.umask(mask)
        aside.chmod(0o666 & ~mask)  # safetensors leaves it to its owner alone
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def open_index(file: Path, root: Path) -> Index:
    """Map an index of `root`; nothing of its columns is read.

    Raises:
        UserError: there is no such file, it is no index, cut short, or of another folder (``data.index``).
    """
    metadata, columns = _map(file)
    classes = tuple(metadata["classes"])
    halves: dict[str, Half] = {}
    for name, about in metadata["halves"].items():
        part = {
            key.partition("/")[2]: column for key, column in columns.items() if key.startswith(f"{name}/")
        }
        members = Members(part["shards"], part["offsets"]) if "shards" in part else None
        table = ImageTable(
            root / about["folder"],
            PathTable(part["names"], part["ends"]),
            part["lengths"],
            part["labels"],
            classes,
            about["fingerprint"],
            members,
            part["sizes"],
        )
        _check_place(file, table)
        halves[name] = Half(table, part["flags"])
    return Index(halves, classes, metadata["words"])


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
    return table.relabelled(classes, label_of)


def _map(file: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    remedy = "Write it with `dl2pa data index ROOT`, or leave data.index out."
    try:
        with file.open("rb") as stored:
            size = int.from_bytes(stored.read(8), "little")
            header: dict[str, Any] = json.loads(stored.read(size)) if size < 1 << 27 else {}
        metadata: dict[str, Any] = json.loads(header.pop("__metadata__", {}).get("dl2pa", "{}"))
        total = file.stat().st_size
    except OSError as error:
        raise UserError("data.index", str(file), f"cannot be read: {error.strerror}", remedy) from None
    except (ValueError, AttributeError):
        metadata, header, total, size = {}, {}, 0, 0
    if metadata.get("format") != _FORMAT:
        raise UserError("data.index", str(file), f"is not an index of this version ({_FORMAT})", remedy)
    begin = 8 + size
    if begin + max((column["data_offsets"][1] for column in header.values()), default=0) != total:
        raise UserError(
            "data.index", str(file), "is cut short", "Write it again with `dl2pa data index ROOT`."
        )
    # One mapping for all columns: its pages belong to the node, not to the process.
    whole = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))
    columns: dict[str, NDArray[Any]] = {}
    for key, column in header.items():
        low, high = column["data_offsets"]
        columns[key] = (
            whole[begin + low : begin + high].view(_TYPES[column["dtype"]]).reshape(column["shape"])
        )
    return metadata, columns


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
