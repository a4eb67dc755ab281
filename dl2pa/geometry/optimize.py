"""Points on a sphere with a small largest cosine, by an annealed log-sum-exp over all pairs.

For C > 2d no closed form is known in general. The largest cosine is smooth nowhere it matters, so a smooth
stand-in is minimized instead: log Σ_{i≠j} exp(β cos_ij) / β, which tends to the largest cosine as β grows.
A small β spreads the points evenly and leaves few poor basins; raising β by a constant factor a step
narrows the objective to the closest pairs. Which basin the points end in depends on the start, so a small
problem is run from many starts side by side and the best one is kept.

Every iteration count follows from C and d alone, never from a clock: a seed gives the same points again on
the same machine and thread count (up to C = 512 on any thread count).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dl2pa.geometry.certificate import BLOCK_ELEMENTS, nearest_cosines

Progress = Callable[[int, int], None]
"""Called as ``progress(done, total)`` with counts of optimization steps."""

_MOST_STARTS, _START_PAIRS = 24, 240_000
_MOST_STEPS, _FEWEST_STEPS, _WORK = 4_000, 100, 3e11
_LARGEST_ON_ONE_THREAD = 512
_LARGEST_IN_DOUBLE = 4_096
_REPORT_EVERY = 50
_ADAM_MEAN, _ADAM_SQUARE, _ADAM_EPS = 0.9, 0.99, 1e-12


@dataclass(frozen=True)
class Stage:
    """One annealing pass; β and the step length move geometrically from start to end.

    Attributes:
        steps: number of Adam steps.
        beta_start, beta_end: inverse temperature.
        step_start, step_end: Adam step length; the typical angle a point moves, in radians.
    """

    steps: int
    beta_start: float
    beta_end: float
    step_start: float
    step_end: float


@dataclass(frozen=True)
class Plan:
    """How a C×d problem is attacked: starts run side by side, then the best one polished in float64."""

    starts: int
    anneal: Stage
    polish: Stage


def plan_for(num_classes: int, dim: int) -> Plan:
    """The plan for C×d: many starts while the pairs are few, fewer steps once a step takes long.

    The temperatures and step lengths are the best or tied among those measured at C = 100 and 200: starts at
    β = 1 to 100, ends at 1e3 to 1e5, first steps 0.1 and 0.3. Ending at β = 1e3 stays about 1 % above ending
    at 1e4; ending at β ≥ 1e4 with a last step of 3e-3 is 3 to 50 % worse. The counts aim at 10 to 20 s up to
    C = 1,000. A step costs 4·C²·d operations: 10 s at C = 21,841 and d = 512, so the 125 take 20 minutes.
    """
    pairs = num_classes * num_classes
    starts = max(1, min(_MOST_STARTS, _START_PAIRS // pairs))
    # (d + 150) is about proportional to the measured time a pair takes, the 150 being the element-wise work.
    steps = int(min(_MOST_STEPS, max(_FEWEST_STEPS, _WORK / (starts * pairs * (dim + 150)))))
    return Plan(
        starts=starts,
        anneal=Stage(steps, 3.0, 1e4, 0.1, 3e-4),
        polish=Stage(steps // 4, 1e4, 1e6, 1e-4, 1e-6),
    )


def minimize_max_cosine(
    num_classes: int, dim: int, seed: int, progress: Progress | None = None, plan: Plan | None = None
) -> Tensor:
    """C unit vectors in R^d, d ≥ 2, whose largest pairwise cosine is small.

    Args:
        num_classes: C.
        dim: d.
        seed: of the random starts.
        progress: told the steps done and their total.
        plan: how to search; by default :func:`plan_for`.

    Returns:
        float32 tensor [C, d] with unit rows.
    """
    plan = plan or plan_for(num_classes, dim)
    total = plan.anneal.steps + plan.polish.steps
    points = random_points(num_classes, dim, seed, plan.starts)
    points = anneal(points, plan.anneal, 0, total, progress)
    best = min(range(plan.starts), key=lambda start: float(nearest_cosines(points[start]).max()))
    # Past β ≈ 1e4 float32 cosines are coarse for the exponent; large C cannot afford double.
    polished = points[best : best + 1]
    if num_classes <= _LARGEST_IN_DOUBLE:
        polished = polished.double()
    polished = anneal(polished, plan.polish, plan.anneal.steps, total, progress)
    candidates = [points[best], polished[0].to(points.dtype)]
    return min(candidates, key=lambda candidate: float(nearest_cosines(candidate).max()))


@contextmanager
def threads_for(num_classes: int) -> Generator[None, None, None]:
    """One thread for small problems while inside, for the whole process.

    Their steps last about a millisecond: a second thread gains little on idle cores, and on busy ones waiting
    for it has cost ten times the step.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if num_classes <= _LARGEST_ON_ONE_THREAD else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_points(num_classes: int, dim: int, seed: int, starts: int = 1) -> Tensor:
    """Uniformly random unit rows, float32 [starts, C, d]."""
    generator = torch.Generator().manual_seed(seed)
    return normalized(torch.randn(starts, num_classes, dim, generator=generator))


def normalized(points: Tensor) -> Tensor:
    """Rows scaled to unit length along the last axis."""
    return points / torch.linalg.vector_norm(points, dim=-1, keepdim=True)


def pair_pull(points: Tensor, beta: float) -> Tensor:
    """Each point's neighbors, averaged with weights softmax over all pairs of β·cos.

    This is half the gradient of log Σ_{i≠j} exp(β cos_ij) / β, and needs no C×C matrix: rows go in blocks,
    each with its own largest exponent, put on one scale at the end.

    Args:
        points: [S, C, d], S separate problems.
        beta: inverse temperature.

    Returns:
        [S, C, d].
    """
    starts, count, _ = points.shape
    rows = max(1, min(count, BLOCK_ELEMENTS // (starts * count)))
    transposed = points.transpose(1, 2)
    pull = torch.empty_like(points)
    peaks: list[Tensor] = []
    sums: list[Tensor] = []
    for first in range(0, count, rows):
        weights = torch.bmm(points[:, first : first + rows], transposed)
        weights.diagonal(offset=first, dim1=1, dim2=2).fill_(-math.inf)
        peak = weights.amax(dim=(1, 2), keepdim=True)
        weights.sub_(peak).mul_(beta).exp_()
        pull[:, first : first + rows] = torch.bmm(weights, points)
        peaks.append(peak)
        sums.append(weights.sum(dim=(1, 2), keepdim=True))
    peak_sbk = torch.cat(peaks, dim=1)
    scale = ((peak_sbk - peak_sbk.amax(dim=1, keepdim=True)) * beta).exp()
    total = (scale * torch.cat(sums, dim=1)).sum(dim=1, keepdim=True)
    for block, first in enumerate(range(0, count, rows)):
        pull[:, first : first + rows] *= scale[:, block : block + 1] / total
    return pull


def tangent(gradient: Tensor, points: Tensor) -> Tensor:
    """The part of ``gradient`` along the sphere at ``points``; both [..., d]."""
    return gradient - (gradient * points).sum(dim=-1, keepdim=True) * points


def anneal(points: Tensor, stage: Stage, done: int, total: int, progress: Progress | None) -> Tensor:
    """Adam on the sphere while β rises and the step shrinks; ``points`` [S, C, d]."""
    mean, square = torch.zeros_like(points), torch.zeros_like(points)
    # Dividing by √d makes the step length an angle: Adam moves every coordinate by about as much.
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
