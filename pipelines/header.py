"""Image size from the header of an encoded image, mostly without decoding it."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from pipelines.images import check_pixels, open_image


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
