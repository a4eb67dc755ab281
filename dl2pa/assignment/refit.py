"""Move prototypes toward their class directions under a bound on the largest cosine between two prototypes.

This method is specific to dl2pa. DL2PA keeps P fixed and as spread as possible. With d far below C - 1, that
separates similar classes at the expense of classes that are never confused. Here P moves at each assignment update and
only the smallest angle is constrained. If the bound is the largest cosine of the best code, the prototypes can hardly
move; if it is 1, each prototype moves to the mean direction of its class.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from dl2pa.assignment.match import broadcast_verified, is_main
from dl2pa.errors import TrainingFailure

_STEPS = 400
_STEP, _MEAN, _SQUARE, _EPS = 0.05, 0.9, 0.999, 1e-12
_WEIGHT_START, _WEIGHT_END = 1.0, 1000.0


@torch.no_grad()
def refit(
    prototypes_cd: Tensor,
    assignment_c: Tensor,
    directions_cd: Tensor,
    largest_cosine: float,
    group: dist.ProcessGroup | None = None,
) -> float:
    """Move the prototypes in place on rank 0 and broadcast them; a collective.

    Args:
        prototypes_cd: unit rows [C, d].
        assignment_c: σ, int64 [C]; row σ(c) moves toward class c.
        directions_cd: unit direction of each class [C, d]; zero for a class without samples, which has no effect.
        largest_cosine: bound on the cosine between two prototypes.

    Returns:
        Mean cosine between the old and the new prototypes, identical on every rank.

    Raises:
        TrainingFailure: the prototypes differ between ranks after the broadcast, or are not finite.
    """
    before = prototypes_cd.clone()
    if is_main(group):
        rows = before[assignment_c].double().cpu()
        moved = nearest_code(directions_cd.double().cpu(), rows, largest_cosine)
        prototypes_cd[assignment_c] = moved.to(prototypes_cd)
    broadcast_verified(prototypes_cd, "prototypes", group)
    return float((before.double() * prototypes_cd.double()).sum(dim=1).mean())


@torch.no_grad()
def set_directions(
    prototypes_cd: Tensor, assignment_c: Tensor, directions_cd: Tensor, group: dist.ProcessGroup | None = None
) -> None:
    """Replace the prototypes of all classes by their directions, the result of `refit` without a bound; a collective.

    A class with a zero direction keeps its prototype.

    Raises:
        TrainingFailure: the prototypes differ between ranks after the broadcast.
    """
    if is_main(group):
        before = prototypes_cd[assignment_c]
        has_direction = directions_cd.norm(dim=1, keepdim=True) > 0
        prototypes_cd[assignment_c] = torch.where(has_direction, directions_cd.to(before), before)
    broadcast_verified(prototypes_cd, "prototypes", group)


@torch.no_grad()
def nearest_code(directions_cd: Tensor, start_cd: Tensor, largest_cosine: float) -> Tensor:
    """Find unit rows near `directions_cd` whose pairwise cosines are at most `largest_cosine`.

    Minimizes Σ_c (1 - p_c · q_c) + w Σ_{i≠j} max(0, p_i · p_j - largest_cosine)² with Adam. The weight w rises from 1
    to 1000 and the step falls to 0. The result is deterministic on one processor.

    Args:
        directions_cd: q, float64 [C, d], unit or zero rows.
        start_cd: initial rows, float64 [C, d].

    Returns:
        float64 [C, d]. A feasible bound is met up to about 5e-4; a bound below the largest cosine of the best code is
        exceeded.

    Raises:
        TrainingFailure: the result is not finite.
    """
    points, largest = start_cd.clone(), largest_cosine
    mean, square = torch.zeros_like(points), torch.zeros_like(points)
    for step in range(_STEPS):
        share = step / _STEPS
        weight = _WEIGHT_START * (_WEIGHT_END / _WEIGHT_START) ** share
        lengths = points.norm(dim=1, keepdim=True)
        unit = points / lengths
        excess = unit @ unit.T
        excess.fill_diagonal_(largest).sub_(largest).clamp_(min=0)
        gradient = 4 * weight * (excess @ unit) - directions_cd
        gradient = (gradient - (gradient * unit).sum(dim=1, keepdim=True) * unit) / lengths
        mean.lerp_(gradient, 1 - _MEAN)
        square.lerp_(gradient.square(), 1 - _SQUARE)
        size = _STEP * (1 - share) * math.sqrt(1 - _SQUARE ** (step + 1)) / (1 - _MEAN ** (step + 1))
        points.addcdiv_(mean, square.sqrt().add_(_EPS), value=-size)
    points = F.normalize(points, dim=1)
    if not bool(points.isfinite().all()):
        raise TrainingFailure("the prototypes are not finite after an assignment update")
    return points
