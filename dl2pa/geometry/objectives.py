"""Prototype objectives of the compared methods, minimized by SGD on the sphere as in their papers.

They reproduce those methods; `optimize` finds better prototypes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dl2pa.geometry.bounds import max_cosine_bound
from dl2pa.geometry.certificate import row_blocks
from dl2pa.geometry.optimize import Progress, normalized, pair_pull, random_points, tangent

_LEARNING_RATE = 0.1
_HPN_MOMENTUM = 0.9
_UNIFORMITY_BETA = 4.0
_MIN_STEPS, _MAX_STEPS, _WORK = 100, 10_000, 1.6e12
_REPORT_EVERY = 50


def steps_for(num_classes: int, dim: int) -> int:
    """Number of steps: 10,000 as published if they take about a minute on 2 cores, fewer for large C, at least 100.

    The time of a step is about proportional to C²·(d + 150), where 150 accounts for the element-wise operations. For
    C = 1,000 the result is 10,000 steps at d = 10 and 2,416 at d = 512; for C = 21,841 and d = 512 it is 100.
    """
    return int(min(_MAX_STEPS, max(_MIN_STEPS, _WORK / (num_classes**2 * (dim + 150)))))


def uniformity(num_classes: int, dim: int, seed: int, progress: Progress | None = None) -> Tensor:
    """Prototypes of the DL2PA authors: minimize log mean_{i≠j} exp(−2‖p_i − p_j‖²) by SGD, learning rate 0.1.

    On the sphere ‖p_i − p_j‖² = 2 − 2cos, so the loss is a log-sum-exp of cosines with β = 4. This implementation
    uses full batches and normalizes after each step.

    Returns:
        float32 tensor [C, d] with unit rows; d ≥ 2.
    """
    points = random_points(num_classes, dim, seed)
    steps = steps_for(num_classes, dim)
    for step in range(steps):
        # Each pair acts on both its points, so the gradient is 2β times the softmax-weighted mean of the neighbors.
        gradient = tangent(2 * _UNIFORMITY_BETA * pair_pull(points, _UNIFORMITY_BETA), points)
        points = normalized(points - _LEARNING_RATE * gradient)
        _report(progress, step, steps)
    return points[0]


def hpn(num_classes: int, dim: int, seed: int, progress: Progress | None = None) -> Tensor:
    """Prototypes of hyperspherical prototype networks: minimize mean_i max_{j≠i} cos by SGD.

    Source: Mettes, van der Pol and Snoek (2019). Learning rate 0.1, momentum 0.9, normalized after each step. The
    learning rate is constant, so with about a dozen classes the points do not converge; see the certificate.

    Returns:
        float32 tensor [C, d] with unit rows; d ≥ 2.
    """
    points = random_points(num_classes, dim, seed)[0]
    velocity = torch.zeros_like(points)
    steps = steps_for(num_classes, dim)
    for step in range(steps):
        nearest = _nearest_rows(points)
        gradient = points[nearest].index_add_(0, nearest, points) / num_classes
        velocity.mul_(_HPN_MOMENTUM).add_(gradient)
        points = normalized(points - _LEARNING_RATE * velocity)
        _report(progress, step, steps)
    return points


def ebv(num_classes: int, dim: int, seed: int, progress: Progress | None = None) -> Tensor:
    """Equiangular basis vectors: minimize Σ_{i≠j} relu(|cos_ij| − threshold) by SGD until the loss is 0.

    Source: Shen et al. (2023), "Equiangular basis vectors". The threshold is `ebv_threshold`. The learning rate falls
    linearly to 0, because a loss with constant slope does not converge otherwise.

    Returns:
        float32 tensor [C, d] with unit rows; d ≥ 2.
    """
    threshold = ebv_threshold(num_classes, dim)
    points = random_points(num_classes, dim, seed)[0]
    steps = steps_for(num_classes, dim)
    for step in range(steps):
        gradient = _excess_gradient(points, threshold)
        if not gradient.any():
            break
        rate = _LEARNING_RATE * (1 - step / steps)
        points = normalized(points - rate * tangent(gradient, points))
        _report(progress, step, steps)
    if progress is not None:
        progress(steps, steps)
    return points


def ebv_threshold(num_classes: int, dim: int) -> float:
    """Threshold of |cosine| below which a pair has no loss.

    The published thresholds are 0.002 at 1,000×1,000 and 0.05 at 1,000×512. The formula of this project passes
    through both: 1.6 times Welch's bound on the largest |cosine|, √((C−d)/(d(C−1))). For C ≫ d Welch's bound is far
    below any attainable value and the points would collapse onto each other. Therefore the threshold is at least 1.2
    times the bound on 2C points (every prototype and its negative). Each term is at most the mean of its bound and 1.
    """
    welch = math.sqrt(max(0.0, (num_classes - dim) / (dim * (num_classes - 1))))
    antipodal = max_cosine_bound(2 * num_classes, dim)
    scaled = ((1.6, welch), (1.2, antipodal))
    return max(0.002, *(min(factor * bound, 0.5 * (1.0 + bound)) for factor, bound in scaled))


def _nearest_rows(points: Tensor) -> Tensor:
    """Index of the nearest other row of each row, int64 [C]."""
    blocks = row_blocks(len(points), len(points))
    nearest: list[Tensor] = []
    for first in blocks:
        cosines = points[first : first + blocks.step] @ points.T
        cosines.diagonal(offset=first).fill_(-math.inf)
        nearest.append(cosines.argmax(dim=1))
    return torch.cat(nearest)


def _excess_gradient(points: Tensor, threshold: float) -> Tensor:
    """Gradient of Σ relu(|cos| − threshold) over unordered pairs, [C, d]."""
    blocks = row_blocks(len(points), len(points))
    gradients: list[Tensor] = []
    for first in blocks:
        cosines = points[first : first + blocks.step] @ points.T
        cosines.diagonal(offset=first).zero_()
        sign = cosines.sign().mul_(cosines.abs() > threshold)
        gradients.append(sign @ points)
    return torch.cat(gradients)


def _report(progress: Progress | None, step: int, steps: int) -> None:
    if progress is not None and ((step + 1) % _REPORT_EVERY == 0 or step + 1 == steps):
        progress(step + 1, steps)
