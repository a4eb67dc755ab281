"""Image size from the header of an encoded image, mostly without decoding it."""

from __future__ import annotations

import struct

from pipelines.images import check_pixels, open_image

_DQT, _SOS = 0xDB, 0xDA
_DECODABLE = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
"""Frames of sequential and progressive JPEGs; lossless and hierarchical ones are not decoded."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SIZE = struct.Struct(">HH")
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


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) from the JPEG frame header; None if it is not found."""
    offset, last = 2, len(data) - 9
    while offset < last:
        if data[offset] != 0xFF:
            return None
        marker = data[offset + 1]
        if marker in _FRAMES:
            height, width = _SIZE.unpack_from(data, offset + 5)
            return (height, width) if height and width else None
        # A repeated 0xFF is padding.
        offset += 1 if marker == 0xFF else 2 + (data[offset + 2] << 8 | data[offset + 3])
    return None


def _size_by_pillow(data: bytes, full: bool) -> tuple[int, int]:
    with open_image(data) as image:
        if full:
            image.load()
        return image.height, image.width
