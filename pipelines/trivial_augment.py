"""TrivialAugmentWide (Müller and Hutter, ICCV 2021) for a batch on the device, one operation per sample.

Operations, magnitudes and rounding are those of ``torchvision.transforms.v2.TrivialAugmentWide`` with its
defaults (31 magnitudes, nearest interpolation, fill 0) on uint8 tensors. The operation and magnitude of each
sample are drawn on the host, so the batch is grouped by operation without synchronizing. Every step is integer
arithmetic or rounded separately, never fused or reordered depending on vector length: the result for a sample is
bit-identical in every batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import rng
from pipelines.batch import host_to_device
from pipelines.rng import Stream

NUM_LEVELS = 31


class Op(IntEnum):
    """The operations, grouped by family. Never change or reuse a value: batches would change."""

    IDENTITY = 0
    SHEAR_X = 1
    SHEAR_Y = 2
    TRANSLATE_X = 3
    TRANSLATE_Y = 4
    ROTATE = 5
    COLOR = 6
    CONTRAST = 7
    SHARPNESS = 8
    BRIGHTNESS = 9
    POSTERIZE = 10
    SOLARIZE = 11
    AUTOCONTRAST = 12
    EQUALIZE = 13


@dataclass(frozen=True)
class TrivialParams:
    """Operation per sample of a batch; all arrays are [B] int64 on the host."""

    op: NDArray[np.int64]
    """The operation, an ``Op``."""
    level: NDArray[np.int64]
    """Index of the magnitude, 0 to 30."""
    sign: NDArray[np.int64]
    """+1 or -1; operations whose magnitude has no sign ignore it."""

    def take(self, index: NDArray[np.int64] | slice) -> TrivialParams:
        """Parameters of some of the samples."""
        return TrivialParams(self.op[index], self.level[index], self.sign[index])

    def magnitudes(self) -> NDArray[np.float64]:
        """[B] signed magnitudes, in torchvision's units."""
        values = _MAGNITUDES[self.op, self.level]
        return np.where(self.op <= Op.BRIGHTNESS, values * self.sign, values)


def draw_trivial(seed: int, epoch: int, indices: NDArray[np.int64]) -> TrivialParams:
    """Draw operation, magnitude and sign for the samples ``indices`` [B], keyed by (seed, epoch, sample)."""
    key = (seed, Stream.TRIVIAL, epoch, indices)
    return TrivialParams(
        op=rng.randint(len(Op), *key, 0),
        level=rng.randint(NUM_LEVELS, *key, 1),
        sign=1 - 2 * rng.randint(2, *key, 2),
    )


