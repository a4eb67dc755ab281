"""Image size from the header of an encoded image, mostly without decoding it."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from pipelines.images import check_pixels, open_image

_DQT, _SOS = 0xDB, 0xDA
_DECODABLE = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
"""Frames of sequential and progressive JPEGs; lossless and hierarchical ones are not decoded."""
_END_OF_PNG = 8
"""Bytes of the type and the checksum of the last chunk."""


def image_size(data: NDArray[np.uint8]) -> tuple[int, int]:
    """(height, width) from the header of an encoded image.

    Raises:
        BadImage: not an image, a truncated JPEG, or too many pixels.
    """
    jpeg = data[:2].tobytes() == b"\xff\xd8"
    size = _jpeg_size(data) if jpeg and _jpeg_complete(data) else None
    if size is None:
        return _size_by_pillow(data.tobytes(), full=jpeg)
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


def is_cut_png(data: NDArray[np.uint8]) -> bool:
    """Whether a PNG lacks part of its last chunk. Pillow can decode it if no pixel is missing; DALI cannot."""
    if data[:4].tobytes() != b"\x89PNG":
        return False
    end = data.tobytes().rfind(b"IEND")
    return end < 0 or end + _END_OF_PNG > len(data)


def _jpeg_size(data: NDArray[np.uint8]) -> tuple[int, int] | None:
    """(height, width) from the JPEG frame header; None if it is not found."""
    view = memoryview(data)  # pyright: ignore[reportArgumentType]
    offset = 2
    while offset + 9 < len(view):
        if view[offset] != 0xFF:
            return None
        marker = view[offset + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", view[offset + 5 : offset + 9])
            return (height, width) if height and width else None
        if marker == 0xFF:
            offset += 1
            continue
        offset += 2 + struct.unpack(">H", view[offset + 2 : offset + 4])[0]
    return None


def _jpeg_complete(data: NDArray[np.uint8]) -> bool:
    return b"\xff\xd9" in data[-64:].tobytes()


def _size_by_pillow(data: bytes, full: bool) -> tuple[int, int]:
    with open_image(data) as image:
        if full:
            image.load()
        return image.height, image.width
