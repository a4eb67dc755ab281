"""Center crop and decoding of a crop with Pillow. Without torch, so that worker processes start quickly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipelines.images import open_image

if TYPE_CHECKING:
    from PIL import Image


def center_crop(
    sizes: NDArray[np.int64], target: int, side: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Resize the shorter side to `target` and crop the central square of `side`, rounding as torchvision does.

    Args:
        sizes: [B, 2], (height, width) of the images.

    Returns:
        Window [B, 4], resized size [B, 2] and offset [B, 2] of ``transforms.CropParams``.
    """
    short = sizes.min(axis=1)
    resized = np.where(sizes == short[:, None], target, (target * sizes) // short[:, None])
    offset = np.rint((resized - side) / 2.0).astype(np.int64)
    return np.concatenate([np.zeros_like(sizes), sizes], axis=1), resized, offset


def decode_image(
    data: bytes,
    window: list[int],
    resized: list[int],
    offset: list[int],
    side: int,
    interpolation: str = "bilinear",
) -> Image.Image:
    """Decode an image, crop it to `window`, resize to `resized` and crop the square at `offset`.

    Args:
        interpolation: `bilinear` or `bicubic`; both are antialiased.
    """
    with open_image(data) as image:
        return crop_image(image.convert("RGB"), window, resized, offset, side, interpolation)


def crop_image(
    image: Image.Image,
    window: list[int],
    resized: list[int],
    offset: list[int],
    side: int,
    interpolation: str = "bilinear",
) -> Image.Image:
    """Crop an image to `window`, resize it to `resized` and crop the square at `offset`; see ``decode_image``."""
    from PIL import Image

    top, left, height, width = window
    cropped = image.crop((left, top, left + width, top + height))
    scaled = cropped.resize((resized[1], resized[0]), Image.Resampling[interpolation.upper()])
    return scaled.crop((offset[1], offset[0], offset[1] + side, offset[0] + side))
