"""What can be told of an encoded image from its first and last bytes: size, form, and the commonest damage."""

from __future__ import annotations

import os
import stat
from enum import IntFlag
from typing import NamedTuple

import numpy as np

from pipelines.header import image_size
from pipelines.images import MAX_BYTES, BadImage, open_image

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
    """What is remarkable about an image. A bit is never reused: indexes hold them."""

    EMPTY = 1
    TRUNCATED = 2
    NOT_AN_IMAGE = 4
    UNREADABLE = 8
    CMYK = 16
    WRONG_EXTENSION = 32
    ROTATED = 64


UNUSABLE = Flag.EMPTY | Flag.TRUNCATED | Flag.NOT_AN_IMAGE | Flag.UNREADABLE


class Probe(NamedTuple):
    """Size in pixels as stored (zeros where unknown), and ``Flag`` bits."""

    height: int
    width: int
    flags: int


class _Header(NamedTuple):
    form: str
    mode: str
    height: int
    width: int
    orientation: int


def probe(handle: int, offset: int, length: int, name: str) -> Probe:
    """Look at the image in bytes `offset` to `offset` + `length` of an open file.

    Two short reads for a sound image; the whole of it is read, and decoded, only where its end looks wrong.

    Args:
        name: whose ending says what the image should be.
    """
    if length == 0:
        return Probe(0, 0, Flag.EMPTY)
    state = os.fstat(handle)
    if not stat.S_ISREG(state.st_mode) or length > MAX_BYTES:
        return Probe(0, 0, Flag.UNREADABLE)
    if offset + length > state.st_size:
        return Probe(0, 0, Flag.TRUNCATED)
    try:
        head = os.pread(handle, min(length, _HEAD), offset)
        tail = os.pread(handle, min(length, _TAIL), offset + length - min(length, _TAIL))
        header = _read_header(head, length)
        if (
            header is not None
            and len(tail) == min(length, _TAIL)
            and _ends_well(header.form, head, tail, length)
        ):
            return Probe(header.height, header.width, _form_flags(header, name))
        return _probe_whole(os.pread(handle, length, offset), length, name)
    except OSError:
        return Probe(0, 0, Flag.UNREADABLE)


def _probe_whole(data: bytes, length: int, name: str) -> Probe:
    """By decoding: what is written behind an image's end, or an unusually long header, is no damage."""
    damage = Flag.TRUNCATED if data.startswith(_MAGIC) else Flag.NOT_AN_IMAGE
    try:
        height, width = image_size(np.frombuffer(data, dtype=np.uint8))
        with open_image(data) as image:
            image.load()
    except BadImage:
        return Probe(0, 0, damage)
    header = _read_header(data, len(data))
    assert header is not None, "it has just been decoded"
    return Probe(height, width, _form_flags(header, name) | (Flag.TRUNCATED if len(data) < length else 0))


def _read_header(head: bytes, length: int) -> _Header | None:
    try:
        with open_image(head, length) as image:
            form = image.format or ""
            turned = image.getexif().get(0x0112, 1) if "exif" in image.info else 1
            return _Header(form, image.mode, image.height, image.width, int(turned))
    except BadImage:
        return None


def _ends_well(form: str, head: bytes, tail: bytes, length: int) -> bool:
    if form in ("JPEG", "MPO"):
        return b"\xff\xd9" in tail
    if form == "PNG":
        return b"IEND" in tail
    if form == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= length
    if form == "BMP":
        return int.from_bytes(head[2:6], "little") <= length
    return False


def _form_flags(header: _Header, name: str) -> int:
    suffix = name.rpartition(".")[2].lower()
    flags = Flag(0)
    if header.mode == "CMYK":
        flags |= Flag.CMYK
    if suffix not in _SUFFIXES.get(header.form, ()):
        flags |= Flag.WRONG_EXTENSION
    if header.orientation not in (0, 1):
        flags |= Flag.ROTATED
    return int(flags)
