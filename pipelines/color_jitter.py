"""Color jitter: brightness, contrast, saturation and hue of each sample change at random, in random order.

Ranges, operations and rounding are those of ``torchvision.transforms.v2.ColorJitter`` on uint8 images.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from pipelines import rng
from pipelines.augment_ops import HUE, Op, OpParams
from pipelines.rng import Stream

Strengths = tuple[float, float, float, float]
"""Largest changes of brightness, contrast, saturation and hue."""

_OPS = np.array([Op.BRIGHTNESS, Op.CONTRAST, Op.COLOR, HUE], dtype=np.int64)


def draw_jitter(seed: int, epoch: int, indices: NDArray[np.int64], strengths: Strengths) -> list[OpParams]:
    """Draw one operation per strength above 0 for each sample, to be applied in this order.

    The draws are keyed by (seed, epoch, sample). A strength s scales brightness, contrast or saturation by a factor
    in [max(0, 1 - s), 1 + s], and shifts the hue by a value in [-s, s], in turns of the color circle.

    Args:
        indices: int64 [B], sample numbers.
    """
    active = [kind for kind, strength in enumerate(strengths) if strength > 0]
    key = (seed, Stream.COLOR_JITTER, epoch, indices)
    orders = np.array(list(itertools.permutations(active)), dtype=np.int64)
    order = orders[rng.randint(math.factorial(len(active)), *key, 0)]
    changes = np.zeros((len(strengths), len(indices)))
    for kind in active:
        high = strengths[kind]
        low = -high if _OPS[kind] == HUE else -min(high, 1.0)  # a factor is not negative
        changes[kind] = low + (high - low) * rng.uniform(*key, 1 + kind)
    column = np.arange(len(indices))
    return [OpParams(_OPS[kinds], changes[kinds, column]) for kinds in order.T]
