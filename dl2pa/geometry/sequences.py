"""Binary codes whose words as ±1 have few and small correlations: Kerdock, Gold and other dual BCH codes.

Words are int8 ±1; divided by the square root of their length they are spherical codes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Signs = NDArray[np.int8]

# Exponents of a primitive polynomial over GF(2) for each degree.
_PRIMITIVE = {
    3: (3, 1, 0),
    4: (4, 1, 0),
    5: (5, 2, 0),
    6: (6, 1, 0),
    7: (7, 1, 0),
    8: (8, 4, 3, 2, 0),
    9: (9, 4, 0),
    10: (10, 3, 0),
    11: (11, 2, 0),
}
DEGREES = tuple(_PRIMITIVE)
_CHUNK = 65_536
"""Number of words computed at a time."""


def kerdock(degree: int) -> Signs:
    """Kerdock code of length n = 2^(degree+1) as signs: n² words with inner products 0, ±√n and ±n.

    Source: Hammons, Kumar, Calderbank, Sloane and Solé (1994). The words are the images under the Gray map of
    (T(aξ) + b) over Z4, with a in the Galois ring GR(4, degree) and ξ in its Teichmüller set. T(aξ) takes the values of
    all linear forms in ξ, so the coordinates of ξ are the columns of a generator matrix. Degree 3 gives the
    Nordstrom–Robinson code.

    Args:
        degree: odd; 3, 5 or 7.

    Returns:
        [n², n].
    """
    points = _teichmueller(degree)
    generator = np.concatenate([np.ones((1, len(points)), dtype=np.int8), points.T])
    words = np.zeros((1, len(points)), dtype=np.int8)
    for row in generator:
        words = np.concatenate([(words + times * row) & 3 for times in range(4)]).astype(np.int8)
    # The Gray map sends 0 1 2 3 to 00 01 11 10: first the high bit, then the sum of both bits.
    high = words >> 1
    bits = np.stack([high, high ^ (words & 1)], axis=2).reshape(len(words), -1)
    return (1 - 2 * bits).astype(np.int8)


def gold(degree: int) -> Signs:
    """Gold code: words Tr(ax + bx³) + c over x in GF(n), n = 2^degree; 2n² words, inner products 0, ±√(2n) and ±n.

    It is the dual of the extended BCH code that corrects two errors (Gold 1967). The code is linear; the columns of a
    generator matrix are the bits of (1, x, x³).

    Args:
        degree: odd; 3, 5 or 7.

    Returns:
        [2n², n].
    """
    powers = _powers(degree, modulus=2)
    order = len(powers)
    cubes = powers[np.arange(order) * 3 % order]
    zero = np.zeros((1, degree), dtype=np.int8)
    columns = np.concatenate([np.concatenate([zero, powers]), np.concatenate([zero, cubes])], axis=1)
    words = np.zeros((1, order + 1), dtype=np.int8)
    for row in np.concatenate([np.ones((1, order + 1), dtype=np.int8), columns.T]):
        words = np.concatenate([words, words ^ row])
    return (1 - 2 * words).astype(np.int8)


def dual_bch_correlation(degree: int, errors: int) -> int:
    """Largest inner product of two words of `dual_bch` other than a word and its negative.

    Source: the weight distributions of the duals of BCH codes that correct two and three errors (MacWilliams and
    Sloane, The Theory of Error-Correcting Codes, chapter 15; Berlekamp 1970).
    """
    return 1 << (degree // 2 + errors - 1)


def dual_bch(degree: int, errors: int, count: int, seed: int) -> Signs:
    """Random distinct words Tr(ax + bx³ (+ cx⁵)) + e over x in GF(2^degree).

    The code is linear, so each word is computed from its number; time and memory are proportional to `count`.

    Args:
        degree: degree of the field; the length is 2^degree.
        errors: number of powers of x, 2 or 3.
        count: number of words, at most 2^(1 + errors·degree).

    Returns:
        [count, 2^degree].
    """
    generator = _dual_bch_generator(degree, errors)
    bits = len(generator)
    chosen = np.random.default_rng(seed).choice(1 << bits, count, replace=False)
    words = np.empty((count, generator.shape[1]), dtype=np.int8)
    for start in range(0, count, _CHUNK):
        numbers = chosen[start : start + _CHUNK]
        message = (numbers[:, None] >> np.arange(bits) & 1).astype(np.float32)
        odd = (message @ generator).astype(np.int8) & 1
        words[start : start + _CHUNK] = 1 - 2 * odd
    return words


def _dual_bch_generator(degree: int, errors: int) -> NDArray[np.float32]:
    """Generator matrix; its rows are the constant 1 and the bits of x, x³, …"""
    powers = _powers(degree, modulus=2)
    order = len(powers)
    rows = [np.ones((1, order + 1), dtype=np.int8)]
    for exponent in range(1, 2 * errors, 2):
        values = powers[np.arange(order) * exponent % order]
        rows.append(np.concatenate([np.zeros((1, degree), dtype=np.int8), values]).T)
    return np.concatenate(rows).astype(np.float32)


def shortened(words: Signs, times: int) -> Signs:
    """Words with +1 in the first `times` coordinates, without those coordinates.

    The inner products and the length decrease by `times`. Kerdock and Gold codes have strength 5 (dual distance 6), so
    for up to 5 coordinates the number of words is divided by exactly 2^times.
    """
    kept = words[(words[:, :times] == 1).all(axis=1)]
    return np.ascontiguousarray(kept[:, times:])


def _teichmueller(degree: int) -> Signs:
    """Zero and the powers of a primitive (2^degree − 1)-th root of unity in GR(4, degree), [2^degree, degree]."""
    powers = _powers(degree, modulus=4)
    return np.concatenate([np.zeros((1, degree), dtype=np.int8), powers])


def _powers(degree: int, modulus: int) -> Signs:
    """1, x, x², … modulo a primitive polynomial over GF(2), or its lift to Z4; [2^degree − 1, degree]."""
    polynomial = np.zeros(degree + 1, dtype=np.int64)
    polynomial[list(_PRIMITIVE[degree])] = 1
    if modulus == 4:
        polynomial = _graeffe(polynomial)
    power = np.zeros(degree, dtype=np.int64)
    power[0] = 1
    rows: list[NDArray[np.int64]] = []
    for _ in range((1 << degree) - 1):
        rows.append(power)
        carry = power[-1]
        power = (np.concatenate([[0], power[:-1]]) - carry * polynomial[:-1]) % modulus
    return np.array(rows, dtype=np.int8)


def _graeffe(polynomial: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lift a polynomial over GF(2) to the monic polynomial over Z4 that divides x^(2^m − 1) − 1 (Graeffe's method).

    For a polynomial with even part e and odd part o, the lift h satisfies h(x²) = ±(e(x)² − o(x)²).
    """
    even, odd = polynomial.copy(), polynomial.copy()
    even[1::2] = 0
    odd[0::2] = 0
    lifted = (np.convolve(even, even) - np.convolve(odd, odd))[::2] % 4
    return lifted * lifted[-1] % 4
