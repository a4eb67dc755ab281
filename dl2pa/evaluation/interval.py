"""Confidence interval of an accuracy."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054
"""Quantile of the standard normal distribution at 0.975."""


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % score interval of a proportion, in percent.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927), 209-212;
    recommended by Brown, Cai and DasGupta, Statistical Science 16 (2001), 101-133, equation 4.

    Args:
        hits: number of correct images, 0 to `count`.
        count: number of images, at least 1.
    """
    share, squared = hits / count, Z_95**2
    center = share + squared / (2 * count)
    half = Z_95 * math.sqrt(share * (1 - share) / count + squared / (4 * count**2))
    scale = 100.0 / (1 + squared / count)
    low = scale * (center - half) if hits else 0.0  # exact at both ends, where the difference rounds
    high = scale * (center + half) if hits < count else 100.0
    return low, high
