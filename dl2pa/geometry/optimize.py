"""Minimize the largest pairwise cosine of points on the sphere by annealing a log-sum-exp over all pairs.

For C > 2d no closed form is known in general. The largest cosine is not smooth, so a smooth approximation is
minimized: log Σ_{i≠j} exp(β cos_ij) / β, which converges to the largest cosine as β grows. A small β spreads the
points evenly and has few poor local minima; multiplying β by a constant factor per step concentrates the objective
on the closest pairs. The local minimum depends on the start, so small problems use several starts.

The number of steps depends only on C and d, not on time: a seed gives identical points on the same machine with the
same number of threads (up to C = 512 with any number of threads).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dl2pa.geometry.certificate import nearest_cosines, row_blocks

Progress = Callable[[int, int], None]
"""Callback `progress(done, total)` with numbers of optimization steps."""

_MAX_STARTS, _START_PAIRS = 24, 240_000
_MIN_STEPS, _MAX_STEPS, _WORK = 100, 4_000, 3e11
_MAX_CLASSES_ON_ONE_THREAD = 512
_MAX_CLASSES_IN_FLOAT64 = 4_096
_REPORT_EVERY = 50
_ADAM_MEAN, _ADAM_SQUARE, _ADAM_EPS = 0.9, 0.99, 1e-12


@dataclass(frozen=True)
class Stage:
    """One annealing pass; β and the step length change geometrically from start to end.

    Attributes:
        steps: number of Adam steps.
        beta_start, beta_end: inverse temperature.
        step_start, step_end: Adam step length, about the angle in radians by which a point moves.
    """

    steps: int
    beta_start: float
    beta_end: float
    step_start: float
    step_end: float


@dataclass(frozen=True)
class Plan:
    """Optimization plan: `starts` problems are annealed in parallel, then the best one is polished in float64."""

    starts: int
    anneal: Stage
    polish: Stage


def plan_for(num_classes: int, dim: int) -> Plan:
    """Plan for C×d: several starts if there are few pairs, fewer steps if a step is slow.

    The values of β and the step lengths are the best, or tied with the best, of those measured at C = 100 and 200:
    initial β 1 to 100, final β 1e3 to 1e5, initial step length 0.1 and 0.3. The largest cosine is about 1 % higher with
    a final β of 1e3 than of 1e4, and 3 to 50 % higher with a final β ≥ 1e4 and a final step length of 3e-3. The target
    time is 10 to 20 s up to C = 1,000. A step takes 4·C²·d operations: 10 s at C = 21,841 and d = 512, so 125 steps
    take 20 minutes.
    """
    pairs = num_classes * num_classes
    starts = max(1, min(_MAX_STARTS, _START_PAIRS // pairs))
    # The measured time per pair is about proportional to d + 150; 150 accounts for the element-wise operations.
    steps = int(min(_MAX_STEPS, max(_MIN_STEPS, _WORK / (starts * pairs * (dim + 150)))))
    return Plan(
        starts=starts,
        anneal=Stage(steps, 3.0, 1e4, 0.1, 3e-4),
        polish=Stage(steps // 4, 1e4, 1e6, 1e-4, 1e-6),
    )


def minimize_max_cosine(
    num_classes: int, dim: int, seed: int, progress: Progress | None = None, plan: Plan | None = None
) -> Tensor:
    """Search for C unit vectors in R^d, d ≥ 2, with a small largest pairwise cosine.

    Args:
        num_classes: C.
        dim: d.
        seed: seed of the random starts.
        progress: called with the steps done and their total.
        plan: default: `plan_for(C, d)`.

    Returns:
        float32 tensor [C, d] with unit rows.
    """
    plan = plan or plan_for(num_classes, dim)
    total = plan.anneal.steps + plan.polish.steps
    points = random_points(num_classes, dim, seed, plan.starts)
    points = anneal(points, plan.anneal, 0, total, progress)
    best = min(range(plan.starts), key=lambda start: float(nearest_cosines(points[start]).max()))
    # Above β ≈ 1e4 float32 cosines are too coarse for the exponent; for large C, float64 is too slow.
    polished = points[best : best + 1]
    if num_classes <= _MAX_CLASSES_IN_FLOAT64:
        polished = polished.double()
    polished = anneal(polished, plan.polish, plan.anneal.steps, total, progress)
    candidates = [points[best], polished[0].to(points.dtype)]
    return min(candidates, key=lambda candidate: float(nearest_cosines(candidate).max()))


@contextmanager
def threads_for(num_classes: int) -> Generator[None, None, None]:
    """Limit torch to one thread for small problems, process-wide.

    A step of a small problem takes about a millisecond. A second thread gains little on idle cores; on busy cores,
    waiting for it has taken ten times as long as the step.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if num_classes <= _MAX_CLASSES_ON_ONE_THREAD else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_points(num_classes: int, dim: int, seed: int, starts: int = 1) -> Tensor:
    """Uniformly random unit rows, float32 [starts, C, d]."""
    generator = torch.Generator().manual_seed(seed)
    return normalized(torch.randn(starts, num_classes, dim, generator=generator))


