"""Tar shards in WebDataset format: the members of a sample have the same name up to its first dot.

A sample is an image (``.jpg``, ``.jpeg``, ``.png``, ``.webp``, ``.bmp``) and its label: ``.cls`` (a number or a class
name) or ``.json`` with the key ``label``. Other members are counted and not read. Compressed tars are not supported:
images are read by their offset.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets.folder import IMAGE_SUFFIXES, image_folders
from pipelines.datasets.labels import Label, parse_label
from pipelines.datasets.probe import probe
from pipelines.datasets.skipped import ARCHIVE, SkippedFiles, is_archive, is_ignored, reason_for
from pipelines.images import unsupported_format

PACK_OPTIONS_NAME = "pack.json"
"""In a folder that `dl2pa data pack` wrote; the labels of its shards are positions."""

UNVERIFIED_NAME = "pack.unverified"
"""In a folder of packed shards that have not passed, or not yet passed, their verification."""

_TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, ArithmeticError, MemoryError, RecursionError)
"""Exceptions of tarfile for damaged or malicious headers."""
_MAX_LABEL = 2**16
"""Maximum bytes of a label."""
_BLOCK = 512
_CHUNK = 1 << 20
_SPLITS = {"train": "train", "val": "val", "validation": "val"}
_SPLIT_NAME = re.compile(r"(?:^|[-_.])(train|val|validation)(?=$|[-_.0-9])", re.IGNORECASE)
_CONTENTS = "See docs/data.md for the contents of a shard."


@dataclass(frozen=True)
class ShardContent:
    """The n samples of a shard in order; sizes [n, 2]."""

    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    sizes: NDArray[np.int32]
    flags: NDArray[np.uint8]
    labels: list[Label]
    skipped: SkippedFiles

    def columns(self) -> dict[str, NDArray[Any]]:
        """The content as arrays, to be stored."""
        labels = np.array([json.dumps(label) for label in self.labels], dtype=np.str_)
        skipped = np.array(json.dumps(self.skipped.as_dict()))
        return {**vars(self), "labels": labels, "skipped": skipped}

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> ShardContent:
        """The inverse of ``columns``."""
        labels = [json.loads(label) for label in columns["labels"].tolist()]
        skipped = SkippedFiles.of(json.loads(columns["skipped"].item()))
        arrays = (columns[name] for name in ("offsets", "lengths", "sizes", "flags"))
        return cls(*arrays, labels=labels, skipped=skipped)


def find_shards(root: Path) -> dict[str, list[Path]]:
    """The shards of each split, sorted; empty if the data set has class folders.

    Shards are in ``train/`` and ``val/``, or have such names. If none has, all are ``all``. Tars next to class folders
    are archives: in a split with class folders, and everywhere if the training split has class folders. A single
    folder of images, such as ``samples``, does not divide images into classes.
    """
    shards = _find_tars(root)
    if not shards or _has_class_folders(root / "train") or _has_class_folders(root):
        return {}
    return {split: paths for split, paths in shards.items() if not _has_class_folders(root / split)}


def _has_class_folders(folder: Path) -> bool:
    return len(image_folders(folder, limit=2)) == 2


def _find_tars(root: Path) -> dict[str, list[Path]]:
    if not root.is_dir():
        return {}
    files = {name: [path.name for path in (root / name).glob("*.tar")] for name in ("", "train", "val")}
    return {split: [root / path for path in paths] for split, paths in shards_among(files).items()}


def shards_among(files: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """The shards of each split among the files of a data set, as ``find_shards`` finds them; see there.

    Args:
        files: names of the files by folder: ``""``, ``train`` and ``val``.
    """

    def tars(folder: str) -> list[str]:
        return sorted(n for n in files.get(folder, ()) if n.endswith(".tar") and not n.startswith("."))

    inside = {split: [f"{split}/{name}" for name in tars(split)] for split in ("train", "val")}
    if any(inside.values()):
        return {split: paths for split, paths in inside.items() if paths}
    named: dict[str, list[str]] = {}
    for name in tars(""):
        if match := _SPLIT_NAME.search(name.removesuffix(".tar")):
            named.setdefault(_SPLITS[match[1].lower()], []).append(name)
    return named or ({"all": tars("")} if tars("") else {})


def skipped_next_to(root: Path, shards: dict[str, list[Path]]) -> SkippedFiles:
    """Archives and folders of images next to the shards, such as compressed shards."""
    skipped = SkippedFiles()
    read = {path for paths in shards.values() for path in paths}
    for folder in ("", "train/", "val/"):
        for name in image_folders(root / folder, limit=1):
            skipped.add("folder of images next to shards", f"{folder}{name}/")
    for folder in (root, root / "train", root / "val"):
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in entries:
            if is_archive(path.name) and path not in read and not path.name.startswith("."):
                skipped.add(_archive_reason(path, "all" not in shards), str(path.relative_to(root)))
    return skipped


def _archive_reason(path: Path, named: bool) -> str:
    if not path.name.lower().endswith(".tar"):
        return "compressed archive"
    return "tar without train or val in its name" if named and not _SPLIT_NAME.search(path.stem) else ARCHIVE


def check_verified(root: Path, field: str) -> None:
    """Refuse packed shards that have not passed their verification.

    Raises:
        UserError: the packing was interrupted or differs from its source.
    """
    if (root / UNVERIFIED_NAME).exists():
        raise incomplete_pack(str(root), field)


def incomplete_pack(root: str, field: str) -> UserError:
    """The error for packed shards that have not passed their verification."""
    message = "contains packed shards that are incomplete or have failed their verification"
    remedy = "Run the same `dl2pa data pack` again, or pack into a new folder."
    return UserError(field, root, message, remedy)


def read_shard(path: Path, decode: bool = False) -> ShardContent:
    """List the samples of a shard and inspect their images.

    Args:
        decode: see ``probe.probe``.

    Raises:
        UserError: not a complete tar file, or a sample has no label or two images (``ROOT``).
    """
    if not path.is_file():
        raise _broken(path, "is not a regular file")
    size, previous = path.stat().st_size, -1
    members = _Members(path)
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                # With a negative size, tarfile would return to the same member forever.
                if member.offset <= previous or member.size < 0 or member.offset_data > size:
                    raise _broken(path, f"is damaged: {member.name!r} has an invalid offset or size")
                previous = member.offset
                members.add(archive, member)
            end = archive.offset
        _check_end(path, end, size, members.skipped)
    except UserError:
        raise
    except _TAR_ERRORS as error:
        reason, remedy = _not_a_tar(path, str(error))
        message = f"is not a complete, uncompressed tar file ({reason})"
        raise UserError("ROOT", str(path), message, remedy) from None
    return members.content(decode)


class _Members:
    """Images and labels of a shard by key: the name up to its first dot."""

    def __init__(self, path: Path) -> None:
        self.skipped = SkippedFiles()
        self._path = path
        self._images: dict[str, tuple[int, int, str]] = {}
        self._labels: dict[str, Label] = {}

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        if member.isdir() or any(map(is_ignored, member.name.split("/"))):
            return
        if member.issparse():
            raise _broken(self._path, f"{member.name!r} is stored as a sparse file")
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        key, suffix = f"{folder}{slash}{stem}", suffix.lower()
        if not member.isfile():
            reason = "link in a shard" if member.issym() or member.islnk() else "special file in a shard"
            self._skip(reason, member)
        elif suffix in IMAGE_SUFFIXES:
            if key in self._images:
                raise _broken(self._path, f"the sample {key!r} has two images")
            self._images[key] = member.offset_data, member.size, member.name
        elif suffix == "cls" or (suffix == "json" and key not in self._labels):
            self._add_label(archive, member, key, suffix)
        elif suffix != "json":
            further = "." in suffix and suffix.rpartition(".")[2] in IMAGE_SUFFIXES
            self._skip("image with further dots in its name" if further else reason_for(base), member)

    def _add_label(self, archive: tarfile.TarFile, member: tarfile.TarInfo, key: str, suffix: str) -> None:
        if member.size > _MAX_LABEL:
            raise _broken(self._path, f"the label {member.name!r} has {member.size} bytes")
        stream = archive.extractfile(member)
        try:
            label = parse_label(stream.read() if stream else b"", suffix)
        except (ValueError, RecursionError) as error:
            raise _broken(self._path, f"{member.name} cannot be read as a label: {error}") from None
        if label is not None:
            self._labels[key] = label

    def _skip(self, reason: str, member: tarfile.TarInfo) -> None:
        self.skipped.add(reason, f"{self._path.name}/{member.name}")

    def content(self, decode: bool) -> ShardContent:
        """The samples; their images are inspected.

        Raises:
            UserError: an image has no label (``ROOT``).
        """
        unlabeled = next((key for key in self._images if key not in self._labels), None)
        if unlabeled is not None:
            problem = f"the sample {unlabeled!r} has no label: .cls, or .json with the key 'label'"
            remedy = _CONTENTS
            if not self._labels:
                remedy = (
                    "If it is an archive of images, unpack it into a folder per class and remove it: "
                    f"`mkdir {self._path.stem} && tar -xf {self._path.name} -C {self._path.stem}`."
                )
            raise UserError("ROOT", str(self._path), problem + self.skipped.because(), remedy)
        for key in self._labels:
            if key not in self._images:
                self.skipped.add("label without an image", f"{self._path.name}/{key}")
        return _inspect(self._path, self._images, self._labels, self.skipped, decode)


def _inspect(
    path: Path,
    images: dict[str, tuple[int, int, str]],
    labels: dict[str, Label],
    skipped: SkippedFiles,
    decode: bool,
) -> ShardContent:
    sizes = np.zeros((len(images), 2), dtype=np.int32)
    flags = np.zeros(len(images), dtype=np.uint8)
    with path.open("rb") as file:
        for i, (offset, length, name) in enumerate(images.values()):
            height, width, flags[i] = probe(file.fileno(), offset, length, name, decode)
            sizes[i] = height, width
    offsets, lengths = (np.array([image[k] for image in images.values()], dtype=np.int64) for k in (0, 1))
    return ShardContent(offsets, lengths, sizes, flags, [labels[key] for key in images], skipped)


def _check_end(path: Path, end: int, size: int, skipped: SkippedFiles) -> None:
    """Check that only zeros follow the last member: tarfile ends silently at a damaged header and at a second tar."""
    if end >= size:
        skipped.add("end of a shard, perhaps cut off", path.name)
        return
    with path.open("rb") as file:
        file.seek(end)
        if any(file.read(_BLOCK)):
            raise _broken(path, f"is damaged or cut off: at byte {end:,} there is no tar member")
        while chunk := file.read(_CHUNK):
            if chunk.count(0) != len(chunk):
                message = "contains more data after its end, such as a second tar file"
                remedy = f"Unpack it with `tar --ignore-zeros -xf {path.name}`, and write one tar file."
                raise UserError("ROOT", str(path), message, remedy)


def _not_a_tar(path: Path, error: str) -> tuple[str, str]:
    """Reason and remedy for a file that tarfile cannot read."""
    with path.open("rb") as file:
        head = file.read(_BLOCK)
    kind = unsupported_format(head)
    if not head:
        return "it is empty", "Restore or remove the file."
    if kind in ("gzip", "zstd", "xz", "bzip2"):
        return f"it is compressed with {kind}", "Decompress it: images are read by their offset."
    return f"it is a {kind} file" if kind else error, "Restore or remove the file."


def _broken(path: Path, problem: str) -> UserError:
    return UserError("ROOT", str(path), problem, _CONTENTS)
