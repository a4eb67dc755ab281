"""Prototypes in closed form. All functions return float32 unit rows [C, d]; the caller checks C and d."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def simplex(num_classes: int, dim: int) -> Tensor:
    """Regular simplex: every cosine is −1/(C−1), the optimum for d ≥ C−1. Dimensions after C−1 are zero.

    The coordinates are the rows of the Helmert matrix without its constant column: the columns are orthonormal and
    orthogonal to the vector of ones.
    """
    points = torch.zeros(num_classes, dim)
    column = torch.arange(1, num_classes, dtype=torch.float64)
    inverse = (column * (column + 1)).rsqrt() * math.sqrt(num_classes / (num_classes - 1))
    square = inverse.float().expand(num_classes - 1, -1).triu()
    points[:-1, : num_classes - 1] = square
    points[1:, : num_classes - 1].diagonal().copy_(-column * inverse)
    return points


def blocks(num_classes: int, dim: int) -> Tensor:
    """Regular simplices in C−d orthogonal blocks of R^d; d < C ≤ 2d.

    The largest cosine is 0, the optimum (Rankin 1955). The blocks are ranges of coordinates, so prototypes of
    different blocks share no non-zero coordinate and their cosine is exactly 0.
    """
    points = torch.zeros(num_classes, dim)
    count = num_classes - dim
    row = column = 0
    for block in range(count):
        size = dim // count + (block < dim % count)
        points[row : row + size + 1, column : column + size] = simplex(size + 1, size)
        row, column = row + size + 1, column + size
    return points


def polygon(num_classes: int) -> Tensor:
    """Regular C-gon in the plane, the optimum for d = 2."""
    angle = torch.arange(num_classes, dtype=torch.float64) * (2.0 * math.pi / num_classes)
    return torch.stack([angle.cos(), angle.sin()], dim=1).float()


def kasarla(num_classes: int, dim: int) -> Tensor:
    """Simplex of Kasarla et al. (2022), "Maximum class separation as inductive bias in one matrix"; d ≥ C−1.

    The published recursion is V_1 = [1 −1], V_k = [[1, −1/k·1ᵀ], [0, √(1−1/k²)·V_{k−1}]]; the prototypes are the
    columns of V_{C−1}. Row r of V_k is s_r·[0 … 0, 1, −1/(k−r), …] with the 1 in column r; the product of roots
    telescopes to s_r² = (k−r)(k+1) / (k(k−r+1)). Dimensions after C−1 are zero; the paper has d = C−1.
    """
    order = num_classes - 1
    remaining = order - torch.arange(order, dtype=torch.float64)
    scale = (remaining * (order + 1) / (order * (remaining + 1))).sqrt()
    points = torch.zeros(num_classes, dim)
    points[1:, :order] = (-scale / remaining).float().expand(order, -1).tril()
    points[:-1, :order].diagonal().copy_(scale)
    return points


def etf(num_classes: int, dim: int, seed: int) -> Tensor:
    """Simplex equiangular tight frame √(C/(C−1))·U(I − 11ᵀ/C) with random orthonormal columns U; d ≥ C.

    Every cosine is −1/(C−1). Source: Papyan, Han and Donoho (2020), "Prevalence of neural collapse".
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(dim, num_classes, generator=generator, dtype=torch.float64)
    orthonormal, _ = torch.linalg.qr(gaussian)
    centered = orthonormal - orthonormal.mean(dim=1, keepdim=True)
    points = centered.T * math.sqrt(num_classes / (num_classes - 1))
    return (points / torch.linalg.vector_norm(points, dim=1, keepdim=True)).float()
