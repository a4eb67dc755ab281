"""Prototypes in closed form. All return float32 [C, d] with unit rows; the caller has checked C and d."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def simplex(num_classes: int, dim: int) -> Tensor:
    """Regular simplex, every cosine −1/(C−1); optimal for d ≥ C−1. Dimensions past C−1 are zero.

    The coordinates are the rows of Helmert's matrix without its constant column: orthonormal columns, each
    orthogonal to the ones vector.
    """
    points = torch.zeros(num_classes, dim)
    column = torch.arange(1, num_classes, dtype=torch.float64)
    inverse = (column * (column + 1)).rsqrt() * math.sqrt(num_classes / (num_classes - 1))
    square = inverse.float().expand(num_classes - 1, -1).triu()
    points[:-1, : num_classes - 1] = square
    points[1:, : num_classes - 1].diagonal().copy_(-column * inverse)
    return points


def blocks(num_classes: int, dim: int) -> Tensor:
    """R^d split into C−d orthogonal blocks, a regular simplex in each; d < C ≤ 2d.

    The largest cosine is 0, the optimum (Rankin 1955). Blocks are coordinate ranges, not rotated, so that
    prototypes of different blocks share no non-zero coordinate and their cosine is 0 in any arithmetic.
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
    """The regular C-gon in the plane, the optimum for d = 2."""
    angle = torch.arange(num_classes, dtype=torch.float64) * (2.0 * math.pi / num_classes)
    return torch.stack([angle.cos(), angle.sin()], dim=1).float()


def kasarla(num_classes: int, dim: int) -> Tensor:
    """Kasarla et al. (2022), "Maximum class separation as inductive bias in one matrix"; d ≥ C−1.

    Their recursion V_1 = [1 −1], V_k = [[1, −1/k·1ᵀ], [0, √(1−1/k²)·V_{k−1}]] holds prototypes as columns, k = C−1 at
    the end. Row r of V_k is s_r·[0 … 0, 1, −1/(k−r), …], the 1 in column r, where the product of roots telescopes to
    s_r² = (k−r)(k+1) / (k(k−r+1)). The points are those columns, as rows. Theirs is for d = C−1; dimensions past that
    are zero here.
    """
    order = num_classes - 1
    left = order - torch.arange(order, dtype=torch.float64)
    scale = (left * (order + 1) / (order * (left + 1))).sqrt()
    points = torch.zeros(num_classes, dim)
    points[1:, :order] = (-scale / left).float().expand(order, -1).tril()
    points[:-1, :order].diagonal().copy_(scale)
    return points


def etf(num_classes: int, dim: int, seed: int) -> Tensor:
    """Simplex equiangular tight frame √(C/(C−1))·U(I − 11ᵀ/C), U seeded with orthonormal columns; d ≥ C.

    Papyan, Han and Donoho (2020), "Prevalence of neural collapse". Every cosine is −1/(C−1).
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(dim, num_classes, generator=generator, dtype=torch.float64)
    orthonormal, _ = torch.linalg.qr(gaussian)
    centerd = orthonormal - orthonormal.mean(dim=1, keepdim=True)
    points = centerd.T * math.sqrt(num_classes / (num_classes - 1))
    return (points / torch.linalg.vector_norm(points, dim=1, keepdim=True)).float()
