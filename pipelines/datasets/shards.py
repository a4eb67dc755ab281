"""Tar shards in WebDataset format: the members of a sample have the same name up to its first dot.

A sample is an image (``.jpg``, ``.jpeg``, ``.png``, ``.webp``, ``.bmp``) and its label: ``.cls`` (a number or a class
name) or ``.json`` with the key ``label``. Other members are ignored. Compressed tars are not supported: images are read
by their offset.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets.folder import IMAGE_SUFFIXES
from pipelines.datasets.probe import probe

_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, ArithmeticError, MemoryError, RecursionError)
"""Exceptions of tarfile for damaged or malicious headers."""
_MAX_LABEL = 2**16
"""Maximum bytes of a label."""
_MAX_CLASSES = 2**20
"""Maximum number of classes without a class list: a name is created for each."""
_SPLITS = {"train": "train", "val": "val", "validation": "val"}
_SPLIT_NAME = re.compile(r"(?:^|[-_.])(train|val|validation)(?=$|[-_.0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class ShardContent:
    """The n samples of a shard in order; sizes [n, 2], labels as text."""

    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    sizes: NDArray[np.int32]
    flags: NDArray[np.uint8]
    labels: list[str]


def find_shards(root: Path) -> dict[str, list[Path]]:
    """The shards of each split, sorted: in ``train/`` and ``val/``, or with such names; others are ``all``."""
    shards: dict[str, list[Path]] = {}
    if not root.is_dir():
        return shards
    for split in ("train", "val"):
        if inside := sorted((root / split).glob("*.tar")):
            shards[split] = inside
    for path in sorted(root.glob("*.tar")) if not shards else []:
        match = _SPLIT_NAME.search(path.stem)
        shards.setdefault(_SPLITS[match[1].lower()] if match else "all", []).append(path)
    return shards


def read_shard(path: Path) -> ShardContent:
    """List the samples of a shard and inspect their images.

    Raises:
        UserError: not a tar file, or a sample has no label or two images (``ROOT``).
    """
    images: dict[str, tuple[int, int, str]] = {}
    labels: dict[str, str] = {}
    if not path.is_file():
        raise _broken(path, "is not a regular file")
    size, previous = path.stat().st_size, -1
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                # With a negative size, tarfile would return to the same member forever.
                if member.offset <= previous or member.size < 0 or member.offset_data > size:
                    raise _broken(path, f"is damaged: {member.name!r} has an invalid offset or size")
                previous = member.offset
                if not member.isfile():
                    continue
                if member.issparse():
                    raise _broken(path, f"{member.name!r} is stored as a sparse file")
                folder, slash, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, suffix = f"{folder}{slash}{stem}", suffix.lower()
                if suffix in IMAGE_SUFFIXES:
                    if key in images:
                        raise _broken(path, f"the sample {key!r} has two images")
                    images[key] = member.offset_data, member.size, member.name
                elif suffix in ("cls", "json") and (suffix == "cls" or key not in labels):
                    if member.size > _MAX_LABEL:
                        raise _broken(path, f"the label {member.name!r} has {member.size} bytes")
                    stream = archive.extractfile(member)
                    label = _label(path, member.name, suffix, stream.read() if stream else b"")
                    labels |= {} if label is None else {key: label}
    except _TAR_ERRORS as error:
        raise _broken(path, f"is not a complete, uncompressed tar file ({error})") from None
    unlabeled = next((key for key in images if key not in labels), None)
    if unlabeled is not None:
        raise _broken(path, f"the sample {unlabeled!r} has no label: .cls, or .json with the key 'label'")
    return _content(path, list(images.values()), [labels[key] for key in images])


def labels_to_numbers(
    labels: Sequence[str], classes: tuple[str, ...] | None, root: Path
) -> NDArray[np.int64]:
    """Convert label texts to numbers: integers, or names in `classes`.

    Raises:
        UserError: a label is neither (``ROOT``).
    """
    number_of = {name: number for number, name in enumerate(classes or ())}
    known = {text: number_of[text] if text in number_of else _number(text) for text in set(labels)}
    for text, number in known.items():
        if number is None or not 0 <= number < (len(classes) if classes else _MAX_CLASSES):
            count = (
                f"the {len(classes)} classes of classes.txt"
                if classes
                else f"numbers from 0 to {_MAX_CLASSES - 1}"
            )
            remedy = "Add classes.txt next to the shards: one class per line in label order."
            raise UserError("ROOT", str(root), f"the label {text!r} is not among {count}", remedy)
    return np.array([known[text] for text in labels], dtype=np.int64)


def _content(path: Path, images: Sequence[tuple[int, int, str]], labels: list[str]) -> ShardContent:
    sizes = np.zeros((len(images), 2), dtype=np.int32)
    flags = np.zeros(len(images), dtype=np.uint8)
    with path.open("rb") as file:
        for i, (offset, length, name) in enumerate(images):
            height, width, flags[i] = probe(file.fileno(), offset, length, name)
            sizes[i] = height, width
    offsets, lengths = (np.array([image[k] for image in images], dtype=np.int64) for k in (0, 1))
    return ShardContent(offsets, lengths, sizes, flags, labels)


def _label(path: Path, name: str, suffix: str, content: bytes) -> str | None:
    """The label as text; None if a .json has no label."""
    try:
        text = content.decode("utf-8").strip()
        value: Any = text if suffix == "cls" else json.loads(text).get("label")
    except (ValueError, AttributeError, RecursionError):
        raise _broken(path, f"{name} cannot be read as a label") from None
    return None if value is None else str(value)


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _broken(path: Path, problem: str) -> UserError:
    return UserError("ROOT", str(path), problem, "See docs/data.md for the contents of a shard.")
