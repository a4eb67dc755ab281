"""Prototypes from class vectors that encode class similarity, such as word vectors, attributes or class means."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dl2pa.errors import UserError
from dl2pa.geometry.certificate import nearest_cosines

_MAX_COSINE = 1.0 - 1e-9
_MIN_RELATIVE_NORM = 1e-6


def principal_directions(vectors_ck: Tensor, dim: int) -> Tensor:
    """Reduce class vectors [C, k] to d dimensions by PCA and normalize them: float64 [C, d].

    With fewer than d principal components, the remaining coordinates are zero. A vector equal to the mean becomes a
    zero row.
    """
    return F.normalize(_principal_components(vectors_ck, dim), dim=1)


def directions_of_seen(rows_ck: Tensor, dim: int) -> Tensor:
    """`principal_directions` of the non-zero rows; the others are not part of the PCA and stay zero.

    Args:
        rows_ck: class means [C, k]; zero for a class without samples.
    """
    seen = rows_ck.norm(dim=1) > 0
    if bool(seen.all()):
        return principal_directions(rows_ck, dim)
    directions = rows_ck.new_zeros(len(rows_ck), dim, dtype=torch.float64)
    if bool(seen.any()):
        directions[seen] = principal_directions(rows_ck[seen], dim)
    return directions


def prototypes_from_vectors(vectors_ck: Tensor, dim: int) -> Tensor:
    """Prototypes [C, d], float32, from class vectors [C, k] by `principal_directions`.

    Raises:
        UserError: two classes would have the same prototype, or a class would have none.
    """
    components = _principal_components(vectors_ck, dim)
    rows, norms = F.normalize(components, dim=1), components.norm(dim=1)
    at_mean = (norms <= _MIN_RELATIVE_NORM * norms.max()).nonzero().flatten().tolist()
    duplicates = (nearest_cosines(rows) > _MAX_COSINE).nonzero().flatten().tolist()
    if at_mean:
        message = f"in {dim} dimensions the vector of class {at_mean[0]} equals the mean vector and has no direction"
    elif duplicates:
        other = int((rows @ rows[duplicates[0]]).topk(2).indices.max())
        message = (
            f"in {dim} dimensions the vectors of classes {duplicates[0]} and {other} have the same direction"
        )
    else:
        return rows.float()
    remedy = "Give class vectors that are different for all classes, or a larger model.embedding_dim."
    raise UserError("method.class_vectors", f"{len(rows)} vectors", message, remedy)


def _principal_components(vectors_ck: Tensor, dim: int) -> Tensor:
    """Coordinates along the d leading principal components, largest variance first, float64 [C, d]."""
    centered = vectors_ck.double() - vectors_ck.double().mean(dim=0)
    left, values, _ = torch.linalg.svd(centered, full_matrices=False)
    return F.pad((left * values)[:, :dim], (0, max(0, dim - len(values))))
