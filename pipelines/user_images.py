"""Images as a Python program has them: files, Pillow images, and uint8 arrays or tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dl2pa.errors import UserError
from pipelines.single import load_image, prepare_pixels

if TYPE_CHECKING:
    from PIL import Image

    ImageInput: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor
    """A file, a Pillow image, or uint8 values [H, W, 3] in RGB order."""

    Images: TypeAlias = ImageInput | Iterable["Images"]
    """One image, a batch [N, H, W, 3], or an iterable of images and batches."""

_REMEDY = "Give files, Pillow images, or uint8 arrays or tensors [H, W, 3] or [N, H, W, 3] in RGB order."


def each_image(images: Images) -> Iterator[ImageInput]:
    """Yield the single images of one image, a batch or an iterable."""
    if isinstance(images, np.ndarray | Tensor):
        yield from images if images.ndim == 4 else (images,)
    elif isinstance(images, Iterable) and not isinstance(images, str | bytes | os.PathLike):
        for part in images:
            yield from each_image(part)
    else:
        yield images


def prepare(image: ImageInput, **preprocessing: Any) -> Tensor:
    """Prepare one image as in evaluation: float32 [3, S, S].

    Args:
        preprocessing: as in ``pipelines.single.Preprocessing``.

    Raises:
        UserError: not an image, a file that cannot be read, or an array of another type or shape.
    """
    from PIL import Image

    if isinstance(image, str | os.PathLike):
        return load_image(Path(image), **preprocessing)
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8:  # NumPy lacks some types of torch
            raise _not_uint8(f"{image.dtype} {list(image.shape)}")
        image = image.detach().cpu().numpy()
    pixels: Any = _of_array(image) if isinstance(image, np.ndarray) else image
    if not isinstance(pixels, Image.Image):
        raise UserError("images", type(image).__name__, "is not an image", _REMEDY)
    if not pixels.width or not pixels.height:
        raise UserError("images", f"{pixels.width} x {pixels.height}", "has no pixels", "Give another image.")
    try:
        return prepare_pixels(pixels, **preprocessing)
    except OSError as error:
        raise UserError(
            "images", repr(pixels), f"cannot be decoded ({error})", "Give another image."
        ) from None


def _of_array(values: NDArray[Any]) -> Image.Image:
    from PIL import Image

    described = f"{values.dtype} {list(values.shape)}"
    if values.dtype != np.uint8:
        raise _not_uint8(described)
    if values.ndim != 3 or values.shape[2] != 3 or not values.size:
        remedy = _REMEDY
        if values.ndim == 3 and values.shape[0] == 3:
            remedy = "Put the channels last: array.transpose(1, 2, 0), or tensor.permute(1, 2, 0)."
        raise UserError("images", described, "the shape of an image must be [H, W, 3]", remedy)
    return Image.fromarray(np.ascontiguousarray(values))


def _not_uint8(described: str) -> UserError:
    return UserError("images", described, "the values must be uint8, 0 to 255", _REMEDY)
