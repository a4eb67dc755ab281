"""Pack an image folder into tar shards in WebDataset format, optionally with smaller images.

The shards keep the order of the folder, so the same (seed, epoch, step) gives the same images. All shards are planned
before the first is written. Each shard is written to a temporary file, read back, compared and renamed; an interrupted
packing continues with the missing shards. Until the whole packing is verified, a marker file forbids training on it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from dl2pa.errors import UserError
from dl2pa.osutil import describing_full_disk, write_atomically
from pipelines.datasets.build_index import build_index
from pipelines.datasets.classes import CLASSES_NAME
from pipelines.datasets.index import INDEX_NAME, Index
from pipelines.datasets.probe import UNUSABLE
from pipelines.datasets.shards import PACK_OPTIONS_NAME, UNVERIFIED_NAME
from pipelines.datasets.skipped import SkippedFiles
from pipelines.datasets.table import ImageTable
from pipelines.header import image_size
from pipelines.images import BadImage, image_suffix, open_image
from pipelines.parallel import in_parallel

_NUM_SAMPLED = 64
_MEMBER = 1024  # header and average padding of a member, in bytes; an image and its label are two members


@dataclass(frozen=True)
class PackOptions:
    """Options of ``pack``.

    Attributes:
        short_side: resize larger images to this shorter side in pixels; None keeps the bytes unchanged.
        quality: JPEG quality of resized images.
        shard_size: approximate bytes per shard.
    """

    short_side: int | None = None
    quality: int = 90
    shard_size: int = 1 << 30


@dataclass(frozen=True)
class PackResult:
    """Result of ``pack``: index, counts, bytes, and paths of undecodable images, which were copied unchanged."""

    index: Index
    images: int
    bytes_in: int
    bytes_out: int
    shards: int
    not_resized: list[str]


@dataclass(frozen=True)
class _Shard:
    """A shard to write, and its images."""

    images: ImageTable
    target: Path
    options: PackOptions


def pack(
    source: Index, out: Path, options: PackOptions, workers: int, progress: Callable[[int, int], None]
) -> PackResult:
    """Write the shards of every split and their index into `out`.

    Args:
        source: the index of an image folder.
        progress: called with (done, total) images.

    Raises:
        UserError: `out` has other content, a source image cannot be read, or a shard differs from the source.
    """
    _prepare(out, source, options)
    shards = [
        shard
        for name, split in source.splits.items()
        for shard in _plan_shards(name, split.table, out, options)
    ]
    total = sum(len(shard.images) for shard in shards)
    missing = [shard for shard in shards if not shard.target.exists()]
    done = total - sum(len(shard.images) for shard in missing)
    progress(done, total)
    with describing_full_disk(out, 0):
        for count in in_parallel(_write_shard, missing, min(workers, len(missing))):
            done += count
            progress(done, total)
    index = build_index(out, out / INDEX_NAME, workers)
    not_resized = _compare(source, index, out, options)
    (out / UNVERIFIED_NAME).unlink(missing_ok=True)
    bytes_in = sum(int(split.table.lengths.sum()) for split in source.splits.values())
    bytes_out = sum(shard.target.stat().st_size for shard in shards)
    return PackResult(index, total, bytes_in, bytes_out, len(shards), not_resized)


def _prepare(out: Path, source: Index, options: PackOptions) -> None:
    """Create `out`, or check that it is from an earlier attempt with the same source and options."""
    fingerprints = {name: split.table.fingerprint for name, split in source.splits.items()}
    options_text = json.dumps({"source": fingerprints, **asdict(options)}, indent=1) + "\n"
    file = out / PACK_OPTIONS_NAME
    words = {name: source.words.get(name, "") for name in source.classes}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if file.exists():
            if file.read_text(encoding="utf-8") != options_text:
                message = "contains a packing of other images or with other options"
                raise UserError(
                    "OUT", str(out), message, "Specify an empty folder, or the same images and options."
                )
        elif any(not path.name.startswith(".") and path.name != UNVERIFIED_NAME for path in out.iterdir()):
            raise UserError("OUT", str(out), "is not empty", "Specify a new or an empty folder.")
        # First, because the shards of an interrupted or failed packing must not be used.
        write_atomically(out / UNVERIFIED_NAME, "Removed when the shards are complete and verified.\n")
        write_atomically(out / CLASSES_NAME, json.dumps(words, indent=1) + "\n")
        write_atomically(file, options_text)
        for unfinished in out.glob(".*.tar"):
            unfinished.unlink()
    except OSError as error:
        raise UserError(
            "OUT", str(out), f"cannot be written: {error.strerror}", "Specify another folder."
        ) from None


def _plan_shards(split: str, table: ImageTable, out: Path, options: PackOptions) -> list[_Shard]:
    """Divide a split into shards of about the requested size, estimated from the bytes of the source."""
    ratio = _ratio(table, options)
    ends = np.cumsum(table.lengths * ratio + 2 * _MEMBER)
    number = (np.maximum(ends - 1, 0) // options.shard_size).astype(np.int64)
    cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(table)]
    return [
        _Shard(
            replace(table.subset(np.arange(low, high)), classes=(), skipped=SkippedFiles()),
            out / f"{split}-{k:06d}.tar",
            options,
        )
        for k, (low, high) in enumerate(pairwise(cuts))
    ]


def _ratio(table: ImageTable, options: PackOptions) -> float:
    """Bytes after / bytes before resizing, from a fixed sample of images spread over the split."""
    if options.short_side is None:
        return 1.0
    before = after = 1
    for i in np.unique(np.linspace(0, len(table) - 1, _NUM_SAMPLED).astype(np.int64)).tolist():
        _, data = _read(table, i)
        before, after = before + len(data), after + len(_resized(data, options)[0])
    return after / before


def _write_shard(shard: _Shard) -> int:
    temporary = shard.target.with_name(f".{shard.target.stem}-{os.getpid()}.tar")
    digests: list[bytes] = []
    keys: set[str] = set()
    with temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            for i, label in enumerate(shard.images.labels.tolist()):
                name, original = _read(shard.images, i)
                data, suffix = _resized(original, shard.options)
                key = _unique_key(name, keys)
                digests.append(hashlib.sha256(data).digest())
                _add(archive, f"{key}.{suffix or name.rpartition('.')[2].lower()}", data)
                _add(archive, f"{key}.cls", str(label).encode())
        file.flush()
        os.fsync(file.fileno())
        # Drop the page cache, so that the check reads from the disk.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    _check_written(temporary, digests, shard.images.labels.tolist())
    temporary.replace(shard.target)
    return len(shard.images)


def _check_written(file: Path, digests: list[bytes], labels: list[int]) -> None:
    actual: list[bytes] = []
    with tarfile.open(file, "r:") as archive:
        for member in archive:
            stream = archive.extractfile(member)
            content = stream.read() if stream else b""
            actual.append(content if member.name.endswith(".cls") else hashlib.sha256(content).digest())
    expected = [
        part for digest, label in zip(digests, labels, strict=True) for part in (digest, str(label).encode())
    ]
    if actual != expected:
        raise OSError(f"{file} does not contain the data written to it: check the disk")


def _read(images: ImageTable, i: int) -> tuple[str, bytes]:
    """Name with suffix, and bytes of an image."""
    path = images.path(i)
    try:
        if images.members is None:
            return images.files[i], path.read_bytes()
        data = images.read(i)
        return f"{path.relative_to(images.root)}.{image_suffix(data) or 'jpg'}", data
    except (OSError, ValueError) as error:
        remedy = "Restore or remove the file; then index the folder again if it has an index."
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError("ROOT", str(path), f"cannot be read: {reason}", remedy) from None


def _resized(data: bytes, options: PackOptions) -> tuple[bytes, str | None]:
    """The bytes to store and, if resized, their new suffix. Undecodable images are returned unchanged."""
    from PIL import Image

    if options.short_side is None:
        return data, None
    try:
        height, width = image_size(data)
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


def _unique_key(name: str, keys: set[str]) -> str:
    """The path without suffix as a key that is unique in the shard; dots are replaced, since a key ends at a dot."""
    folder, slash, base = name.rpartition("/")
    plain = f"{folder}{slash}{base.rpartition('.')[0].replace('.', '_')}"
    key, number = plain, 2
    while key in keys:
        key, number = f"{plain}-{number}", number + 1
    keys.add(key)
    return key


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member without owner and time, so that shards are reproducible."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _compare(source: Index, packed: Index, out: Path, options: PackOptions) -> list[str]:
    """Check that the packing has the images of the source; return the paths of undecodable images."""
    not_resized: list[str] = []
    if packed.classes != source.classes:
        message, remedy = "its class names are not those of the source", "Remove the folder and pack again."
        raise UserError("OUT", str(out), message, remedy)
    for name, split in source.splits.items():
        before, after = split.table, packed.splits[name].table if name in packed.splits else None
        same = after is not None and np.array_equal(before.labels, after.labels)
        if same and after is not None and options.short_side is None:
            same = np.array_equal(before.lengths, after.lengths)
        if not same:
            message = f"its shards of the split {name!r} do not contain the {len(before)} images of the source in order"
            remedy = "Another program has changed them. Remove the folder and pack again."
            raise UserError("OUT", str(out), message, remedy)
        if options.short_side is not None:
            not_resized += [
                str(before.path(i))
                for i in np.flatnonzero(packed.splits[name].flags & int(UNUSABLE)).tolist()
            ]
    return not_resized
