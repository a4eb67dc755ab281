"""The best points found for C×d where no optimum is proven: known codes, the optimizer, and the one from the other.

A known code is never made worse: it, the optimizer's best and the code moved into the dimensions it leaves free are
measured alike, and the smallest largest cosine wins; of equals, the known code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dl2pa.geometry import optimize, sequences
from dl2pa.geometry.bounds import max_cosine_bound
from dl2pa.geometry.certificate import nearest_cosines
from dl2pa.geometry.known import Combination, best_combination, build_combination
from dl2pa.geometry.optimize import Plan, Progress, Stage

_EQUAL = 1e-6
_OPTIMIZER_UP_TO = 4_096
"""Beyond this many classes the optimizer has too few steps to come near a code that is near the bound."""
_PAIRS_UP_TO = 32_768
"""Beyond this many classes nothing here looks at all pairs."""
_NEAR_BOUND = 2.0
_WORTH_MOVING = 1.25
_MOST_STARTS, _START_PAIRS = 4, 80_000
_NOISE = 0.03
_CHUNK = 65_536


@dataclass(frozen=True)
class Found:
    """Points [C, d], and how they came about, for the certificate."""

    points: Tensor
    construction: str


def best_known(num_classes: int, dim: int, seed: int) -> Found | None:
    """The best combination of known codes for C > 2d, or None where they have no room."""
    combination = best_combination(num_classes, dim)
    if combination is None:
        return None
    return Found(build_combination(combination, dim, seed).float(), f"known: {combination}")


def best_found(num_classes: int, dim: int, seed: int, progress: Progress | None = None) -> Found:
    """The best of everything here for C > 2d and d ≥ 3; a seed gives the same points again.

    Args:
        num_classes: C.
        dim: d.
        seed: of the optimizer's starts, of the noise, and of subsets of very large codes.
        progress: told the steps done and their total.
    """
    if num_classes > _PAIRS_UP_TO:
        return _found_without_pairs(num_classes, dim, seed)
    combination = best_combination(num_classes, dim)
    known = best_known(num_classes, dim, seed)
    if combination is not None and known is not None and _settled(combination, dim):
        return known
    plan = optimize.plan_for(num_classes, dim)
    moving = None if known is None else _moving_stage(plan)
    mine = plan.anneal.steps + plan.polish.steps
    total = mine + (moving.steps if moving is not None else 0)

    def report(done: int, _: int) -> None:
        if progress is not None:
            progress(done, total)

    optimized = Found(optimize.minimize_max_cosine(num_classes, dim, seed, report), "max_cosine")
    if known is None or moving is None:
        return optimized
    candidates = [known, optimized]
    if _cosine(known.points) <= _WORTH_MOVING * max(0.0, _cosine(optimized.points)):
        moved = _moved(known.points, seed, moving, lambda done, _: report(mine + done, total))
        candidates.append(Found(moved, f"max_cosine from {known.construction}"))
    report(total, total)
    return _smallest(candidates)


def _found_without_pairs(num_classes: int, dim: int, seed: int) -> Found:
    """The known codes or a dual BCH code, by their written cosines; random points where neither has room."""
    combination = best_combination(num_classes, dim)
    degree, errors, cosine = _dual_bch_for(num_classes, dim)
    if combination is not None and combination.cosine <= cosine:
        return Found(build_combination(combination, dim, seed).float(), f"known: {combination}")
    points = torch.zeros(num_classes, dim)
    if not degree:
        torch.randn(points.shape, generator=torch.Generator().manual_seed(seed), out=points)
        for part in points.split(_CHUNK):
            part.copy_(torch.nn.functional.normalize(part, dim=1))
        return Found(points, "random")
    length = 1 << degree
    words = sequences.dual_bch(degree, errors, num_classes, seed)
    points[:, :length] = torch.from_numpy(words)
    points[:, :length] /= length**0.5
    return Found(
        points, f"dual BCH {length}, {errors} errors ({num_classes} of {1 << (1 + errors * degree)}x{length})"
    )


def _dual_bch_for(num_classes: int, dim: int) -> tuple[int, int, float]:
    """Degree, errors and largest cosine of the best dual BCH code with room; degree 0 and 1.0: there is none."""
    usable = [
        (sequences.dual_bch_correlation(degree, errors) / (1 << degree), degree, errors)
        for degree in sequences.DEGREES
        for errors in (2, 3)
        if 1 << degree <= dim and 1 << (1 + errors * degree) >= num_classes and degree > 2 * errors
    ]
    cosine, degree, errors = min(usable, default=(1.0, 0, 0))
    return degree, errors, cosine


def _settled(combination: Combination, dim: int) -> bool:
    """Whether the optimizer cannot, or is not worth trying to, do better."""
    bound = max_cosine_bound(combination.num_classes, dim)
    if combination.cosine <= bound + _EQUAL:
        return True
    return combination.num_classes > _OPTIMIZER_UP_TO and combination.cosine <= _NEAR_BOUND * bound


def _moving_stage(plan: Plan) -> Stage:
    """Warm enough (β = 30) to leave the code's subspace, cool enough not to forget the code."""
    return Stage(plan.anneal.steps // 3, 30.0, 1e6, 0.02, 1e-6)


def _moved(points: Tensor, seed: int, stage: Stage, progress: Progress) -> Tensor:
    """A code annealed from a little noise in all d dimensions, the best of a few tries; float32 [C, d]."""
    count, dim = points.shape
    starts = max(1, min(_MOST_STARTS, _START_PAIRS // (count * count)))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(starts, count, dim, generator=generator) * (_NOISE / dim**0.5)
    moved = optimize.anneal(optimize.normalized((points + noise).double()), stage, 0, stage.steps, progress)
    return min((start.float() for start in moved), key=_cosine)


def _smallest(candidates: list[Found]) -> Found:
    """The first whose largest cosine is within rounding of the smallest."""
    cosines = [_cosine(found.points) for found in candidates]
    least = min(cosines)
    return next(found for found, cosine in zip(candidates, cosines, strict=True) if cosine <= least + _EQUAL)


def _cosine(points: Tensor) -> float:
    return float(nearest_cosines(points).max())
