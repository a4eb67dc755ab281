"""What the header of an encoded image says, and whether the image looks whole, mostly without decoding it."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from pipelines.images import check_pixels, open_image


def image_size(data: NDArray[np.uint8]) -> tuple[int, int]:
    """(height, width) from the header of an encoded image.

    Raises:
        BadImage: not an image, a JPEG that ends before its end, or too many pixels.
    """
    jpeg = data[:2].tobytes() == b"\xff\xd8"
    size = _jpeg_size(data) if jpeg and _jpeg_complete(data) else None
    if size is None:
        return _size_by_pillow(data.tobytes(), full=jpeg)
    check_pixels(*size, len(data))
    return size


def _jpeg_size(data: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Walk the segments up to the frame header; None where the walk fails."""
    view = memoryview(data)  # pyright: ignore[reportArgumentType]
    at = 2
    while at + 9 < len(view):
        if view[at] != 0xFF:
            return None
        marker = view[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", view[at + 5 : at + 9])
            return (height, width) if height and width else None
        if marker == 0xFF:
            at += 1
            continue
        at += 2 + struct.unpack(">H", view[at + 2 : at + 4])[0]
    return None


def _jpeg_complete(data: NDArray[np.uint8]) -> bool:
    return b"\xff\xd9" in data[-64:].tobytes()


def _size_by_pillow(data: bytes, full: bool) -> tuple[int, int]:
    with open_image(data) as image:
        if full:
            image.load()
        return image.height, image.width
