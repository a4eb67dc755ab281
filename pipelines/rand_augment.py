"""RandAugment (Cubuk et al., CVPR workshops 2020): several operations per sample, all of one magnitude.

Operations, magnitudes and rounding are those of ``torchvision.transforms.v2.RandAugment`` with its defaults (31
magnitudes, nearest interpolation, fill 0). Each sample draws its own operations.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import rng
from pipelines.augment_ops import Op, OpParams
from pipelines.rng import Stream
from pipelines.trivial_augment import NUM_LEVELS


def draw_rand(
    seed: int, epoch: int, indices: NDArray[np.int64], count: int, level: int, size: tuple[int, int]
) -> list[OpParams]:
    """Draw `count` operations per sample, to be applied in this order, keyed by (seed, epoch, sample).

    Args:
        indices: int64 [B], sample numbers.
        level: index of the magnitude of all operations, 0 to 30.
        size: (height, width) of the images, of which the largest translation is a fraction.
    """
    magnitudes = _magnitudes(size)[:, level]
    draws: list[OpParams] = []
    for number in range(count):
        key = (seed, Stream.RAND_AUGMENT, epoch, indices, number)
        op = rng.randint(len(Op), *key, 0)
        sign = np.where(op <= Op.BRIGHTNESS, 1 - 2 * rng.randint(2, *key, 1), 1)
        draws.append(OpParams(op, magnitudes[op] * sign))
    return draws


@cache
def _magnitudes(size: tuple[int, int]) -> NDArray[np.float64]:
    """[14, 31] magnitudes as torchvision computes them, in float32, so that the last bit agrees."""
    height, width = size
    blend = torch.linspace(0.0, 0.9, NUM_LEVELS)
    slope = torch.linspace(0.0, 0.3, NUM_LEVELS)
    levels = {
        Op.SHEAR_X: slope,
        Op.SHEAR_Y: slope,
        Op.TRANSLATE_X: torch.linspace(0.0, 150.0 / 331.0 * width, NUM_LEVELS).trunc(),
        Op.TRANSLATE_Y: torch.linspace(0.0, 150.0 / 331.0 * height, NUM_LEVELS).trunc(),
        Op.ROTATE: torch.linspace(0.0, 30.0, NUM_LEVELS),
        Op.COLOR: blend,
        Op.CONTRAST: blend,
        Op.SHARPNESS: blend,
        Op.BRIGHTNESS: blend,
        Op.POSTERIZE: (8 - torch.arange(NUM_LEVELS) / ((NUM_LEVELS - 1) / 4)).round(),
        Op.SOLARIZE: torch.linspace(1.0, 0.0, NUM_LEVELS),
    }
    none = torch.zeros(NUM_LEVELS)
    return torch.stack([levels.get(op, none) for op in Op]).double().numpy()
