"""TrivialAugmentWide (Müller and Hutter, ICCV 2021): one operation per sample.

Operations and magnitudes are those of ``torchvision.transforms.v2.TrivialAugmentWide`` with its defaults (31
magnitudes).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import rng
from pipelines.augment_ops import Op, OpParams
from pipelines.rng import Stream

NUM_LEVELS = 31


class Levels(NamedTuple):
    """Draws per sample of a batch; all arrays are [B] int64."""

    op: NDArray[np.int64]
    """The operation, an ``Op``."""
    level: NDArray[np.int64]
    """Index of the magnitude, 0 to 30."""
    sign: NDArray[np.int64]
    """+1 or -1; operations whose magnitude has no sign ignore it."""

    def params(self) -> OpParams:
        """Operations with their magnitudes."""
        values = _MAGNITUDES[self.op, self.level]
        return OpParams(self.op, np.where(self.op <= Op.BRIGHTNESS, values * self.sign, values))


def draw_trivial(seed: int, epoch: int, indices: NDArray[np.int64]) -> OpParams:
    """Draw an operation for the samples ``indices`` [B], keyed by (seed, epoch, sample)."""
    return draw_levels(seed, epoch, indices).params()


def draw_levels(seed: int, epoch: int, indices: NDArray[np.int64]) -> Levels:
    """Draw operation, magnitude and sign for the samples ``indices`` [B], keyed by (seed, epoch, sample)."""
    key = (seed, Stream.TRIVIAL, epoch, indices)
    return Levels(
        op=rng.randint(len(Op), *key, 0),
        level=rng.randint(NUM_LEVELS, *key, 1),
        sign=1 - 2 * rng.randint(2, *key, 2),
    )


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
