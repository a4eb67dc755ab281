"""Lower bounds on the largest pairwise cosine of C unit vectors in R^d.

- d ≥ C−1: −1/(C−1), attained by the regular simplex.
- d+1 < C ≤ 2d: 0 (Rankin 1955), attained by orthogonal simplices.
- d = 2: cos(2π/C), attained by the regular polygon.
- d = 3: the bound of Fejes Tóth (1943).
- Otherwise: Levenshtein's bound ("Universal bounds for codes and designs", 1998), the best bound that polynomials
  of its degree give in Delsarte's linear program.
"""

from __future__ import annotations

import math

from scipy.special import roots_jacobi

_BISECTIONS = 60


def max_cosine_bound(num_classes: int, dim: int) -> float:
    """Lower bound on the largest pairwise cosine of any C unit vectors in R^d.

    Args:
        num_classes: C ≥ 2.
        dim: d ≥ 1.
    """
    if num_classes <= dim + 1:
        return -1.0 / (num_classes - 1)
    if dim == 1:
        return 1.0
    if num_classes <= 2 * dim:
        return 0.0
    if dim == 2:
        return math.cos(2.0 * math.pi / num_classes)
    if dim == 3:
        corner = num_classes * math.pi / (6.0 * (num_classes - 2))
        return 0.5 * (1.0 / math.tan(corner) ** 2 - 1.0)
    return _levenshtein_cosine(num_classes, dim)


def _levenshtein_cosine(num_classes: int, dim: int) -> float:
    """Solve L(d, s) = C for s by bisection: L is Levenshtein's bound on the number of points; C > 2d, d ≥ 4."""
    k = 1
    while num_classes > _tight_design_size(dim, 2 * k + 1):
        k += 1
    # Now D(2k−1) < C ≤ D(2k+1). L is continuous and increasing; up to C = D(2k) its polynomial has degree 2k−1.
    odd = num_classes <= _tight_design_size(dim, 2 * k)
    low = _largest_root(dim, k - 1, 1) if odd else _largest_root(dim, k, 0)
    high = _largest_root(dim, k, 0) if odd else _largest_root(dim, k, 1)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if _levenshtein_size(dim, middle, k, odd) < num_classes:
            low = middle
        else:
            high = middle
    return low


def _tight_design_size(dim: int, strength: int) -> int:
    """Lower bound D(d, τ) on the size of a spherical τ-design (Delsarte, Goethals and Seidel)."""
    k = strength // 2
    if strength % 2:
        return 2 * math.comb(dim + k - 1, dim - 1)
    return math.comb(dim + k - 1, dim - 1) + math.comb(dim + k - 2, dim - 1)


def _largest_root(dim: int, degree: int, shift: int) -> float:
    """Largest root of the Jacobi polynomial with parameters ((d−3)/2 + 1, (d−3)/2 + shift); −1 for degree 0."""
    if degree == 0:
        return -1.0
    base = 0.5 * (dim - 3)
    roots, _ = roots_jacobi(degree, base + 1.0, base + shift)
    return float(roots[-1])


def _levenshtein_size(dim: int, cosine: float, k: int, odd: bool) -> float:
    """L_{2k−1}(d, s) if `odd`, else L_{2k}(d, s), from Gegenbauer polynomials scaled to 1 at 1."""
    previous, current = 1.0, cosine
    for degree in range(1, k if odd else k + 1):
        following = ((2 * degree + dim - 2) * cosine * current - degree * previous) / (degree + dim - 2)
        previous, current = current, following
    if odd:
        ratio = (previous - current) / ((1.0 - cosine) * current)
        return math.comb(k + dim - 3, k - 1) * ((2 * k + dim - 3) / (dim - 1) - ratio)
    ratio = (1.0 + cosine) * (previous - current) / ((1.0 - cosine) * (previous + current))
    return math.comb(k + dim - 2, k) * ((2 * k + dim - 1) / (dim - 1) - ratio)
