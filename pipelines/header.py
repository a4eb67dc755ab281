"""Image size from the header of an encoded image, mostly without decoding it."""

from __future__ import annotations

import struct

from pipelines.images import check_pixels, open_image

_DQT, _SOS = 0xDB, 0xDA
_DECODABLE = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
"""Frames of sequential and progressive JPEGs; lossless and hierarchical ones are not decoded."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SIZE = struct.Struct(">HH")
_BITS = 8
_END_OF_PNG = 8
"""Bytes of the type and the checksum of the last chunk."""


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) from the header of an encoded image.

    Raises:
        BadImage: not an image, a truncated JPEG, or too many pixels.
    """
    jpeg = data.startswith(b"\xff\xd8")
    size = _jpeg_size(data) if jpeg and b"\xff\xd9" in data[-64:] else None
    if size is None:
        return _size_by_pillow(data, full=jpeg)
    check_pixels(*size, len(data))
    return size


def has_jpeg_structure(head: bytes) -> bool:
    """Whether a JPEG's beginning has the segments that every decoder needs, up to its compressed data."""
    offset, markers = 2, set[int]()
    while offset + 4 <= len(head) and head[offset] == 0xFF:
        marker = head[offset + 1]
        if marker == 0xFF:
            offset += 1
            continue
        markers.add(marker)
        if marker == _SOS:
            return _DQT in markers and not markers.isdisjoint(_DECODABLE)
        offset += 2 + int.from_bytes(head[offset + 2 : offset + 4], "big")
    return False


def is_cut_png(data: bytes) -> bool:
    """Whether a PNG lacks part of its last chunk. Pillow can decode it if no pixel is missing; DALI cannot."""
    if not data.startswith(b"\x89PNG"):
        return False
    end = data.rfind(b"IEND")
    return end < 0 or end + _END_OF_PNG > len(data)


def has_common_format(data: bytes) -> bool:
    """Whether DALI and Pillow decode an image to the same colors.

    True for a JPEG with one or three components of 8 bits, whether or not it is complete, and for a complete PNG with
    8-bit gray or RGB values and without transparency. False for all others.
    """
    if data.startswith(b"\x89PNG"):
        plain = data[24:25] == b"\x08" and data[25:26] in (b"\x00", b"\x02")
        return plain and data.find(b"tRNS", 0, data.find(b"IDAT")) < 0 and not is_cut_png(data)
    frame = _jpeg_frame(data) if data.startswith(b"\xff\xd8") else None
    return frame is not None and data[frame + 4] == _BITS and data[frame + 9] in (1, 3)


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) from the JPEG frame header; None if it is not found."""
    frame = _jpeg_frame(data)
    height, width = (0, 0) if frame is None else _SIZE.unpack_from(data, frame + 5)
    return (height, width) if height and width else None


def _jpeg_frame(data: bytes) -> int | None:
    """Position of the frame header of a JPEG; None if it is not found."""
    offset, last = 2, len(data) - 9
    while offset < last:
        if data[offset] != 0xFF:
            return None
        marker = data[offset + 1]
        if marker in _FRAMES:
            return offset
        # A repeated 0xFF is padding.
        offset += 1 if marker == 0xFF else 2 + (data[offset + 2] << 8 | data[offset + 3])
    return None


def _size_by_pillow(data: bytes, full: bool) -> tuple[int, int]:
    with open_image(data) as image:
        if full:
            image.load()
        return image.height, image.width
