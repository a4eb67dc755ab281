"""Search for good prototypes where no optimum is proven: known codes, the optimizer, and the optimizer on codes.

Candidates are a known code, the result of the optimizer, and the code optimized in all d dimensions. The candidate
with the smallest largest cosine is returned; of equal candidates, the known code.
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

_TOLERANCE = 1e-6
_MAX_CLASSES_TO_OPTIMIZE = 4_096
"""Above this number of classes the optimizer has too few steps to improve on a code that is near the bound."""
_MAX_CLASSES_IN_PAIRS = 32_768
"""Above this number of classes the cosines of all pairs are not computed."""
_NEAR_BOUND = 2.0
_MAX_RATIO_TO_REFINE = 1.25
_MAX_STARTS, _START_PAIRS = 4, 80_000
_NOISE = 0.03
_CHUNK = 65_536


@dataclass(frozen=True)
class Candidate:
    """Points [C, d] and the name of their construction."""

    points: Tensor
    construction: str


def best_known(num_classes: int, dim: int, seed: int) -> Candidate | None:
    """Build the best combination of known codes for C > 2d; None if no combination has C points."""
    combination = best_combination(num_classes, dim)
    return None if combination is None else _from_codes(combination, dim, seed)


def search_prototypes(num_classes: int, dim: int, seed: int, progress: Progress | None = None) -> Candidate:
    """Return the best candidate for C > 2d and d ≥ 3; deterministic for a seed.

    Args:
        num_classes: C.
        dim: d.
        seed: seed of the optimizer's starts, of the noise and of subsets of very large codes.
        progress: called with the steps done and their total.
    """
    if num_classes > _MAX_CLASSES_IN_PAIRS:
        return _search_without_pairs(num_classes, dim, seed)
    combination = best_combination(num_classes, dim)
    known = None if combination is None else _from_codes(combination, dim, seed)
    if combination is not None and known is not None and _is_good_enough(combination, dim):
        return known
    plan = optimize.plan_for(num_classes, dim)
    stage = _refining_stage(plan)
    search_steps = plan.anneal.steps + plan.polish.steps
    total = search_steps + (0 if known is None else stage.steps)

    def report(done: int, _: int) -> None:
        if progress is not None:
            progress(done, total)

    optimized = Candidate(optimize.minimize_max_cosine(num_classes, dim, seed, report), "max_cosine")
    if known is None:
        return optimized
    candidates = [known, optimized]
    if _max_cosine(known.points) <= _MAX_RATIO_TO_REFINE * max(0.0, _max_cosine(optimized.points)):
        refined = _refine(known.points, seed, stage, lambda done, _: report(search_steps + done, total))
        candidates.append(Candidate(refined, f"max_cosine from {known.construction}"))
    report(total, total)
    return _best(candidates)


def _from_codes(combination: Combination, dim: int, seed: int) -> Candidate:
    return Candidate(build_combination(combination, dim, seed).float(), f"known: {combination}")


def _search_without_pairs(num_classes: int, dim: int, seed: int) -> Candidate:
    """The better of known codes and dual BCH codes by their closed-form cosines; random points if neither exists."""
    combination = best_combination(num_classes, dim)
    degree, errors, cosine = _best_dual_bch(num_classes, dim)
    if combination is not None and combination.cosine <= cosine:
        return _from_codes(combination, dim, seed)
    points = torch.zeros(num_classes, dim)
    if not degree:
        torch.randn(points.shape, generator=torch.Generator().manual_seed(seed), out=points)
        for part in points.split(_CHUNK):
            part.copy_(torch.nn.functional.normalize(part, dim=1))
        return Candidate(points, "random")
    length = 1 << degree
    points[:, :length] = torch.from_numpy(sequences.dual_bch(degree, errors, num_classes, seed))
    points[:, :length] /= length**0.5
    size = f"{num_classes} of {1 << (1 + errors * degree)}x{length}"
    return Candidate(points, f"dual BCH {length}, {errors} errors ({size})")


def _best_dual_bch(num_classes: int, dim: int) -> tuple[int, int, float]:
    """Degree, errors and largest cosine of the best dual BCH code with C words; (0, 0, 1.0) if there is none."""
    usable = [
        (sequences.dual_bch_correlation(degree, errors) / (1 << degree), degree, errors)
        for degree in sequences.DEGREES
        for errors in (2, 3)
        if 1 << degree <= dim and 1 << (1 + errors * degree) >= num_classes and degree > 2 * errors
    ]
    cosine, degree, errors = min(usable, default=(1.0, 0, 0))
    return degree, errors, cosine


def _is_good_enough(combination: Combination, dim: int) -> bool:
    """Whether the combination is optimal, or too large and too near the bound for the optimizer to improve it."""
    bound = max_cosine_bound(combination.num_classes, dim)
    if combination.cosine <= bound + _TOLERANCE:
        return True
    return combination.num_classes > _MAX_CLASSES_TO_OPTIMIZE and combination.cosine <= _NEAR_BOUND * bound


def _refining_stage(plan: Plan) -> Stage:
    """Annealing of a code: β = 30 is low enough to leave its subspace and high enough to keep its structure."""
    return Stage(plan.anneal.steps // 3, 30.0, 1e6, 0.02, 1e-6)


def _refine(points: Tensor, seed: int, stage: Stage, progress: Progress) -> Tensor:
    """Anneal copies of a code with a little noise in all d dimensions and return the best, float32 [C, d]."""
    count, dim = points.shape
    starts = max(1, min(_MAX_STARTS, _START_PAIRS // (count * count)))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(starts, count, dim, generator=generator) * (_NOISE / dim**0.5)
    refined = optimize.anneal(optimize.normalized((points + noise).double()), stage, 0, stage.steps, progress)
    return min((start.float() for start in refined), key=_max_cosine)


def _best(candidates: list[Candidate]) -> Candidate:
    """The first candidate whose largest cosine is within rounding of the smallest."""
    cosines = [_max_cosine(candidate.points) for candidate in candidates]
    limit = min(cosines) + _TOLERANCE
    return next(candidate for candidate, cosine in zip(candidates, cosines, strict=True) if cosine <= limit)


def _max_cosine(points: Tensor) -> float:
    return float(nearest_cosines(points).max())
