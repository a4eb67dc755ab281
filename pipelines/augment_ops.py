"""Augmentation operations on batches of uint8 images on the device, one operation per sample.

Operations and rounding are those of ``torchvision.transforms.v2`` (nearest interpolation, fill 0) on uint8 tensors.
The operation and magnitude of each sample are drawn on the host, so the batch is grouped by operation without
synchronizing. Every step is integer arithmetic or rounded separately, never fused or reordered depending on vector
length: the result for a sample is bit-identical in every batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.batch import host_to_device
from pipelines.hue import shift_hue


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


HUE = 14
"""Shift of the hue, an operation of color jitter; TrivialAugment and RandAugment do not draw it."""


@dataclass(frozen=True)
class OpParams:
    """Operation per sample of a batch with its magnitude, on the host."""

    op: NDArray[np.int64]
    """[B] operation, an ``Op`` or ``HUE``."""
    magnitude: NDArray[np.float64]
    """[B] signed magnitude, in torchvision's units."""

    def take(self, index: NDArray[np.int64] | slice) -> OpParams:
        """Parameters of some of the samples."""
        return OpParams(self.op[index], self.magnitude[index])


def apply_ops(images: Tensor, params: OpParams) -> Tensor:
    """Augment a batch by one operation per sample.

    Args:
        images: uint8 [B, 3, H, W] in any memory format, not modified.
        params: B operations from ``draw_trivial``, ``draw_rand`` or ``draw_jitter``.

    Returns:
        A new uint8 [B, 3, H, W] on the same device; channels_last if ``images`` was, else contiguous.

    Raises:
        ValueError: the images are not uint8 RGB, or their number is not the number of operations.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"augmentation needs uint8 images [B, 3, H, W], got {images.dtype} {tuple(images.shape)}; "
            "apply it before the images are normalized"
        )
    if len(params.op) != len(images):
        raise ValueError(
            f"{len(params.op)} operations were drawn for {len(images)} images; draw one for each"
        )
    if not len(images):
        return images.clone()
    plan = _Plan.of(params, images.shape[2], images.shape[3], images.device)
    pixels = images.permute(0, 2, 3, 1).contiguous().index_select(0, plan.order)
    block_pixels = _CPU_BLOCK if images.device.type == "cpu" else _GPU_BLOCK
    block = max(1, block_pixels // (images.shape[2] * images.shape[3]))
    for first, last, transform in _FAMILIES:
        low, high = (int(bound) for bound in np.searchsorted(plan.op, (first, last + 1)))
        for start in range(low, high, block):
            part = slice(start, min(start + block, high))
            transform(pixels[part], plan, part)
    augmented = pixels.index_select(0, plan.inverse).permute(0, 3, 1, 2)
    return augmented if images.is_contiguous(memory_format=torch.channels_last) else augmented.contiguous()


@dataclass(frozen=True)
class _Plan:
    """Numbers of a batch in the order of its operations, on the device except `op`, in one copy.

    Every column has a row per image, also for images whose operation does not use it.
    """

    op: NDArray[np.int64]
    """[B], sorted, on the host."""
    order: Tensor
    """int64 [B], position in the batch of each sorted image."""
    inverse: Tensor
    """int64 [B], sorted position of each image of the batch."""
    weights: Tensor
    """float64 [B, 2, 1, 1, 1], weights of an image and of its degenerate version, rounded to float32. For ``HUE`` the
    first is the shift."""
    theta: Tensor
    """float32 [B, 2, 3, 1], see ``_inverse_affine``."""
    curves: Tensor
    """uint8 [B, 256], see ``_fixed_curves``."""

    @classmethod
    def of(cls, params: OpParams, height: int, width: int, device: torch.device) -> _Plan:
        order = np.argsort(params.op, kind="stable")
        params = params.take(order)
        count, op, magnitudes = len(order), params.op, params.magnitude
        table = np.zeros((count, 2 + 2 + 3 + 32), dtype=np.int64)
        table[:, 0], table[:, 1] = order, np.argsort(order)
        weight = 1.0 + magnitudes
        weight_pairs = np.stack([np.where(op == HUE, magnitudes, weight), 1.0 - weight], axis=1)
        table.view(np.float64)[:, 2:4] = weight_pairs.astype(np.float32)
        low, high = np.searchsorted(op, (Op.SHEAR_X, Op.COLOR))
        theta = table.view(np.float32)[low:high, 8:14]
        theta[:] = _inverse_affine(op[low:high], magnitudes[low:high], height, width).reshape(-1, 6)
        low, high = np.searchsorted(op, (Op.BRIGHTNESS, Op.AUTOCONTRAST))
        curves = table.view(np.uint8)[low:high, 56:]
        curves[:] = _fixed_curves(op[low:high], magnitudes[low:high])
        on_device = host_to_device(torch.from_numpy(table), device)
        return cls(
            op,
            on_device[:, 0],
            on_device[:, 1],
            on_device.view(torch.float64)[:, 2:4].view(-1, 2, 1, 1, 1),
            on_device.view(torch.float32)[:, 8:14].view(-1, 2, 3, 1),
            on_device.view(torch.uint8)[:, 56:],
        )


# Pixels transformed at a time: on a CPU they fit its cache, on a GPU they need 0.5 GB of indices.
_CPU_BLOCK = 2**18
_GPU_BLOCK = 2**24


# Geometric operations. From here on, pixels are [n, H, W, 3].


def _warp(pixels: Tensor, plan: _Plan, part: slice) -> None:
    """Shear, translate or rotate: each output pixel takes the nearest source pixel, 0 outside."""
    count, height, width, _ = pixels.shape
    grid = _Grid.of(height, width, pixels.device)
    column, row = _source_positions(plan.theta[part], grid).clamp_(grid.low, grid.high).int().unbind(1)
    # Positions in images with a black border of one pixel.
    stride, size = width + 2, (height + 2) * (width + 2)
    first = torch.arange(stride + 1, count * size + 1, size, dtype=torch.int32, device=pixels.device)
    source = torch.add(column, row, alpha=stride).add_(first.view(-1, 1, 1))
    bordered = torch.nn.functional.pad(pixels, (0, 0, 1, 1, 1, 1))
    torch.index_select(bordered.view(-1, 3), 0, source.view(-1), out=pixels.view(-1, 3))


@dataclass(frozen=True)
class _Grid:
    """Constants of an image size on a device."""

    x: Tensor
    """[W], from the center."""
    y: Tensor
    """[H], from the center."""
    half: Tensor
    """[2, 1, 1], half the width and height."""
    low: Tensor
    high: Tensor
    """[2, 1, 1], the column and row outside the image."""

    @staticmethod
    @lru_cache(maxsize=8)
    def of(height: int, width: int, device: torch.device) -> _Grid:
        size = torch.tensor([width, height], dtype=torch.float32).view(2, 1, 1)
        x, y = (torch.arange(side) + (1 - side) * 0.5 for side in (width, height))
        return _Grid(*(host_to_device(t, device) for t in (x, y, size * 0.5, size * 0 - 1, size)))


def _source_positions(theta_n231: Tensor, grid: _Grid) -> Tensor:
    """[n, 2, H, W] source column and row of each output pixel, as integers in float32.

    Ties between two pixels are common in shears and decided by rounding, so the operations are torchvision's:
    separate float32 products and sums, in this order.
    """
    per_x, per_y, shift = theta_n231.unbind(2)
    position = (per_x * grid.x).unsqueeze(2) + (per_y * grid.y).unsqueeze(3)
    return position.add_(shift.unsqueeze(3)).add_(1.0).mul_(grid.half).sub_(0.5).round_()


def _inverse_affine(
    op: NDArray[np.int64], magnitudes: NDArray[np.float64], height: int, width: int
) -> NDArray[np.float32]:
    """[n, 2, 3] matrices from output pixels (from the center) to source positions (in units of half the image size).

    Shears keep the top left corner fixed, rotations the center.
    """
    pairs = zip(op.tolist(), magnitudes.tolist(), strict=True)
    matrices = [_inverse_matrix(one, magnitude, height, width) for one, magnitude in pairs]
    half_size = np.array([[width * 0.5], [height * 0.5]], dtype=np.float32)
    return np.array(matrices, dtype=np.float32).reshape(-1, 2, 3) / half_size


@lru_cache(maxsize=4096)
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


# Blends: weighted sums of the image and a degenerate version of it.


def _blend(pixels: Tensor, plan: _Plan, part: slice) -> None:
    """Color (blended with gray) and contrast (with the mean gray value), truncated as in torchvision.

    The mean is exact in every order of summation: the gray values are integers.
    """
    planes = _planes(pixels)
    other = _gray(planes)
    contrast = int(np.searchsorted(plan.op[part], Op.CONTRAST))
    if contrast < len(pixels):
        gray = other[contrast:]
        total = gray.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
        gray.copy_(total / (pixels.shape[1] * pixels.shape[2]))
    weight, rest = plan.weights[part].unbind(1)
    blended = _fused(torch.mul(planes, weight.float()), other, rest).clamp_(0, 255).to(torch.uint8)
    torch.stack(blended.unbind(1), dim=-1, out=pixels)


def _sharpness(pixels: Tensor, plan: _Plan, part: slice) -> None:
    """Move away from the 3 x 3 mean with center weight 5/13; border pixels stay unchanged."""
    if min(pixels.shape[1:3]) <= 2:
        return
    values = pixels.permute(0, 3, 1, 2).float()
    center = values[:, :, 1:-1, 1:-1]
    box = torch.nn.functional.avg_pool2d(values, 3, stride=1, divisor_override=1)  # exact sums of integers
    # Multiples of 1/13 are never within 1/26 of a rounding tie, so every division gives the same integer.
    smooth = box.add_(center, alpha=4).div_(13.0).round_()
    rest = plan.weights[part].select(1, 1)
    sharpened = _fused(center, smooth.sub_(center), rest).clamp_(0, 255)
    pixels[:, 1:-1, 1:-1].copy_(sharpened.permute(0, 2, 3, 1))


def _planes(pixels: Tensor) -> Tensor:
    """[n, 3, H, W] contiguous, so that a gray image broadcasts over long rows instead of 3 channels."""
    return pixels.permute(0, 3, 1, 2).contiguous()


def _gray(planes: Tensor) -> Tensor:
    """[n, 1, H, W] ITU-R 601-2 luma as integers in float32, rounded down where torchvision rounds down."""
    red, green, blue = planes.split(1, dim=1)
    weights = _gray_weights(planes.device)
    return _fused(_fused(torch.mul(red, 0.2989), green, weights[0]), blue, weights[1]).floor_()


@lru_cache(maxsize=8)
def _gray_weights(device: torch.device) -> list[Tensor]:
    """Float64 weights of green and blue, rounded to float32."""
    weights = np.array([0.587, 0.114], dtype=np.float32).astype(np.float64)
    return list(host_to_device(torch.from_numpy(weights), device).unbind())


def _fused(base: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    """base + weight * other rounded once to float32: the fused step of ``Tensor.add_(other, alpha=weight)``.

    Computed in float64, the type of `weight`, where the product is exact: torch fuses full SIMD vectors but not the
    remainder.
    """
    return torch.add(torch.mul(other, weight), base).float()


# Tone curves: a table of 256 values per sample and channel.


def _tone(pixels: Tensor, plan: _Plan, part: slice) -> None:
    count, height, width, _ = pixels.shape
    fixed, equalized = (int(at) for at in np.searchsorted(plan.op[part], (Op.AUTOCONTRAST, Op.EQUALIZE)))
    index = pixels.view(count, height, width * 3).int()
    index.add_(_table_starts(-(-count // _TABLES) * _TABLES, width, pixels.device)[:count])
    curves: list[Tensor] = []
    if fixed > 0:
        curves.append(plan.curves[part][:fixed].unsqueeze(1).expand(-1, 3, -1))
    if fixed < count:
        at_most = _cumulative_histogram(index[fixed:], count)[fixed:]
        if fixed < equalized:
            curves.append(_autocontrast_curves(at_most[: equalized - fixed], height * width))
        if equalized < count:
            curves.append(_equalize_curves(at_most[equalized - fixed :], height * width))
    torch.index_select(torch.cat(curves).view(-1), 0, index.view(-1), out=pixels.view(-1))


_TABLES = 32
"""The starts of tables are kept for multiples of this number of images."""


@lru_cache(maxsize=64)
def _table_starts(count: int, width: int, device: torch.device) -> Tensor:
    """[n, 1, 3W] int32: start of the table of each value's sample and channel among 3n tables of 256."""
    tables = torch.arange(count * 3, dtype=torch.int32).mul_(256)
    return host_to_device(tables.view(count, 1, 3).repeat(1, 1, width), device)


