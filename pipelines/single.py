"""Preparation of a single image as in evaluation, for prediction without DALI."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from pipelines.crop import crop_image, decode_image
from pipelines.header import image_size as size_of
from pipelines.images import BadImage, read_image_file, unreadable_image
from pipelines.transforms import Transforms, draw_crop_params, finish

if TYPE_CHECKING:
    from PIL import Image


class Preprocessing(TypedDict):
    """Preprocessing in the description of a model: sizes in pixels, mean and SD per channel of values in [0, 1]."""

    resize_shorter_side: int
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: NotRequired[str]


def load_image(path: Path, **preprocessing: Unpack[Preprocessing]) -> Tensor:
    """Read a file and apply ``prepare_image``.

    Raises:
        UserError: the file cannot be read or is not an image.
    """
    try:
        return prepare_image(read_image_file(path), **preprocessing)
    except (BadImage, OSError) as error:
        raise unreadable_image(path, error) from None


def prepare_image(data: bytes, **preprocessing: Unpack[Preprocessing]) -> Tensor:
    """Decode an image, resize its shorter side, center-crop and normalize it to float32 [3, S, S].

    Raises:
        BadImage: not an image, or damaged.
    """
    transforms = evaluation_transforms(**preprocessing)
    boxes = _boxes(transforms, size_of(data))
    return _normalize(transforms, decode_image(data, *boxes, transforms.image_size, transforms.interpolation))


def prepare_pixels(image: Image.Image, **preprocessing: Unpack[Preprocessing]) -> Tensor:
    """Apply the steps of ``prepare_image`` to a decoded image; equal pixels give equal results.

    Raises:
        OSError: Pillow decodes the image only now, and it is damaged.
    """
    transforms = evaluation_transforms(**preprocessing)
    boxes = _boxes(transforms, (image.height, image.width))
    cropped = crop_image(image.convert("RGB"), *boxes, transforms.image_size, transforms.interpolation)
    return _normalize(transforms, cropped)


def evaluation_transforms(
    **preprocessing: Unpack[Preprocessing],
) -> Transforms:
    """Transforms of the preprocessing of a model's description."""
    mean, std = preprocessing["mean"], preprocessing["std"]
    return Transforms(
        image_size=preprocessing["image_size"],
        train=False,
        eval_resize=preprocessing["resize_shorter_side"],
        interpolation=preprocessing.get("interpolation", "bilinear"),
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
