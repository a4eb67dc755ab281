"""The extended binary Golay code and spherical codes built from it, in exact integer arithmetic.

Source: Conway and Sloane, "Sphere Packings, Lattices and Groups", chapters 10 and 11. Codes with integer coordinates
are not normalized, so that tests can compare inner products exactly.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@cache
def golay_code() -> Integers:
    """The 4,096 words of the [24, 12, 8] code as 0 and 1: the quadratic residue code modulo 23 with a parity bit."""
    residues = sorted({i * i % 23 for i in range(1, 23)})
    basis: list[int] = []
    for shift in range(23):
        word = sum(1 << (residue + shift) % 23 for residue in residues)
        word |= (word.bit_count() & 1) << 23
        for known in basis:
            word = min(word, word ^ known)
        if word:
            basis.append(word)
    words = np.zeros(1, dtype=np.int64)
    for word in basis:
        words = np.concatenate([words, words ^ word])
    return (words[:, None] >> np.arange(24)) & 1


def octads() -> Integers:
    """The 759 words of weight 8, the blocks of the Steiner system S(5, 8, 24)."""
    words = golay_code()
    return words[words.sum(axis=1) == 8]


def higman_sims() -> Floats:
    """100 points in R^22 with cosines −4/11 and 1/11: the Higman–Sims graph projected on its eigenspace of −8.

    The vertices are one extra point, the 22 points and the 77 blocks of S(3, 6, 22); the blocks are the octads that
    contain two fixed points. As a module of M22 the eigenspace is the permutation module of the 22 points. So the
    coordinates are a·1, b·1 + c·e_i and f·1 + g·1_B, where the cosines determine the five constants.
    """
    blocks = octads()
    hexads = blocks[(blocks[:, 22] == 1) & (blocks[:, 23] == 1)][:, :22]
    a = 1.0 / math.sqrt(22)
    c = math.sqrt(10 / 11)
    b = (-4 / (11 * a) - c) / 22
    g = -5 / (11 * c)
    f = (1 / (11 * a) - 6 * g) / 22
    return np.concatenate([np.full((1, 22), a), b + c * np.eye(22), f + g * hexads])


def leech_minimal_vectors() -> Integers:
    """The 196,560 shortest vectors of the Leech lattice times √8, squared length 32, [196560, 24].

    They have two coordinates ±4, or eight ±2 on an octad with an even number of minus signs, or one ∓3 and 23 ±1 with
    the signs flipped on a word of the Golay code.
    """
    signs = _even_signs(8)
    eights = np.zeros((759, 128, 24), dtype=np.int64)
    for block, octad in enumerate(octads()):
        eights[block][:, octad == 1] = 2 * signs
    threes = (1 - 4 * np.eye(24, dtype=np.int64))[:, None, :] * (1 - 2 * golay_code())
    return np.concatenate([_pairs(24, 4), eights.reshape(-1, 24), threes.reshape(-1, 24)])


def equiangular_276() -> tuple[Integers, Integers]:
    """The 552 vectors ±v of 276 lines in R^23 with cosines ±1/5, integers [552, 24], and their common normal x.

    For a vector x of type 3 (squared length 48) the 552 shortest y with y·x = 24 form pairs {y, x − y}. The lines
    have the directions 2y − x.
    """
    x = np.ones(24, dtype=np.int64)
    x[0] = 5
    shortest = leech_minimal_vectors()
    return 2 * shortest[shortest @ x == 24] - x, x


def e8_roots() -> Integers:
    """The 240 roots of E8 times 2, squared length 8: cosines ±1/2, 0 and −1, [240, 8]."""
    return np.concatenate([_pairs(8, 2), _even_signs(8)])


def _pairs(length: int, value: int) -> Integers:
    """All vectors with two coordinates ±value and zeros elsewhere."""
    first, second = np.triu_indices(length, k=1)
    basis = value * np.eye(length, dtype=np.int64)
    return np.concatenate(
        [one * basis[first] + other * basis[second] for one in (1, -1) for other in (1, -1)]
    )


def _even_signs(length: int) -> Integers:
    """All vectors of ±1 with an even number of minus signs."""
    signs = 1 - 2 * ((np.arange(1 << length)[:, None] >> np.arange(length)) & 1)
    return signs[signs.prod(axis=1) == 1]
