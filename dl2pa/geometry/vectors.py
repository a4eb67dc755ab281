"""Directions on the sphere from vectors that say how alike the classes are: word vectors, attributes, means."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dl2pa.errors import UserError
from dl2pa.geometry.certificate import nearest_cosines

_SAME = 1.0 - 1e-9
_NOTHING = 1e-6


def principal_directions(vectors_ck: Tensor, dim: int) -> Tensor:
    """Vectors [C, k] reduced to d dimensions by PCA: unit rows, float64 [C, d].

    The vectors are centerd, projected on their d leading principal components and scaled to length 1. With fewer
    than d components the rest of the coordinates are zero. A vector equal to the mean gives a zero row.
    """
    return F.normalize(_principal_part(vectors_ck, dim), dim=1)


def prototypes_from_vectors(vectors_ck: Tensor, dim: int) -> Tensor:
    """Prototypes from class vectors [C, k] (`principal_directions`), float32 [C, d].

    Raises:
        UserError: two classes would share a prototype, or one would have none.
    """
    part = _principal_part(vectors_ck, dim)
    rows, lengths = F.normalize(part, dim=1), part.norm(dim=1)
    remedy = "Give class vectors that tell all classes apart, or a larger model.embedding_dim."
    lost = (lengths <= _NOTHING * lengths.max()).nonzero().flatten().tolist()
    if lost:
        message = (
            f"the vector of class {lost[0]} is the mean of all: reduced to d = {dim} nothing is left of it"
        )
        raise UserError("method.class_vectors", f"{len(rows)} vectors", message, remedy)
    twins = (nearest_cosines(rows) > _SAME).nonzero().flatten().tolist()
    if twins:
        other = int((rows @ rows[twins[0]]).topk(2).indices.max())
        message = f"the vectors of classes {twins[0]} and {other} coincide when reduced to d = {dim}"
        raise UserError("method.class_vectors", f"{len(rows)} vectors", message, remedy)
    return rows.float()


def _principal_part(vectors_ck: Tensor, dim: int) -> Tensor:
    """Coordinates along the d leading principal components, float64 [C, d], the largest variance first."""
    centerd = vectors_ck.double() - vectors_ck.double().mean(dim=0)
    left, values, _ = torch.linalg.svd(centerd, full_matrices=False)
    return F.pad((left * values)[:, :dim], (0, max(0, dim - len(values))))
