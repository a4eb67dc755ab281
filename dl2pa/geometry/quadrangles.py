"""Spherical codes from generalized quadrangles: (q+1)(q³+1) points in R^(q(q²−q+1)) with cosines −1/q and 1/q².

Source: Cameron, Goethals and Seidel (1978). The codes attain Levenshtein's bound, so they are optimal for their size.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from dl2pa.geometry.golay import Floats, Integers


def quadrangle(q: int) -> Floats:
    """Project the points of the elliptic quadric in PG(5, q) on the least eigenspace of their collinearity graph.

    The graph is strongly regular with degree q(q²+1) and least eigenvalue −(q²+1), so the projected points have cosine
    −1/q if they are collinear and 1/q² otherwise.

    Args:
        q: 3, 4, 5 or 7.

    Returns:
        float64 unit rows [(q+1)(q³+1), q(q²−q+1)].
    """
    collinear = _collinear_over_gf4() if q == 4 else _collinear_over_prime(q)
    gram = np.where(collinear, -1.0 / q, 1.0 / q**2)
    np.fill_diagonal(gram, 1.0)
    return _coordinates(gram, q * (q * q - q + 1))


def _collinear_over_prime(q: int) -> NDArray[np.bool_]:
    """Collinearity of the points of x₀x₁ + x₂x₃ + x₄² − n·x₅² = 0 for a non-square n and an odd prime q."""
    squares = {i * i % q for i in range(q)}
    n = next(i for i in range(q) if i not in squares)
    x = _projective_points(q)
    form = x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3] + x[:, 4] ** 2 - n * x[:, 5] ** 2
    x = x[form % q == 0]
    polar = x[:, [1, 0, 3, 2, 4, 5]] * np.array([1, 1, 1, 1, 2, -2 * n])
    return (x @ polar.T) % q == 0


def _collinear_over_gf4() -> NDArray[np.bool_]:
    """Collinearity of the points of x₀x₁ + x₂x₃ + x₄² + x₄x₅ + ω·x₅² = 0 over GF(4) = {0, 1, ω = 2, ω² = 3}."""
    nonzero = np.array([[1, 2, 3], [2, 3, 1], [3, 1, 2]])
    times = np.zeros((4, 4), dtype=np.int64)
    times[1:, 1:] = nonzero
    x = _projective_points(4)
    form = times[x[:, 0], x[:, 1]] ^ times[x[:, 2], x[:, 3]] ^ times[x[:, 4], x[:, 4]]
    form = form ^ times[x[:, 4], x[:, 5]] ^ times[2, times[x[:, 5], x[:, 5]]]
    x = x[form == 0]
    polar = np.zeros((len(x), len(x)), dtype=np.int64)
    for one, other in ((0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4)):
        polar ^= times[x[:, one][:, None], x[:, other][None, :]]
    return polar == 0


def _projective_points(q: int) -> Integers:
    """The points of PG(5, q): vectors whose first non-zero entry is 1."""
    parts: list[Integers] = []
    for leading in range(6):
        tails = np.array(list(itertools.product(range(q), repeat=5 - leading)), dtype=np.int64)
        tails = tails.reshape(q ** (5 - leading), 5 - leading)
        head = np.zeros((len(tails), leading + 1), dtype=np.int64)
        head[:, -1] = 1
        parts.append(np.concatenate([head, tails], axis=1))
    return np.concatenate(parts)


def _coordinates(gram: Floats, rank: int) -> Floats:
    """Rows [n, rank] with Gram matrix `gram`, by a pivoted Cholesky decomposition."""
    residual = np.diagonal(gram).copy()
    rows = np.zeros((len(gram), rank))
    for column in range(rank):
        # Rounded so that the pivot does not depend on the last bit.
        pivot = int(np.argmax(np.round(residual, 9)))
        rows[:, column] = (gram[:, pivot] - rows[:, :column] @ rows[pivot, :column]) / np.sqrt(
            residual[pivot]
        )
        residual -= rows[:, column] ** 2
    return rows
