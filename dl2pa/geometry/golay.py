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
    """The 4,096 words of the [24, 12, 8] Golay code, entries 0 and 1, [4096, 24].

    It is the quadratic residue code modulo 23, extended by a parity bit.
    """
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
    """The 759 Golay code words of weight 8: the blocks of the Steiner system S(5, 8, 24), [759, 24]."""
    words = golay_code()
    return words[words.sum(axis=1) == 8]


def higman_sims() -> Floats:
    """100 points in R^22 with cosines −4/11 and 1/11: the Higman–Sims graph, projected.

    The projection is onto the eigenspace of the adjacency matrix for the eigenvalue −8, of dimension 22.

    The vertices are one extra point, and the 22 points and 77 blocks of the Steiner system S(3, 6, 22). The blocks are
    the octads that contain two fixed coordinates, without these coordinates. The Mathieu group M22 permutes the 22
    points and acts on the eigenspace as on the 22 coordinates of R^22. So the vectors are a·1 for the extra
    point, b·1 + c·e_i for point i and f·1 + g·1_B for block B, where 1 is the all-ones vector, e_i a basis vector and
    1_B the indicator of B. The two cosines determine the constants a, b, c, f and g.
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
    """The 196,560 shortest nonzero vectors of the Leech lattice, scaled by √8 to squared length 32, [196560, 24].

    There are three kinds: two coordinates ±4, else 0; ±2 on an octad with an even number of minus signs, else 0; one
    coordinate −3 and 23 coordinates 1, with the signs flipped where a word of the Golay code is 1.
    """
    signs = _even_signs(8)
    eights = np.zeros((759, 128, 24), dtype=np.int64)
    for block, octad in enumerate(octads()):
        eights[block][:, octad == 1] = 2 * signs
    threes = (1 - 4 * np.eye(24, dtype=np.int64))[:, None, :] * (1 - 2 * golay_code())
    return np.concatenate([_pairs(24, 4), eights.reshape(-1, 24), threes.reshape(-1, 24)])


def equiangular_276() -> tuple[Integers, Integers]:
    """276 equiangular lines with cosines ±1/5 in a 23-dimensional subspace of R^24.

    Let x be a Leech lattice vector of type 3, scaled by √8 to squared length 48. The 552 shortest lattice vectors y
    with y·x = 24 form 276 pairs {y, x − y}. Each pair gives one line, with the opposite directions ±(2y − x).

    Returns:
        Both direction vectors of every line, integers [552, 24], and x, which is orthogonal to all of them, [24].
    """
    x = np.ones(24, dtype=np.int64)
    x[0] = 5
    shortest = leech_minimal_vectors()
    return 2 * shortest[shortest @ x == 24] - x, x


def e8_roots() -> Integers:
    """The 240 roots of E8, scaled by 2 to squared length 8, with cosines ±1/2, 0 and −1, [240, 8]."""
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
