"""Prototypes that follow their classes: as near to the class directions as a largest cosine between any two allows.

Ours; no source. The method holds P fixed and as spread as can be. With d far below C - 1 that pays for an angle
between classes that look alike with an angle between classes that never meet. Here P moves at each matching, and what
is held is the least angle alone: at the best code's own largest cosine there is hardly any freedom left, at 1 each
prototype stands at its class's mean direction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from dl2pa.assignment.match import verify_same
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
    """Move the prototypes in place, on rank 0, and broadcast them. A collective.

    Args:
        prototypes_cd: unit rows [C, d].
        assignment_c: σ, int64 [C]: row σ(c) follows class c.
        directions_cd: unit direction of each class [C, d]; zero for a class never seen, which pulls at nothing.
        largest_cosine: between two prototypes.

    Returns:
        Mean cosine between where a prototype stood and where it stands now; the same on every rank.

    Raises:
        TrainingFailure: the ranks hold different prototypes afterward.
    """
    before = prototypes_cd.clone()
    if not dist.is_initialized() or dist.get_rank(group) == 0:
        rows = before[assignment_c].double().cpu()
        moved = nearest_code(directions_cd.double().cpu(), rows, largest_cosine)
        prototypes_cd[assignment_c] = moved.to(prototypes_cd)
    if dist.is_initialized():
        dist.broadcast(prototypes_cd, group=group, group_src=0)
        verify_same(prototypes_cd, "prototypes", group)
    return float((before.double() * prototypes_cd.double()).sum(dim=1).mean())


@torch.no_grad()
def nearest_code(directions_cd: Tensor, start_cd: Tensor, largest_cosine: float) -> Tensor:
    """Unit rows near to `directions_cd`, no two closer than `largest_cosine` as far as that can be had.

    Minimizes Σ_c (1 - p_c · q_c) + w Σ_{i≠j} max(0, p_i · p_j - largest_cosine)² with Adam, w rising from 1 to 1000,
    the step falling to 0; each row is normalized where it is used. A function of its arguments on one processor.

    Args:
        directions_cd: q, float64 [C, d], unit or zero rows.
        start_cd: where the rows start, float64 [C, d].

    Returns:
        float64 [C, d]. The largest cosine is met to about 5e-4 where room is left; where none is (below the best code's
        own) the rows lie as far apart as the weights balance.
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
        slope = 4 * weight * (excess @ unit) - directions_cd
        slope = (slope - (slope * unit).sum(dim=1, keepdim=True) * unit) / lengths
        mean.lerp_(slope, 1 - _MEAN)
        square.lerp_(slope.square(), 1 - _SQUARE)
        size = _STEP * (1 - share) * math.sqrt(1 - _SQUARE ** (step + 1)) / (1 - _MEAN ** (step + 1))
        points.addcdiv_(mean, square.sqrt().add_(_EPS), value=-size)
    found = F.normalize(points, dim=1)
    if not bool(found.isfinite().all()):
        raise TrainingFailure("the prototypes moved at a matching are not finite")
    return found
