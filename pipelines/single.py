"""Preparation of a single image as in evaluation, for prediction without DALI."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipelines.crop import crop_image, decode_image
from pipelines.header import image_size as size_of
from pipelines.images import BadImage, read_image_file, unreadable_image
from pipelines.transforms import Transforms, draw_crop_params, finish

if TYPE_CHECKING:
    from PIL import Image


def load_image(
    path: Path,
    *,
    resize_shorter_side: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bilinear",
) -> Tensor:
    """Read a file and apply ``prepare_image``.

    Raises:
        UserError: the file cannot be read or is not an image.
    """
    try:
        return prepare_image(
            read_image_file(path),
            resize_shorter_side=resize_shorter_side,
            image_size=image_size,
            mean=mean,
            std=std,
            interpolation=interpolation,
        )
    except (BadImage, OSError) as error:
        raise unreadable_image(path, error) from None


def prepare_image(
    data: bytes,
    *,
    resize_shorter_side: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bilinear",
) -> Tensor:
    """Decode an image, resize its shorter side, center-crop and normalize it to float32 [3, S, S].

    Raises:
        BadImage: not an image, or damaged.
    """
    transforms = evaluation_transforms(
        resize_shorter_side=resize_shorter_side, image_size=image_size, mean=mean, std=std
    )
    boxes = _boxes(transforms, size_of(data))
    return _normalize(transforms, decode_image(data, *boxes, image_size, interpolation))


def prepare_pixels(
    image: Image.Image,
    *,
    resize_shorter_side: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bilinear",
) -> Tensor:
    """Apply the steps of ``prepare_image`` to a decoded image; equal pixels give equal results.

    Raises:
        OSError: Pillow decodes the image only now, and it is damaged.
    """
    transforms = evaluation_transforms(
        resize_shorter_side=resize_shorter_side, image_size=image_size, mean=mean, std=std
    )
    boxes = _boxes(transforms, (image.height, image.width))
    return _normalize(transforms, crop_image(image.convert("RGB"), *boxes, image_size, interpolation))


def evaluation_transforms(
    *,
    resize_shorter_side: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bilinear",
) -> Transforms:
    """Transforms of the preprocessing of a model's description."""
    return Transforms(
        image_size=image_size,
        train=False,
        eval_resize=resize_shorter_side,
        interpolation=interpolation,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )


def _boxes(transforms: Transforms, size: tuple[int, int]) -> tuple[list[int], list[int], list[int]]:
    """Window, resized size and offset of the center crop of an image of (height, width)."""
    crop = draw_crop_params(transforms, 0, 0, np.zeros(1, dtype=np.int64), np.array([size], dtype=np.int64))
    return crop.window[0].tolist(), crop.resized[0].tolist(), crop.offset[0].tolist()


def _normalize(transforms: Transforms, image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.asarray(image).copy())
    return finish(transforms, pixels[None], 0, 0, np.zeros(1, dtype=np.int64))[0]
