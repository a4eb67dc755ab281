"""The index of a data set on disk: file, length, label and size of every image, memory-mapped.

An index is a safetensors file. For each split (``train`` and ``val``, or ``all`` for bare class folders) it has the
columns ``names`` (uint8, concatenated UTF-8 paths), ``ends`` (int64, end of each path in ``names``), ``lengths`` and
``labels`` (int64 [N]), ``sizes`` (int32 [N, 2], height and width), ``flags`` (uint8 [N], see ``probe.Flag``), and for
tar shards ``shards`` (int32 [N]) and ``offsets`` (int64 [N]). Parquet files have ``files_of`` instead of ``shards``,
and the columns of ``spans.Spans`` with ``span_`` before their names. The columns ``state_names``, ``state_ends``,
``state_times`` and ``state_sizes`` are those of ``freshness.FileStates``; indexes of older versions lack them. Indexes
of shards in object storage also have their ETags: ``state_tags`` and ``state_tag_ends``. The metadata is one JSON text:
format name, classes, readable class names, digests of the files with the class names, and per split (key ``halves``)
its folder, fingerprint and skipped files; for lists and Parquet files also ``source``.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from dl2pa.osutil import replacing
from pipelines.datasets.classes import CLASSES_NAME, check_known
from pipelines.datasets.freshness import (
    FileStates,
    check_folders,
    check_listed,
    check_shards,
    stale,
    text_digests,
)
from pipelines.datasets.parquet import find_parquet
from pipelines.datasets.shards import find_shards
from pipelines.datasets.skipped import SkippedFiles
from pipelines.datasets.spans import CODECS, Spans
from pipelines.datasets.table import ImageTable, Members, PathTable

log = logging.getLogger(__name__)

INDEX_NAME = "dl2pa.index"
"""Default name of the index in the indexed folder."""

CLASS_FILES = (CLASSES_NAME, "classes.txt")
"""Files that set the labels of shards."""

_FORMAT = "dl2pa index 1"
_TYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}
_NUM_CHECKED = 8


@dataclass(frozen=True)
class SplitIndex:
    """Images of one split.

    Attributes:
        flags: problems of the images, ``probe.Flag`` bits, uint8 [N].
        states: the shards or folders when they were indexed; None if it is not known.
    """

    table: ImageTable
    flags: NDArray[np.uint8]
    states: FileStates | None = None


@dataclass(frozen=True)
class Source:
    """Options of `dl2pa data index` that an index was built with.

    Attributes:
        options: values by option; empty for an option without a value.
        digests: of the files among the values, by option.
    """

    options: dict[str, str]
    digests: dict[str, str]

    @classmethod
    def of(cls, options: Mapping[str, str], files: Mapping[str, Path | None]) -> Source:
        """Record options and files, which are read again."""
        paths = {option: file.absolute() for option, file in files.items() if file is not None}
        digests = {
            option: text_digests(file.parent, [file.name])[file.name] for option, file in paths.items()
        }
        return cls({**{option: str(file) for option, file in paths.items()}, **options}, digests)

    def changed(self) -> str | None:
        """The first of the files that has changed; a file that no longer exists is not noticed."""
        for option, digest in self.digests.items():
            file = Path(self.options[option])
            if text_digests(file.parent, [file.name]).get(file.name, digest) != digest:
                return str(file)
        return None


@dataclass(frozen=True)
class Index:
    """The content of an index.

    Attributes:
        splits: by name: ``train`` and ``val``, or ``all``.
        classes: the class names (ImageNet: wnids) in label order.
        words: readable names of the classes that have one.
        texts: digests of the ``CLASS_FILES`` by name; None if they are not known.
        source: options of an index of lists or Parquet files; None for folders and tar shards.
    """

    splits: dict[str, SplitIndex]
    classes: tuple[str, ...]
    words: dict[str, str]
    texts: dict[str, str] | None = None
    source: Source | None = None


def write_index(file: Path, root: Path, index: Index) -> None:
    """Write an index atomically.

    Args:
        root: the indexed folder, which contains the folders of the splits.
    """
    from safetensors.numpy import save_file

    columns: dict[str, NDArray[Any]] = {}
    folders: dict[str, dict[str, Any]] = {}
    for name, split in index.splits.items():
        table = split.table
        folder = os.path.relpath(table.root, root)
        folders[name] = {"folder": "" if folder == "." else folder, "fingerprint": table.fingerprint}
        folders[name]["skipped"] = table.skipped.as_dict()
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
            parts |= _member_columns(table.members)
        if split.states is not None:
            parts |= _state_columns(split.states)
        columns |= {f"{name}/{key}": np.ascontiguousarray(value) for key, value in parts.items()}
    # One text: safetensors writes several entries in no fixed order, and index files are reproducible.
    content = {"format": _FORMAT, "classes": index.classes, "words": index.words, "halves": folders}
    content |= {} if index.texts is None else {"texts": index.texts}
    content |= {} if index.source is None else {"source": vars(index.source)}
    with replacing(file) as temporary:
        save_file(columns, temporary, {"dl2pa": json.dumps(content)})


def _member_columns(members: Members) -> dict[str, NDArray[Any]]:
    if members.spans is None:
        return {"shards": members.shards, "offsets": members.offsets}
    # Another name than that of shards: older versions refuse the index instead of reading compressed bytes.
    spans = {f"span_{name}": column for name, column in vars(members.spans).items()}
    return {"files_of": members.shards, "offsets": members.offsets, **spans}


def _state_columns(states: FileStates) -> dict[str, NDArray[Any]]:
    tags: dict[str, Any] = {}
    if states.tags is not None:
        tags = {
            "state_tags": np.frombuffer(states.tags.blob, dtype=np.uint8),
            "state_tag_ends": states.tags.ends,
        }
    return {
        **tags,
        "state_names": np.frombuffer(states.paths.blob, dtype=np.uint8),
        "state_ends": states.paths.ends,
        "state_times": states.times,
        "state_sizes": states.sizes,
    }


def open_index(file: Path, root: Path) -> Index:
    """Map an index of `root`; only its integer columns are read, to check their ranges.

    Raises:
        UserError: the file is missing, not an index, damaged, of another folder, or older than the data
            (``data.index``).
    """
    index = read_index(file, root)
    for split in index.splits.values():
        _check_files_exist(file, split.table)
    try:
        _check_current(file, root, index)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a damaged index contains an invalid file name
        problem = f"cannot be compared with the data ({error})"
        raise UserError(
            "data.index", str(file), problem, "Make the data readable, or create the index again."
        ) from None
    return index


def read_index(file: Path, root: Path) -> Index:
    """Map an index of `root` without comparing it with the data.

    Raises:
        UserError: the file is missing, not an index, or damaged (``data.index``).
    """
    metadata, columns = _map(file)
    try:
        if not isinstance(metadata["classes"], list):
            raise TypeError("its classes are not a list")
        classes = tuple(_text(name) for name in metadata["classes"])
        words = {_text(key): _text(value) for key, value in metadata["words"].items()}
        texts = metadata.get("texts")
        if texts is not None:
            texts = {_text(key): _text(value) for key, value in texts.items()}
        source = metadata.get("source")
        if source is not None:
            source = Source(*({_text(k): _text(v) for k, v in source[key].items()} for key in _SOURCE))
            if not source.digests.keys() <= source.options.keys():
                raise ValueError("its options differ from the digests of their files")
        splits = {
            name: _read_split(name, about, columns, root, classes)
            for name, about in metadata["halves"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from None
    return Index(splits, classes, words, texts, source)


def _read_split(
    name: str, about: dict[str, Any], columns: dict[str, NDArray[Any]], root: Path, classes: tuple[str, ...]
) -> SplitIndex:
    """One split from its columns; errors of damaged columns are converted by `open_index`."""
    part = {key.partition("/")[2]: column for key, column in columns.items() if key.startswith(f"{name}/")}
    members = _read_members(part)
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
        SkippedFiles.of(about.get("skipped", {})),
    )
    per_image = [part[key] for key in ("lengths", "labels", "sizes", "flags")]
    per_image += [] if members is None else [members.shards, members.offsets]
    if any(len(column) != count for column in per_image) or part["sizes"].shape != (count, 2):
        raise ValueError("its columns differ in length")
    if members is None and len(files) != count:
        raise ValueError("the number of names is not the number of images")
    _check_range(part["labels"], len(classes), "label")
    _check_range(part["lengths"], 1 << 62, "length")
    if members is not None:
        _check_range(members.shards, len(files), "shard")
        _check_range(members.offsets, 1 << 62, "offset")
        if members.spans is not None:
            _check_spans(members.spans, count)
    states = None
    if "state_times" in part:
        paths = PathTable(part["state_names"], part["state_ends"])
        tags = PathTable(part["state_tags"], part["state_tag_ends"]) if "state_tags" in part else None
        states = FileStates(paths, part["state_times"], part["state_sizes"], tags)
        for column in (states.times, states.sizes):
            if column.dtype != np.int64 or column.shape != (len(paths),):
                raise ValueError("its states differ in length")
    return SplitIndex(table, part["flags"], states)


def _read_members(part: Mapping[str, NDArray[Any]]) -> Members | None:
    if "shards" in part:
        return Members(part["shards"], part["offsets"])
    if "files_of" not in part:
        return None
    spans = Spans(*(part[f"span_{name}"] for name in ("starts", "sizes", "raw_sizes", "codecs", "rows")))
    return Members(part["files_of"], part["offsets"], spans)


def _check_spans(spans: Spans, count: int) -> None:
    if any(len(column) != count for column in vars(spans).values()):
        raise ValueError("its spans differ in length")
    for column in (spans.starts, spans.sizes, spans.raw_sizes, spans.rows):
        _check_range(column, 1 << 62, "span")
    _check_range(spans.codecs, len(CODECS), "codec")


def _check_range(column: NDArray[Any], end: int, what: str) -> None:
    if column.size and not (int(column.min()) >= 0 and int(column.max()) < end):
        raise ValueError(f"a {what} is out of range")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def with_classes(table: ImageTable, classes: tuple[str, ...] | None, file: Path) -> ImageTable:
    """The table with labels in the order of `classes`, if given.

    Raises:
        UserError: a class with images is not in `classes` (``data.classes``).
    """
    if classes is None or classes == table.classes:
        return replace(table, classes=classes or table.classes)
    present = [table.classes[label] for label in np.unique(table.labels).tolist()]
    remedy = "Add the class to data.classes, or leave data.classes out."
    check_known(present, classes, file, "data.classes", None, remedy)
    label_by_name = {name: label for label, name in enumerate(classes)}
    label_of = np.array([label_by_name.get(name, -1) for name in table.classes], dtype=np.int64)
    return table.relabeled(classes, label_of)


def _map(file: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    remedy = "Create it with `dl2pa data index ROOT`, or leave data.index out."
    if file.exists() and not file.is_file():
        raise UserError("data.index", str(file), "is not a regular file", remedy)
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
            raise _damaged(file, "it is truncated")
        # One mapping for all columns: processes of a node share its pages.
        mapped = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))
        for key, column in header.items():
            low, high = column["data_offsets"]
            if not 0 <= low <= high <= total - begin:
                raise ValueError(f"{key} is outside the file")
            if not all(isinstance(size, int) and size >= 0 for size in column["shape"]):
                raise ValueError(f"{key} has the shape {column['shape']}")
            part = mapped[begin + low : begin + high].view(_TYPES[column["dtype"]])
            columns[key] = part.reshape(column["shape"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise _damaged(file, f"{type(error).__name__}: {error}") from None
    return metadata, columns


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(
        "data.index", str(file), f"is damaged ({reason})", "Create it again with `dl2pa data index ROOT`."
    )


def _check_files_exist(file: Path, table: ImageTable) -> None:
    """Refuse an index if none of a few of its files exists; single missing files are reported when read."""
    count = len(table.files)
    checked = [
        table.root / table.files[i] for i in sorted({count * k // _NUM_CHECKED for k in range(_NUM_CHECKED)})
    ]
    if checked and not any(path.exists() for path in checked):
        message = f"its files are not in data.root: there is no {checked[0]}"
        remedy = "Specify the indexed folder, or create the index again with `dl2pa data index ROOT`."
        raise UserError("data.index", str(file), message, remedy)


def rebuild_command(file: Path, root: Path, source: Source | None = None) -> str:
    """The command that builds the index `file` of `root` again."""
    words = [] if source is None else [word for pair in source.options.items() for word in pair if word]
    options = "".join(f" {shlex.quote(word)}" for word in words)
    out = "" if file == root / INDEX_NAME else f" --out {shlex.quote(str(file))}"
    return f"dl2pa data index {shlex.quote(str(root))}{options}{out}"


_SOURCE = ("options", "digests")

_warned: set[Path] = set()
"""Indexes without recorded states that this process has warned about."""


def _check_current(file: Path, root: Path, index: Index) -> None:
    """Refuse an index that is older than its data."""
    command = rebuild_command(file, root, index.source)
    if index.source is not None and (changed := index.source.changed()) is not None:
        raise stale(file, f"{changed} has changed since it was indexed", f"Run `{command}` again.")
    if any(split.states is None for split in index.splits.values()) and file not in _warned:
        _warned.add(file)
        problem = "was written by an older version, which did not record the state of the data"
        log.warning(
            "%s %s: later changes of the data are not noticed. Run `%s` again.", file, problem, command
        )
    shards = parquet = None
    for name, split in index.splits.items():
        if split.states is None:
            continue
        members = split.table.members
        if members is None:
            check = check_folders if index.source is None else check_listed
            check(file, split.table, split.states, command)
            continue
        if members.spans is not None:
            parquet = parquet or find_parquet(root)
            check_shards(file, split.table, split.states, parquet.splits.get(name, []), command)
            continue
        shards = find_shards(root) if shards is None else shards
        check_shards(file, split.table, split.states, [p.name for p in shards.get(name, [])], command)
    if shards is not None and index.texts is not None:
        present = text_digests(root, CLASS_FILES)
        for name in sorted({key for key, _ in present.items() ^ index.texts.items()}):
            problem = f"{name} has changed since the shards were indexed"
            raise stale(file, problem, f"Run `{command}` again.")
