"""Image transforms: crop parameters, augmentation and normalization.

``CropParams`` are computed on the host from (seed, epoch, sample, image size). All loaders apply the same parameters,
so they differ only in decoding and resampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment_ops import OpParams, apply_ops
from pipelines.batch import host_to_device
from pipelines.color_jitter import draw_jitter
from pipelines.crop import center_crop
from pipelines.erasing import apply_erasing, draw_erasing
from pipelines.rand_augment import draw_rand
from pipelines.rng import Stream, randint, uniform
from pipelines.trivial_augment import draw_trivial

_TRIES = 10
_CHUNK = 2**18
"""Values normalized at a time on the CPU, so that they stay in the cache."""


@dataclass(frozen=True)
class Transforms:
    """Augmentation and normalization of one split."""

    image_size: int
    train: bool
    crop: str = "random_resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    eval_resize: int = 256
    interpolation: str = "bilinear"
    pad: int = 4
    flip: float = 0.5
    trivial_augment: bool = False
    rand_augment: int = 0
    rand_magnitude: int = 9
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    erasing: float = 0.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @property
    def works_on_pixels(self) -> bool:
        """Whether a transform between cropping and normalization needs uint8 pixels."""
        return self.train and (self.trivial_augment or self.rand_augment > 0 or any(self.color_jitter))

    def scaled_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel, in gray levels (0 to 255)."""
        return [255 * m for m in self.mean], [255 * s for s in self.std]


@dataclass(frozen=True)
class CropParams:
    """Crop geometry of B encoded images, in pixels.

    Attributes:
        window: int64 [B, 4], (top, left, height, width) of the crop of the source image.
        resized: int64 [B, 2], (height, width) to which the window is resized.
        offset: int64 [B, 2], (top, left) of the final square crop in the resized window.
        flip: bool [B], whether to flip horizontally.
    """

    window: NDArray[np.int64]
    resized: NDArray[np.int64]
    offset: NDArray[np.int64]
    flip: NDArray[np.bool_]

    def take(self, part: slice) -> CropParams:
        """Geometry of some of the images."""
        return CropParams(self.window[part], self.resized[part], self.offset[part], self.flip[part])


def draw_crop_params(
    transforms: Transforms, seed: int, epoch: int, samples: NDArray[np.int64], sizes: NDArray[np.int64]
) -> CropParams:
    """Crop parameters of samples [B] whose images have `sizes` [B, 2], (height, width)."""
    count = len(samples)
    if not transforms.train:
        return _eval_crop_params(transforms, sizes)
    if transforms.crop == "random_resized":
        window = random_resized_windows(transforms, seed, epoch, samples, sizes)
    else:
        window = np.concatenate([np.zeros((count, 2), np.int64), sizes], axis=1)
    square = np.full((count, 2), transforms.image_size, dtype=np.int64)
    return CropParams(
        window, square, np.zeros((count, 2), np.int64), draw_flips(transforms, seed, epoch, samples)
    )


def draw_flips(
    transforms: Transforms, seed: int, epoch: int, samples: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether to flip each sample horizontally, bool [B]."""
    return uniform(seed, Stream.FLIP, epoch, samples) < transforms.flip


def random_resized_windows(
    transforms: Transforms, seed: int, epoch: int, samples: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Windows [B, 4] of torchvision's RandomResizedCrop: ten tries, then a central crop."""
    tries = np.arange(_TRIES)[:, None]
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    areas, ratios = uniform(
        seed, Stream.CROP, epoch, samples[None, None, :], tries, np.arange(2)[:, None, None]
    )
    low, high = transforms.crop_scale
    area = height * width * (low + (high - low) * areas)
    log_low, log_high = np.log(transforms.crop_ratio[0]), np.log(transforms.crop_ratio[1])
    ratio = np.exp(log_low + (log_high - log_low) * ratios)
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= sizes[:, 1]) & (h > 0) & (h <= sizes[:, 0])
    chosen = np.argmax(fits, axis=0)
    column = np.arange(len(samples))
    w, h = w[chosen, column], h[chosen, column]
    top = randint(sizes[:, 0] - h + 1, seed, Stream.CROP, epoch, samples, chosen, 2)
    left = randint(sizes[:, 1] - w + 1, seed, Stream.CROP, epoch, samples, chosen, 3)
    window = np.stack([top, left, h, w], axis=1)
    return np.where(fits.any(axis=0)[:, None], window, _fallback_windows(transforms, sizes))


def _fallback_windows(transforms: Transforms, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    height, width = sizes[:, 0], sizes[:, 1]
    low, high = transforms.crop_ratio
    in_ratio = width / height
    w = np.where(in_ratio > high, np.rint(height * high), width).astype(np.int64)
    h = np.where(in_ratio < low, np.rint(width / low), height).astype(np.int64)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)


