"""Inspect an encoded image by its first and last bytes: size, format and common damage."""

from __future__ import annotations

import os
import stat
import struct
from enum import IntFlag
from typing import TYPE_CHECKING, NamedTuple

from pipelines.header import has_jpeg_structure, image_size
from pipelines.images import MAX_BYTES, BadImage, is_fault_of_process, open_image, why_not_an_image

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.datasets.table import ImageTable

_HEAD = 1 << 16
_TAIL = 64
_SUFFIXES = {
    "JPEG": ("jpg", "jpeg"),
    "MPO": ("jpg", "jpeg"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "BMP": ("bmp",),
}
_MAGIC = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"BM")


class Flag(IntFlag):
    """Properties and damage of an image. Never change or reuse a bit: index files store them."""

    EMPTY = 1
    TRUNCATED = 2
    NOT_AN_IMAGE = 4
    UNREADABLE = 8
    CMYK = 16
    WRONG_EXTENSION = 32
    ROTATED = 64


_TEXTS = {
    Flag.EMPTY: "is empty",
    Flag.TRUNCATED: "is truncated",
    Flag.NOT_AN_IMAGE: "is not an image",
    Flag.UNREADABLE: "cannot be read",
    Flag.WRONG_EXTENSION: "has another format than its extension",
    Flag.CMYK: "has four color channels",
    Flag.ROTATED: "has a camera orientation",
}
_DETAILED = (Flag.NOT_AN_IMAGE, Flag.UNREADABLE)
UNUSABLE = Flag.EMPTY | Flag.TRUNCATED | Flag.NOT_AN_IMAGE | Flag.UNREADABLE


class Probe(NamedTuple):
    """Stored size in pixels (zeros if unknown), and ``Flag`` bits."""

    height: int
    width: int
    flags: int


class _Header(NamedTuple):
    format: str
    mode: str
    height: int
    width: int
    orientation: int


def probe(handle: int, offset: int, length: int, name: str, decode: bool = False) -> Probe:
    """Inspect the image in bytes `offset` to `offset` + `length` of an open file.

    An undamaged image needs two short reads. It is fully read and decoded only if its beginning or end looks damaged.

    Args:
        name: file name; its suffix is compared with the format.
        decode: decode every image, which also finds damage inside its data.

    Raises:
        OSError: no memory.
    """
    if length == 0:
        return Probe(0, 0, Flag.EMPTY)
    state = os.fstat(handle)
    if not stat.S_ISREG(state.st_mode) or length > MAX_BYTES:
        return Probe(0, 0, Flag.UNREADABLE)
    if offset + length > state.st_size:
        return Probe(0, 0, Flag.TRUNCATED)
    try:
        if decode:
            return _probe_by_decoding(os.pread(handle, length, offset), length, name)
        head = os.pread(handle, min(length, _HEAD), offset)
        tail = os.pread(handle, min(length, _TAIL), offset + length - min(length, _TAIL))
        header = _read_header(head, length)
        if (
            header is not None
            and len(tail) == min(length, _TAIL)
            and _is_complete(header.format, head, tail, length)
        ):
            return Probe(header.height, header.width, _format_flags(header, name))
        return _probe_by_decoding(os.pread(handle, length, offset), length, name)
    except OSError as error:
        if is_fault_of_process(error):
            raise
        return Probe(0, 0, Flag.UNREADABLE)


def probe_data(data: bytes, decode: bool = False) -> Probe:
    """Inspect the bytes of an image without a file name; see ``probe``."""
    if not data:
        return Probe(0, 0, Flag.EMPTY)
    if len(data) > MAX_BYTES:
        return Probe(0, 0, Flag.UNREADABLE)
    head, tail = data[:_HEAD], data[-_TAIL:]
    header = None if decode else _read_header(head, len(data))
    if header is not None and _is_complete(header.format, head, tail, len(data)):
        return Probe(header.height, header.width, _format_flags(header, ""))
    return _probe_by_decoding(data, len(data), "")


def describe(table: ImageTable, i: int, flags: Flag, *, read: bool) -> str:
    """Properties and damage of image `i` as text, such as ``is a GIF file``.

    Args:
        read: read a damaged image again for a more detailed text.
    """
    return ", ".join(
        _describe_content(table, i, _TEXTS[flag]) if read and flag in _DETAILED else _TEXTS[flag]
        for flag in flags
    )


def _describe_content(table: ImageTable, i: int, text: str) -> str:
    try:
        return why_not_an_image(table.read(i))
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except (BadImage, ValueError) as error:
        return str(error) or text


def _probe_by_decoding(data: bytes, length: int, name: str) -> Probe:
    """Inspect by decoding: trailing bytes and an unusually long header are not damage."""
    damage = Flag.TRUNCATED if data.startswith(_MAGIC) else Flag.NOT_AN_IMAGE
    try:
        height, width = image_size(data)
        with open_image(data) as image:
            image.convert("RGB")  # as the loaders do
    except BadImage:
        return Probe(0, 0, damage)
    header = _read_header(data, len(data))
    assert header is not None, "it has just been decoded"
    return Probe(height, width, _format_flags(header, name) | (Flag.TRUNCATED if len(data) < length else 0))


def _read_header(head: bytes, length: int) -> _Header | None:
    try:
        with open_image(head, length) as image:
            return _Header(image.format or "", image.mode, image.height, image.width, _orientation(image))
    except BadImage:
        return None


def _orientation(image: Image.Image) -> int:
    """Camera orientation; 1 if there is none or it is damaged, which no decoder minds."""
    if "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(0x0112, 1))
    except (SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, OSError, struct.error):
        return 1


def _is_complete(format_name: str, head: bytes, tail: bytes, length: int) -> bool:
    if format_name in ("JPEG", "MPO"):
        return b"\xff\xd9" in tail and has_jpeg_structure(head)
    if format_name == "PNG":
        return b"IEND" in tail
    if format_name == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= length
    if format_name == "BMP":
        return int.from_bytes(head[2:6], "little") <= length
    return False


def _format_flags(header: _Header, name: str) -> int:
    suffix = name.rpartition(".")[2].lower()
    flags = Flag(0)
    if header.mode == "CMYK":
        flags |= Flag.CMYK
    if suffix not in _SUFFIXES.get(header.format, ()):
        flags |= Flag.WRONG_EXTENSION
    if header.orientation not in (0, 1):
        flags |= Flag.ROTATED
    return int(flags)
