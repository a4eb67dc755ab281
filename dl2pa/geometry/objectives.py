"""The prototype objectives of the compared systems, minimized as their papers do: plain SGD on the sphere.

They are here to reproduce those systems, not to find good points: for that see ``optimize``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dl2pa.geometry.bounds import max_cosine_bound
from dl2pa.geometry.certificate import BLOCK_ELEMENTS
from dl2pa.geometry.optimize import Progress, normalized, pair_pull, random_points, tangent

_LEARNING_RATE = 0.1
_HPN_MOMENTUM = 0.9
_UNIFORMITY_BETA = 4.0
_STEPS = 10_000
_WORK = 1.6e12
_REPORT_EVERY = 50


def steps_for(num_classes: int, dim: int) -> int:
    """10,000 steps, as published, while they take about a minute on 2 cores; fewer for large C, at least 100.

    C²·(d + 150) is about proportional to what a step takes, the 150 standing for the element-wise work. At
    C = 1,000 that is 10,000 steps for d = 10 and 2,416 for d = 512; at C = 21,841 and d = 512 it is 100.
    """
    return int(min(_STEPS, max(100, _WORK / (num_classes**2 * (dim + 150)))))


def uniformity(num_classes: int, dim: int, seed: int, progress: Progress | None = None) -> Tensor:
    """The DL2PA authors' prototypes: minimize log mean_{i≠j} exp(−2‖p_i − p_j‖²) by SGD, rate 0.1.

    On the sphere ‖p_i − p_j‖² = 2 − 2cos, so the loss is a log-sum-exp of cosines at β = 4. Full batches
    here, renormalized each step.

    Returns:
        float32 tensor [C, d] with unit rows; d ≥ 2.
    """
    points = random_points(num_classes, dim, seed)
    steps = steps_for(num_classes, dim)
    for step in range(steps):
        # Both ends of a pair are pulled: the gradient is 2β times the softmax-weighted neighbors.
        gradient = tangent(2 * _UNIFORMITY_BETA * pair_pull(points, _UNIFORMITY_BETA), points)
        points = normalized(points - _LEARNING_RATE * gradient)
        _report(progress, step, steps)
    return points[0]


def hpn(num_classes: int, dim: int, seed: int, progress: Progress | None = None) -> Tensor:
    """Hyperspherical prototype networks: minimize mean_i max_{j≠i} cos by SGD, rate 0.1 and momentum 0.9.

    Mettes, van der Pol and Snoek (2019); renormalized each step, 10,000 steps (:func:`steps_for`).
    The rate never falls, so with few classes (a dozen) the points do not settle: read the certificate.

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
    """Equiangular basis vectors: minimize Σ_{i≠j} relu(|cos_ij| − threshold) by SGD; stops once it is 0.

    Shen et al. (2023), "Equiangular basis vectors", with :func:`ebv_threshold` and a rate falling
    linearly to 0, which a loss of constant slope needs to settle.

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
    """The |cosine| below which a pair costs nothing.

    Published: 0.002 at 1,000×1,000 and 0.05 at 1,000×512. Between and beyond, ours: 1.6 times Welch's bound
    on the largest |cosine|, √((C−d)/(d(C−1))), which passes through both. For C ≫ d Welch's bound is far
    from anything attainable and the points would collapse onto each other, so the bound on 2C points (every
    prototype and its opposite) enters too, times 1.2. Neither goes past halfway between its bound and 1.
    """
    welch = math.sqrt(max(0.0, (num_classes - dim) / (dim * (num_classes - 1))))
    antipodal = max_cosine_bound(2 * num_classes, dim)
    scaled = ((1.6, welch), (1.2, antipodal))
    return max(0.002, *(min(factor * bound, 0.5 * (1.0 + bound)) for factor, bound in scaled))


def _row_blocks(points: Tensor) -> range:
    count = points.shape[0]
    return range(0, count, max(1, min(count, BLOCK_ELEMENTS // count)))


def _nearest_rows(points: Tensor) -> Tensor:
    """Index of each row's nearest other row, int64 [C]."""
    starts = _row_blocks(points)
    nearest: list[Tensor] = []
    for first in starts:
        cosines = points[first : first + starts.step] @ points.T
        cosines.diagonal(offset=first).fill_(-math.inf)
        nearest.append(cosines.argmax(dim=1))
    return torch.cat(nearest)


def _excess_gradient(points: Tensor, threshold: float) -> Tensor:
    """Gradient of the sum over unordered pairs of relu(|cos| − threshold), [C, d]."""
    starts = _row_blocks(points)
    gradients: list[Tensor] = []
    for first in starts:
        cosines = points[first : first + starts.step] @ points.T
        cosines.diagonal(offset=first).zero_()
        sign = cosines.sign().mul_(cosines.abs() > threshold)
        gradients.append(sign @ points)
    return torch.cat(gradients)


def _report(progress: Progress | None, step: int, steps: int) -> None:
    if progress is not None and ((step + 1) % _REPORT_EVERY == 0 or step + 1 == steps):
        progress(step + 1, steps)