def _eval_crop_params(transforms: Transforms, sizes: NDArray[np.int64]) -> CropParams:
    """Resize the shorter side to `eval_resize` and center-crop."""
    target = max(transforms.eval_resize, transforms.image_size)
    window, resized, offset = center_crop(sizes, target, transforms.image_size)
    return CropParams(window, resized, offset, np.zeros(len(sizes), dtype=bool))


@dataclass(frozen=True)
class Draws:
    """Random augmentation of B samples on the host.

    Attributes:
        ops: operations on the pixels, in the order in which they are applied.
        boxes: int64 [B, 4], erased boxes; None without erasing.
    """

    ops: tuple[OpParams, ...]
    boxes: NDArray[np.int64] | None

    def take(self, part: slice) -> Draws:
        """Augmentation of some of the samples."""
        return Draws(
            tuple(params.take(part) for params in self.ops),
            None if self.boxes is None else self.boxes[part],
        )


def draw_augmentation(transforms: Transforms, seed: int, epoch: int, samples: NDArray[np.int64]) -> Draws:
    """Draw the augmentation of samples [B]; those of many steps cost little more than those of one."""
    boxes, side = None, transforms.image_size
    if transforms.train and transforms.erasing > 0:
        boxes = draw_erasing(seed, epoch, samples, side, side, transforms.erasing)
    return Draws(tuple(_draw_ops(transforms, seed, epoch, samples)), boxes)


def _draw_ops(transforms: Transforms, seed: int, epoch: int, samples: NDArray[np.int64]) -> list[OpParams]:
    draws: list[OpParams] = []
    if not transforms.works_on_pixels:
        return draws
    if transforms.trivial_augment:
        draws.append(draw_trivial(seed, epoch, samples))
    count, level, side = transforms.rand_augment, transforms.rand_magnitude, transforms.image_size
    if count:
        draws += draw_rand(seed, epoch, samples, count, level, (side, side))
    if any(transforms.color_jitter):
        draws += draw_jitter(seed, epoch, samples, transforms.color_jitter)
    return draws


def finish(
    transforms: Transforms,
    images_bhwc: Tensor,
    seed: int,
    epoch: int,
    samples: NDArray[np.int64],
    draws: Draws | None = None,
) -> Tensor:
    """Augment and normalize decoded images on their device.

    Args:
        images_bhwc: uint8 [B, H, W, 3], cropped and flipped; or float32, already normalized.
        samples: int64 [B], sample numbers: the key of the random augmentation.
        draws: their ``draw_augmentation``, if it is known.

    Returns:
        float32 [B, 3, H, W], channels_last.
    """
    draws = draws or draw_augmentation(transforms, seed, epoch, samples)
    for params in draws.ops:
        images_bhwc = apply_ops(images_bhwc.permute(0, 3, 1, 2), params).permute(0, 2, 3, 1)
    if images_bhwc.dtype == torch.uint8:
        images_bhwc = _normalize(images_bhwc, transforms)
    normalized = images_bhwc.permute(0, 3, 1, 2)
    if draws.boxes is not None:
        normalized = apply_erasing(normalized, draws.boxes)
    return normalized.contiguous(memory_format=torch.channels_last)


def _normalize(images_bhwc: Tensor, transforms: Transforms) -> Tensor:
    """(images - 255 mean) / (255 std) as a new float32 tensor [B, H, W, 3]."""
    width, device = images_bhwc.shape[2], images_bhwc.device
    mean, scale = _row_constants(transforms.mean, transforms.std, width, device)
    if device.type != "cpu":
        numbers = images_bhwc.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        numbers.flatten(2).sub_(mean).mul_(scale)
        return numbers
    # NumPy in this thread, about 1 MiB at a time: the other cores are left to the decoder.
    numbers = torch.empty(images_bhwc.shape, dtype=torch.float32)
    pixels, rows = images_bhwc.contiguous().flatten(2).numpy(), numbers.flatten(2).numpy()
    offset, factor = mean.numpy(), scale.numpy()
    images_each = max(1, _CHUNK // max(1, rows[:1].size))
    for first in range(0, len(rows), images_each):
        part = rows[first : first + images_each]
        np.subtract(pixels[first : first + images_each], offset, out=part, dtype=np.float32)
        np.multiply(part, factor, out=part)
    return numbers


_constants: dict[tuple[tuple[float, ...], tuple[float, ...], int, torch.device], tuple[Tensor, Tensor]] = {}


def _row_constants(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Offset and factor, each [width * 3], cached per device so that no step copies them again."""
    key = (mean, std, width, device)
    if key not in _constants:
        offset = 255 * torch.tensor(mean, dtype=torch.float32)
        scale = torch.tensor(tuple(1 / (255 * s) for s in std), dtype=torch.float32)
        _constants[key] = (
            host_to_device(offset.repeat(width), device),
            host_to_device(scale.repeat(width), device),
        )
    return _constants[key]