def apply_trivial(images: Tensor, params: TrivialParams) -> Tensor:
    """Augment a batch.

    Args:
        images: uint8 [B, 3, H, W] in any memory format, not modified.
        params: B operations from ``draw_trivial``.

    Returns:
        A new uint8 [B, 3, H, W] on the same device; channels_last if ``images`` was, else contiguous.

    Raises:
        ValueError: the images are not uint8 RGB, or their number is not the number of operations.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"TrivialAugment needs uint8 images [B, 3, H, W], got {images.dtype} {tuple(images.shape)}; "
            "apply it before the images are normalized"
        )
    if len(params.op) != len(images):
        raise ValueError(
            f"{len(params.op)} operations were drawn for {len(images)} images; draw one for each"
        )
    order = np.argsort(params.op, kind="stable")
    params = params.take(order)
    index = _to_device(np.stack([order, np.argsort(order)]), images.device)
    pixels = images.permute(0, 2, 3, 1).contiguous().index_select(0, index[0])
    block_pixels = _CPU_BLOCK if images.device.type == "cpu" else _GPU_BLOCK
    block = max(1, block_pixels // (images.shape[2] * images.shape[3]))
    for first, last, transform in _FAMILIES:
        low, high = (int(bound) for bound in np.searchsorted(params.op, (first, last + 1)))
        for start in range(low, high, block):
            part = slice(start, min(start + block, high))
            pixels[part] = transform(pixels[part], params.take(part))
    augmented = pixels.index_select(0, index[1]).permute(0, 3, 1, 2)
    return augmented if images.is_contiguous(memory_format=torch.channels_last) else augmented.contiguous()


def _to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return host_to_device(torch.from_numpy(array), device)


def _magnitude_table() -> NDArray[np.float64]:
    """[14, 31] magnitudes as torchvision computes them, in float32, so that the last bit agrees."""
    unit = torch.linspace(0.0, 0.99, NUM_LEVELS)
    none = torch.zeros(NUM_LEVELS)
    pixels = torch.linspace(0.0, 32.0, NUM_LEVELS)
    levels = {
        Op.SHEAR_X: unit,
        Op.SHEAR_Y: unit,
        Op.TRANSLATE_X: pixels.trunc(),
        Op.TRANSLATE_Y: pixels.trunc(),
        Op.ROTATE: torch.linspace(0.0, 135.0, NUM_LEVELS),
        Op.COLOR: unit,
        Op.CONTRAST: unit,
        Op.SHARPNESS: unit,
        Op.BRIGHTNESS: unit,
        Op.POSTERIZE: (8 - torch.arange(NUM_LEVELS) / ((NUM_LEVELS - 1) / 6)).round(),
        Op.SOLARIZE: torch.linspace(1.0, 0.0, NUM_LEVELS),
    }
    return torch.stack([levels.get(op, none) for op in Op]).double().numpy()


_MAGNITUDES = _magnitude_table()

# Pixels transformed at a time: on a CPU they fit its cache, on a GPU they need 0.5 GB of indices.
_CPU_BLOCK = 2**18
_GPU_BLOCK = 2**24


# Geometric operations. From here on, pixels are [n, H, W, 3].


def _warp(pixels: Tensor, params: TrivialParams) -> Tensor:
    """Shear, translate or rotate: each output pixel takes the nearest source pixel, 0 outside."""
    count, height, width, _ = pixels.shape
    theta = _to_device(_inverse_affine(params, height, width), pixels.device)
    x = torch.arange(width, device=pixels.device) + (1 - width) * 0.5
    y = torch.arange(height, device=pixels.device) + (1 - height) * 0.5
    column = _source_coordinate(theta[:, 0], x, y, width)
    row = _source_coordinate(theta[:, 1], x, y, height)
    outside = (column < 0).logical_or_(column >= width).logical_or_(row < 0).logical_or_(row >= height)
    first = torch.arange(count, dtype=torch.int32, device=pixels.device).view(-1, 1, 1) * (height * width)
    source = (
        row.int().mul_(width).add_(column.int()).add_(first).masked_fill_(outside, count * height * width)
    )
    black = pixels.new_zeros(1, 3)
    return torch.cat((pixels.view(-1, 3), black)).index_select(0, source.view(-1).long()).view_as(pixels)


def _inverse_affine(params: TrivialParams, height: int, width: int) -> NDArray[np.float32]:
    """[n, 2, 3] matrices from output pixels (from the center) to source positions (in units of half the image size).

    Shears keep the top left corner fixed, rotations the center.
    """
    matrices = [
        _inverse_matrix(int(op), float(magnitude), height, width)
        for op, magnitude in zip(params.op, params.magnitudes(), strict=True)
    ]
    half_size = np.array([[width * 0.5], [height * 0.5]], dtype=np.float32)
    return np.array(matrices, dtype=np.float32).reshape(-1, 2, 3) / half_size


def _inverse_matrix(op: int, magnitude: float, height: int, width: int) -> list[float]:
    """2 x 3 matrix from output to source, in pixels from the center.

    As in torchvision, a shear is converted to an angle and back and its shift is a difference: the float32 rounding
    of exact ties depends on it.
    """
    if op == Op.TRANSLATE_X:
        return [1.0, 0.0, -magnitude, 0.0, 1.0, 0.0]
    if op == Op.TRANSLATE_Y:
        return [1.0, 0.0, 0.0, 0.0, 1.0, -magnitude]
    if op == Op.ROTATE:
        angle = math.radians(magnitude % 360.0)
        return [math.cos(angle), -math.sin(angle), 0.0, math.sin(angle), math.cos(angle), 0.0]
    angle = math.radians(math.degrees(math.atan(magnitude)))
    left, top = -width * 0.5, -height * 0.5
    if op == Op.SHEAR_X:
        slope = math.tan(angle)
        return [1.0, slope, left - left - slope * top, 0.0, 1.0, 0.0]
    slope = math.sin(angle) / math.cos(angle)
    return [1.0, 0.0, 0.0, slope, 1.0, top - slope * left - top]


def _source_coordinate(theta_n3: Tensor, x: Tensor, y: Tensor, size: int) -> Tensor:
    """[n, H, W] source column (or row) of each output pixel, as integers in float32.

    Ties between two pixels are common in shears and decided by rounding, so the operations are torchvision's:
    separate float32 products and sums, in this order.
    """
    along_x = theta_n3[:, :1] * x
    along_y = theta_n3[:, 1:2] * y
    grid = (along_x.unsqueeze(1) + along_y.unsqueeze(2)).add_(theta_n3[:, 2].view(-1, 1, 1))
    return grid.add_(1.0).mul_(size * 0.5).sub_(0.5).round_()


# Blends: weighted sums of the image and a degenerate version of it.


def _color(pixels: Tensor, params: TrivialParams) -> Tensor:
    planes = _planes(pixels)
    return _blend(planes, _gray(planes), params)


def _contrast(pixels: Tensor, params: TrivialParams) -> Tensor:
    """The mean is exact in every order of summation: the gray values are integers."""
    planes = _planes(pixels)
    total = _gray(planes).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    return _blend(planes, (total / (pixels.shape[1] * pixels.shape[2])).float(), params)


def _sharpness(pixels: Tensor, params: TrivialParams) -> Tensor:
    """Move away from the 3 x 3 mean with center weight 5/13; border pixels stay unchanged."""
    if min(pixels.shape[1:3]) <= 2:
        return pixels
    rest = _weights(params, pixels.device)[1]
    values = pixels.float()
    center = values[:, 1:-1, 1:-1]
    rows = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    box = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    # Multiples of 1/13 are never within 1/26 of a rounding tie, so every division gives the same integer.
    smooth = box.add_(center, alpha=4).div_(13.0).round_()
    sharpened = pixels.clone()
    sharpened[:, 1:-1, 1:-1] = _fused(center, smooth.sub_(center), rest).clamp_(0, 255)
    return sharpened


def _planes(pixels: Tensor) -> Tensor:
    """[n, 3, H, W] contiguous, so that a gray image broadcasts over long rows instead of 3 channels."""
    return pixels.permute(0, 3, 1, 2).contiguous()


def _blend(planes: Tensor, other: Tensor, params: TrivialParams) -> Tensor:
    """[n, H, W, 3] uint8, truncated as in torchvision."""
    weight, rest = _weights(params, planes.device)
    blended = _fused(torch.mul(planes, weight.float()), other, rest).clamp_(0, 255).to(torch.uint8)
    return torch.stack(blended.unbind(1), dim=-1)


def _gray(planes: Tensor) -> Tensor:
    """[n, 1, H, W] ITU-R 601-2 luma as integers in float32, rounded down where torchvision rounds down."""
    red, green, blue = planes.split(1, dim=1)
    weights = _gray_weights(planes.device)
    return _fused(_fused(torch.mul(red, 0.2989), green, weights[0]), blue, weights[1]).floor_()


@cache
def _gray_weights(device: torch.device) -> Tensor:
    """Float64 [2, 1, 1, 1, 1] weights of green and blue, rounded to float32."""
    weights = np.array([0.587, 0.114], dtype=np.float32).astype(np.float64)
    return _to_device(weights, device).view(2, 1, 1, 1, 1)


def _weights(params: TrivialParams, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights of the image and of its degenerate version, float64 [n, 1, 1, 1] each, rounded to float32."""
    weight = 1.0 + params.magnitudes()
    weights = np.stack([weight, 1.0 - weight]).astype(np.float32).astype(np.float64)
    on_device = _to_device(weights, device).view(2, -1, 1, 1, 1)
    return on_device[0], on_device[1]


