"""Rotate the prototypes to the class means: an orthogonal map keeps every angle between two prototypes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from dl2pa.assignment.match import broadcast_verified, is_main


@torch.no_grad()
def rotate(
    prototypes_cd: Tensor, assignment_c: Tensor, directions_cd: Tensor, group: dist.ProcessGroup | None = None
) -> float:
    """Rotate the prototypes in place on rank 0 and broadcast them; a collective.

    Args:
        prototypes_cd: unit rows [C, d].
        assignment_c: σ, int64 [C].
        directions_cd: unit direction of each class [C, d]; zero for a class without samples, which has no effect.

    Returns:
        Mean cosine between the old and the new prototypes, identical on every rank.

    Raises:
        TrainingFailure: the prototypes differ between ranks after the broadcast.
    """
    before = prototypes_cd.clone()
    if is_main(group):
        points = before.double().cpu()
        rotation = best_rotation(points[assignment_c.cpu()], directions_cd.double().cpu())
        prototypes_cd.copy_(F.normalize(points @ rotation, dim=1))
    broadcast_verified(prototypes_cd, "prototypes", group)
    return float((before.double() * prototypes_cd.double()).sum(dim=1).mean())


def best_rotation(points_cd: Tensor, directions_cd: Tensor) -> Tensor:
    """Return the orthogonal matrix R [d, d] that minimizes ‖points R − directions‖ (orthogonal Procrustes problem,
    Schönemann, Psychometrika 1966)."""
    left, _, right = torch.linalg.svd(points_cd.T @ directions_cd)
    return left @ right
