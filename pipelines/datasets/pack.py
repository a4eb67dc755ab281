"""From a folder of images to tar shards in WebDataset's form: few large files, optionally of smaller images.

The order stays that of the folder, so the same (seed, epoch, step) gives the same images. Every shard is planned
before the first is written, written aside, read back and compared, and renamed: a killed packing goes on with the
shards that are missing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dl2pa.errors import UserError
from pipelines.datasets.build_index import CLASSES_NAME, build_index
from pipelines.datasets.index import INDEX_NAME, Index
from pipelines.datasets.table import ImageTable, PathTable
from pipelines.header import image_size
from pipelines.images import BadImage, open_image
from pipelines.parallel import in_parallel

_PLAN = "pack.json"
_SAMPLED = 64
_MEMBER = 1024  # a header and, on average, half a block of padding; the label's member takes as much


@dataclass(frozen=True)
class PackOptions:
    """How images are stored.

    Attributes:
        short_side: larger images are resampled to this many pixels on their shorter side; None: bytes as they are.
        quality: of the JPEGs that resampling writes.
        shard_size: bytes a shard should have, about.
    """

    short_side: int | None = None
    quality: int = 90
    shard_size: int = 1 << 30


@dataclass(frozen=True)
class PackResult:
    """What a packing came to: images, bytes before and after, shards, paths of images kept though undecodable."""

    index: Index
    images: int
    bytes_in: int
    bytes_out: int
    shards: int
    kept_as_they_are: list[str]


@dataclass(frozen=True)
class _Shard:
    """One shard to write: its images in the source."""

    source: Path
    names: PathTable
    labels: NDArray[np.int64]
    target: Path
    options: PackOptions


def pack(
    source: Index, out: Path, options: PackOptions, workers: int, progress: Callable[[int, int], None]
) -> PackResult:
    """Write the shards of every half and their index into `out`.

    Args:
        source: the data set, from its index or listed; its images lie in files of their own.
        progress: told (done, of so many) images.

    Raises:
        UserError: `out` holds another packing or a shard that is not as it was written, a source image is not
            readable, or what is read back differs.
    """
    _claim(out, source, options)
    shards = [
        shard for name, split in source.splits.items() for shard in _plan(name, split.table, out, options)
    ]
    total = sum(len(shard.names) for shard in shards)
    missing = [shard for shard in shards if not shard.target.exists()]
    done = total - sum(len(shard.names) for shard in missing)
    progress(done, total)
    for count in in_parallel(_write_shard, missing, min(workers, len(missing))):
        done += count
        progress(done, total)
    index = build_index(out, out / INDEX_NAME, workers)
    kept = _compare(source, index, out, options)
    bytes_in = sum(int(split.table.lengths.sum()) for split in source.splits.values())
    bytes_out = sum(shard.target.stat().st_size for shard in shards)
    return PackResult(index, total, bytes_in, bytes_out, len(shards), kept)


def _claim(out: Path, source: Index, options: PackOptions) -> None:
    """Make `out`, or recognize what an earlier attempt began there."""
    prints = {name: split.table.fingerprint for name, split in source.splits.items()}
    options_text = json.dumps({"source": prints, **asdict(options)}, indent=1) + "\n"
    file = out / _PLAN
    try:
        out.mkdir(parents=True, exist_ok=True)
        if file.exists():
            if file.read_text(encoding="utf-8") != options_text:
                message = "holds another packing: of other images, or with other options"
                raise UserError(
                    "OUT", str(out), message, "Give an empty folder, or the options of that packing."
                )
        elif any(out.iterdir()):
            raise UserError("OUT", str(out), "is not empty", "Give a new or an empty folder.")
        else:
            file.write_text(options_text, encoding="utf-8")
            words = {name: source.words.get(name, "") for name in source.classes}
            (out / CLASSES_NAME).write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")
        for left in out.glob(".*.tar"):
            left.unlink()
    except OSError as error:
        raise UserError(
            "OUT", str(out), f"cannot be written: {error.strerror}", "Give another folder."
        ) from None


def _plan(split: str, table: ImageTable, out: Path, options: PackOptions) -> list[_Shard]:
    """Cut the half into shards of about the size wanted: by the bytes of the source, times what resampling leaves."""
    ratio = _ratio(table, options)
    ends = np.cumsum(table.lengths * ratio + 2 * _MEMBER)
    number = (np.maximum(ends - 1, 0) // options.shard_size).astype(np.int64)
    cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(table)]
    return [
        _Shard(
            table.root,
            table.files.part(low, high),
            np.array(table.labels[low:high]),
            out / f"{split}-{k:06d}.tar",
            options,
        )
        for k, (low, high) in enumerate(pairwise(cuts))
    ]


def _ratio(table: ImageTable, options: PackOptions) -> float:
    """Bytes after over bytes before, from some images spread over the half; the same ones each time."""
    if options.short_side is None:
        return 1.0
    before = after = 1
    for i in np.unique(np.linspace(0, len(table) - 1, _SAMPLED).astype(np.int64)).tolist():
        data = table.read(i)
        before, after = before + len(data), after + len(_stored(data, options)[0])
    return after / before


def _write_shard(shard: _Shard) -> int:
    aside = shard.target.with_name(f".{shard.target.stem}-{os.getpid()}.tar")
    digests: list[bytes] = []
    taken: set[str] = set()
    with aside.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, label in zip(shard.names, shard.labels.tolist(), strict=True):
                data, ending = _stored(_read(shard.source / name), shard.options)
                key = _key(name, taken)
                digests.append(hashlib.sha256(data).digest())
                _add(archive, f"{key}.{ending or name.rpartition('.')[2].lower()}", data)
                _add(archive, f"{key}.cls", str(label).encode())
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(
            file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED
        )  # read back from the disk, not from memory
    _check_written(aside, digests, shard.labels.tolist())
    aside.replace(shard.target)
    return len(shard.names)


def _check_written(file: Path, digests: list[bytes], labels: list[int]) -> None:
    found: list[bytes] = []
    with tarfile.open(file, "r:") as archive:
        for member in archive:
            stream = archive.extractfile(member)
            content = stream.read() if stream else b""
            found.append(content if member.name.endswith(".cls") else hashlib.sha256(content).digest())
    expected = [
        part for digest, label in zip(digests, labels, strict=True) for part in (digest, str(label).encode())
    ]
    if found != expected:
        raise OSError(f"{file} does not hold what was written to it: check the disk")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        remedy = "Restore or remove the file; then index the folder again if it has an index."
        raise UserError("ROOT", str(path), f"cannot be read: {error.strerror}", remedy) from None


def _stored(data: bytes, options: PackOptions) -> tuple[bytes, str | None]:
    """The bytes to store, and their form where it is a new one. What cannot be decoded stays as it is."""
    from PIL import Image

    if options.short_side is None:
        return data, None
    try:
        height, width = image_size(np.frombuffer(data, dtype=np.uint8))
        short = min(height, width)
        if short <= options.short_side:
            return data, None
        scaled = (
            max(1, round(width * options.short_side / short)),
            max(1, round(height * options.short_side / short)),
        )
        with open_image(data) as image:
            smaller = image.convert("RGB").resize(scaled, Image.Resampling.LANCZOS)
    except BadImage:
        return data, None
    file = io.BytesIO()
    smaller.save(file, "JPEG", quality=options.quality)
    return file.getvalue(), "jpeg"


def _key(name: str, taken: set[str]) -> str:
    """The path without its ending; dots would end the key early, and no two samples of a shard share one."""
    folder, slash, base = name.rpartition("/")
    plain = f"{folder}{slash}{base.rpartition('.')[0].replace('.', '_')}"
    key, number = plain, 2
    while key in taken:
        key, number = f"{plain}-{number}", number + 1
    taken.add(key)
    return key


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """A member without owner and time: the same images make the same shard."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _compare(source: Index, packed: Index, out: Path, options: PackOptions) -> list[str]:
    """Refuse a packing that is not the source image by image; paths of those that could not be resampled."""
    kept: list[str] = []
    for name, split in source.splits.items():
        ours, theirs = split.table, packed.splits[name].table if name in packed.splits else None
        same = theirs is not None and len(ours) == len(theirs) and np.array_equal(ours.labels, theirs.labels)
        if same and theirs is not None and options.short_side is None:
            same = np.array_equal(ours.lengths, theirs.lengths)
        if not same or theirs is None:
            message = f"its shards of the half {name!r} do not hold the {len(ours)} images of the source in their order"
            remedy = "Another program changed them: remove the folder and pack again."
            raise UserError("OUT", str(out), message, remedy)
        if options.short_side is not None:
            kept += [str(ours.path(i)) for i in _undecodable(packed.splits[name].flags)]
    return kept


def _undecodable(flags: NDArray[np.uint8]) -> list[int]:
    from pipelines.datasets.probe import UNUSABLE

    return np.flatnonzero(flags & int(UNUSABLE)).tolist()