def _fused(base: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """base + weight * other rounded once to float32: the fused step of ``Tensor.add_(other, alpha=weight)``.

    Computed in float64, the type of `weight`, where the product is exact: torch fuses full SIMD vectors but not the
    remainder.
    """
    return torch.add(torch.mul(other, weight), base).float()


# Tone curves: a table of 256 values per sample and channel.


def _tone(pixels: Tensor, params: TrivialParams) -> Tensor:
    count, height, width, _ = pixels.shape
    fixed, equalized = (int(bound) for bound in np.searchsorted(params.op, (Op.AUTOCONTRAST, Op.EQUALIZE)))
    index = pixels.view(count, height, width * 3).int()
    index.add_(_table_starts(count, width, pixels.device))
    curves = torch.empty(count, 3, 256, dtype=torch.uint8, device=pixels.device)
    if fixed > 0:
        curves[:fixed] = _to_device(_fixed_curves(params.take(slice(fixed))), pixels.device).unsqueeze(1)
    if fixed < count:
        at_most = _cumulative_histogram(index[fixed:] - fixed * 768)
        curves[fixed:equalized] = _autocontrast_curves(at_most[: equalized - fixed], height * width)
        curves[equalized:] = _equalize_curves(at_most[equalized - fixed :], height * width)
    return curves.view(-1).index_select(0, index.view(-1)).view_as(pixels)


def _table_starts(count: int, width: int, device: torch.device) -> Tensor:
    """[n, 1, 3W] int32: start of the table of each value's sample and channel among 3n tables of 256."""
    tables = torch.arange(count * 3, dtype=torch.int32, device=device).mul_(256)
    return tables.view(count, 1, 3).repeat(1, 1, width)


def _fixed_curves(params: TrivialParams) -> NDArray[np.uint8]:
    """[n, 256] curves that do not depend on the image."""
    value = np.arange(256, dtype=np.float32)
    m = params.magnitudes()[:, None]
    brightness = np.clip(value * (1.0 + m).astype(np.float32), 0, 255).astype(np.uint8)
    dropped_bits = np.where(params.op == Op.POSTERIZE, 8 - params.magnitudes(), 0).astype(np.int64)[:, None]
    posterize = ((np.arange(256) >> dropped_bits) << dropped_bits).astype(np.uint8)
    solarize = np.where(value >= (255.0 * m).astype(np.float32), 255 - value, value).astype(np.uint8)
    op = params.op[:, None]
    return np.where(op == Op.BRIGHTNESS, brightness, np.where(op == Op.POSTERIZE, posterize, solarize))


def _cumulative_histogram(index: Tensor) -> Tensor:
    """[n, 3, 256] int64: number of pixels of a channel that are at most v; index = 768·sample + 256·channel + v."""
    counts = torch.zeros(len(index) * 768, dtype=torch.int32, device=index.device)
    one = torch.ones(1, dtype=torch.int32, device=index.device)
    counts.scatter_add_(0, index.view(-1).long(), one.expand(index.numel()))
    return counts.view(-1, 3, 256).cumsum(-1)


def _autocontrast_curves(at_most: Tensor, num_pixels: int) -> Tensor:
    """Stretch each channel to the full range; a constant channel stays unchanged."""
    lowest = (at_most == 0).sum(-1, keepdim=True).float()
    highest = (at_most < num_pixels).sum(-1, keepdim=True).float()
    constant = highest == lowest
    scale = ((highest - lowest) * (1.0 / 255)).masked_fill_(constant, 1.0)
    value = torch.arange(256, dtype=torch.float32, device=at_most.device)
    stretched = (value - lowest.masked_fill_(constant, 0.0)) / scale
    return stretched.clamp_(0, 255).to(torch.uint8)


def _equalize_curves(at_most: Tensor, num_pixels: int) -> Tensor:
    """Equalize each channel's histogram by Pillow's integer rule; one with too few values stays unchanged."""
    below_highest = at_most.masked_fill(at_most == num_pixels, 0).amax(-1, keepdim=True)
    step = below_highest // 255
    flat = (at_most[..., :-1] + step // 2) // step.clamp(min=1)
    equalized = torch.nn.functional.pad(flat.clamp_(0, 255), (1, 0))
    identity = torch.arange(256, device=at_most.device)
    return torch.where(step == 0, identity, equalized).to(torch.uint8)


_FAMILIES: tuple[tuple[Op, Op, Callable[[Tensor, TrivialParams], Tensor]], ...] = (
    (Op.SHEAR_X, Op.ROTATE, _warp),
    (Op.COLOR, Op.COLOR, _color),
    (Op.CONTRAST, Op.CONTRAST, _contrast),
    (Op.SHARPNESS, Op.SHARPNESS, _sharpness),
    (Op.BRIGHTNESS, Op.EQUALIZE, _tone),
)