def normalized(points: Tensor) -> Tensor:
    """Normalize to unit norm along the last axis."""
    return points / torch.linalg.vector_norm(points, dim=-1, keepdim=True)


def pair_pull(points: Tensor, beta: float) -> Tensor:
    """Weighted sum of the neighbors of each point, with weights softmax(β·cos) over all pairs.

    The result is half the gradient of log Σ_{i≠j} exp(β cos_ij) / β. No C×C matrix is stored: exponents are computed
    in blocks of rows relative to the maximum of the block, and the blocks are rescaled at the end.

    Args:
        points: S independent problems, [S, C, d].
        beta: inverse temperature.

    Returns:
        [S, C, d].
    """
    starts, count, _ = points.shape
    # Arithmetic with subnormal numbers and exp with such a result take up to ten times as long. Weights this small
    # change no sum; the quarter that remains of the range of exponents keeps their products with coordinates normal.
    lowest = 0.75 * math.log(torch.finfo(points.dtype).tiny)
    blocks = row_blocks(count, starts * count)
    rows = blocks.step
    transposed = points.transpose(1, 2)
    pull = torch.empty_like(points)
    peaks: list[Tensor] = []
    sums: list[Tensor] = []
    for first in blocks:
        weights = torch.bmm(points[:, first : first + rows], transposed)
        weights.diagonal(offset=first, dim1=1, dim2=2).fill_(-math.inf)
        peak = weights.amax(dim=(1, 2), keepdim=True)
        weights.sub_(peak).mul_(beta).clamp_(min=lowest).exp_()
        pull[:, first : first + rows] = torch.bmm(weights, points)
        peaks.append(peak)
        sums.append(weights.sum(dim=(1, 2), keepdim=True))
    peak_sbk = torch.cat(peaks, dim=1)
    scale = ((peak_sbk - peak_sbk.amax(dim=1, keepdim=True)) * beta).exp()
    total = (scale * torch.cat(sums, dim=1)).sum(dim=1, keepdim=True)
    for block, first in enumerate(blocks):
        pull[:, first : first + rows] *= scale[:, block : block + 1] / total
    return pull


def tangent(gradient: Tensor, points: Tensor) -> Tensor:
    """Project `gradient` on the tangent space of the sphere at `points`; both [..., d]."""
    return gradient - (gradient * points).sum(dim=-1, keepdim=True) * points


def anneal(points: Tensor, stage: Stage, done: int, total: int, progress: Progress | None) -> Tensor:
    """Run Adam on the sphere with rising β and falling step length; `points` [S, C, d]."""
    mean, square = torch.zeros_like(points), torch.zeros_like(points)
    # Adam moves every coordinate by about the same amount, so dividing by √d makes the step length an angle.
    per_coordinate = 1.0 / math.sqrt(points.shape[-1])
    for step in range(stage.steps):
        share = step / max(1, stage.steps - 1)
        beta = stage.beta_start * (stage.beta_end / stage.beta_start) ** share
        length = stage.step_start * (stage.step_end / stage.step_start) ** share * per_coordinate
        gradient = tangent(pair_pull(points, beta), points)
        mean.lerp_(gradient, 1 - _ADAM_MEAN)
        square.mul_(_ADAM_SQUARE).addcmul_(gradient, gradient, value=1 - _ADAM_SQUARE)
        root = (square / (1 - _ADAM_SQUARE ** (step + 1))).sqrt_().add_(_ADAM_EPS)
        points = normalized(points.addcdiv(mean, root, value=-length / (1 - _ADAM_MEAN ** (step + 1))))
        if progress is not None and (step + 1) % _REPORT_EVERY == 0:
            progress(done + step + 1, total)
    if progress is not None:
        progress(done + stage.steps, total)
    return points
