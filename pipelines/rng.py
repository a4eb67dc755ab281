"""Counter-based random numbers: each draw is a hash of its key, so it needs no state and no order of asking.

The mixing function is the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), applied once for every
word of the key. Two calls with the same key give the same bits on every platform, version and world size.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_ALL = 2**64 - 1


class Stream(IntEnum):
    """What a draw is for. A number is never reused: that would change every batch of earlier runs."""

    ORDER = 1
    CROP = 2
    FLIP = 3
    TRIVIAL = 4
    ERASE = 5
    MIX_KIND = 6
    MIX_PARTNER = 7
    MIX_RATIO = 8
    MIX_BOX = 9
    SUBSTITUTE = 10
    SYNTHETIC = 11
    STEP_SEED = 12


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words: a bijection with full avalanche."""
    z = words + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _M1
    z = (z ^ (z >> np.uint64(27))) * _M2
    return z ^ (z >> np.uint64(31))


def _mix_one(word: int) -> int:
    """``_mix`` of one word, without the cost of arrays."""
    z = (word + int(_GAMMA)) & _ALL
    z = ((z ^ (z >> 30)) * int(_M1)) & _ALL
    z = ((z ^ (z >> 27)) * int(_M2)) & _ALL
    return z ^ (z >> 31)


def random_bits(*key: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for each key; the words of the key broadcast against each other.

    Args:
        key: integers or integer arrays, for example (seed, stream, epoch, sample_indices).
    """
    prefix, rest = 0, len(key)
    for i, word in enumerate(key):
        if not isinstance(word, int | np.integer):
            rest = i
            break
        prefix = _mix_one(prefix ^ (int(word) & _ALL))
    state = np.asarray(prefix, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in key[rest:]:
            state = _mix(state ^ np.asarray(word).astype(np.int64).view(np.uint64))
    return np.asarray(state)


def uniform(*key: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), 53 bits each, one for each key (see ``bits``)."""
    return (random_bits(*key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def randint(bound: ArrayLike, *key: ArrayLike) -> NDArray[np.int64]:
    """Uniform integers in [0, bound), one for each key (bias below bound/2^53)."""
    return np.minimum(np.floor(uniform(*key) * np.asarray(bound)), np.asarray(bound) - 1).astype(np.int64)