def _fixed_curves(op: NDArray[np.int64], magnitudes: NDArray[np.float64]) -> NDArray[np.uint8]:
    """[n, 256] curves that do not depend on the image."""
    value = np.arange(256, dtype=np.float32)
    m = magnitudes[:, None]
    brightness = np.clip(value * (1.0 + m).astype(np.float32), 0, 255).astype(np.uint8)
    dropped_bits = np.where(op == Op.POSTERIZE, 8 - magnitudes, 0).astype(np.int64)[:, None]
    posterize = ((np.arange(256) >> dropped_bits) << dropped_bits).astype(np.uint8)
    solarize = np.where(value >= (255.0 * m).astype(np.float32), 255 - value, value).astype(np.uint8)
    op = op[:, None]
    return np.where(op == Op.BRIGHTNESS, brightness, np.where(op == Op.POSTERIZE, posterize, solarize))


def _cumulative_histogram(index: Tensor, count: int) -> Tensor:
    """[count, 3, 256] int64: number of pixels of a channel that are at most v; index = 768·sample + 256·channel + v."""
    counts = torch.zeros(count * 768, dtype=torch.int32, device=index.device)
    one = _constants(index.device).one
    counts.scatter_add_(0, index.view(-1).long(), one.expand(index.numel()))
    return counts.view(-1, 3, 256).cumsum(-1)


