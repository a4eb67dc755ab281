"""Counter-based random numbers: each number is a hash of its key, without state.

The hash applies the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) once per word of the key. The same
key gives the same bits on every platform, version and world size.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_MASK = 2**64 - 1


class Stream(IntEnum):
    """Purpose of a random number, a word of its key. Never change or reuse a value: batches would change."""

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
    RAND_AUGMENT = 20
    COLOR_JITTER = 21
    NEGATIVES = 40
    LABEL_NOISE = 41
    LABEL_NOISE_CLASS = 42


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit words: a bijection with full avalanche."""
    z = words + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * _M1
    z = (z ^ (z >> np.uint64(27))) * _M2
    return z ^ (z >> np.uint64(31))


def _mix_one(word: int) -> int:
    """``_mix`` of one Python integer, without array overhead."""
    z = (word + int(_GAMMA)) & _MASK
    z = ((z ^ (z >> 30)) * int(_M1)) & _MASK
    z = ((z ^ (z >> 27)) * int(_M2)) & _MASK
    return z ^ (z >> 31)


def random_bits(*key: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits per key; the words of the key broadcast against each other.

    Args:
        key: integers or integer arrays, for example (seed, stream, epoch, samples).
    """
    prefix, rest = 0, len(key)
    for i, word in enumerate(key):
        if not isinstance(word, int | np.integer):
            rest = i
            break
        prefix = _mix_one(prefix ^ (int(word) & _MASK))
    state = np.asarray(prefix, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in key[rest:]:
            state = _mix(state ^ np.asarray(word).astype(np.int64).view(np.uint64))
    return np.asarray(state)


def uniform(*key: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 bits, one per key (see ``random_bits``)."""
    return (random_bits(*key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def randint(bound: ArrayLike, *key: ArrayLike) -> NDArray[np.int64]:
    """Uniform integers in [0, bound), one per key (bias below bound / 2^53)."""
    return np.minimum(np.floor(uniform(*key) * np.asarray(bound)), np.asarray(bound) - 1).astype(np.int64)