def _autocontrast_curves(at_most: Tensor, num_pixels: int) -> Tensor:
    """Stretch each channel to the full range; a constant channel stays unchanged."""
    lowest = (at_most == 0).sum(-1, keepdim=True, dtype=torch.float32)
    spread = (at_most < num_pixels).sum(-1, keepdim=True, dtype=torch.float32).sub_(lowest)
    constant = spread == 0
    scale = spread.mul_(1.0 / 255).masked_fill_(constant, 1.0)
    stretched = (_constants(at_most.device).values - lowest.masked_fill_(constant, 0.0)).div_(scale)
    return stretched.clamp_(0, 255).to(torch.uint8)


def _equalize_curves(at_most: Tensor, num_pixels: int) -> Tensor:
    """Equalize each channel's histogram by Pillow's integer rule; one with too few values stays unchanged."""
    below_highest = at_most.masked_fill(at_most == num_pixels, 0).amax(-1, keepdim=True)
    step = below_highest // 255
    flat = (at_most[..., :-1] + step // 2) // step.clamp(min=1)
    equalized = torch.nn.functional.pad(flat.clamp_(0, 255), (1, 0))
    return torch.where(step == 0, _constants(at_most.device).identity, equalized).to(torch.uint8)


@dataclass(frozen=True)
class _Constants:
    """Constants on a device: 1 as int32 [1], and 0 to 255 as float32 and int64."""

    one: Tensor
    values: Tensor
    identity: Tensor


@lru_cache(maxsize=8)
def _constants(device: torch.device) -> _Constants:
    identity = torch.arange(256)
    on_host = (torch.ones(1, dtype=torch.int32), identity.float(), identity)
    return _Constants(*(host_to_device(tensor, device) for tensor in on_host))


def _hue(pixels: Tensor, plan: _Plan, part: slice) -> None:
    pixels.copy_(shift_hue(pixels, plan.weights[part].select(1, 0).view(-1).float()))


_FAMILIES: tuple[tuple[int, int, Callable[[Tensor, _Plan, slice], None]], ...] = (
    (Op.SHEAR_X, Op.ROTATE, _warp),
    (Op.COLOR, Op.CONTRAST, _blend),
    (Op.SHARPNESS, Op.SHARPNESS, _sharpness),
    (Op.BRIGHTNESS, Op.EQUALIZE, _tone),
    (HUE, HUE, _hue),
)
