"""Goto: several orthonormal sub-prototypes per class, trained by gradients.

After Goto et al., "Learning intra-class multimodal distributions with orthonormal matrices" (WACV 2024): an orthonormal
matrix per class, updated by a gradient method, replaces the sub-centroids of DNC. The paper's formulas are not public;
these are a reconstruction.

    M_c [K, d], M_c M_cᵀ = I, K ≤ d; score of class c = max_k cos(f, M_c[k]); loss CE(s · scores, y), f [B, d].

The parameter is a frame V_c [K, d]; M_c is its Gram–Schmidt orthonormalization, so gradients respect the constraint.
After each step V_c is replaced by M_c. Frames start at random; those of different classes may overlap. The paper's
abstract mentions a continuous assignment to the rows; this implementation takes the maximum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dl2pa.methods.learned import LearnedMethod
from dl2pa.methods.options import MethodOptions
from dl2pa.methods.targets import Targets
from dl2pa.model.head import ClassifierHead


class Goto(LearnedMethod):
    """C learned frames of K orthonormal rows; K = `options.sub_prototypes`."""

    def __init__(self, num_classes: int, dim: int, options: MethodOptions) -> None:
        super().__init__(num_classes, dim, options)
        start = torch.randn(num_classes, options.sub_prototypes, dim)
        self.frames = nn.Parameter(orthonormal_rows(start))

    def head(self) -> ClassifierHead:
        rows = orthonormal_rows(self.frames)
        return ClassifierHead(rows.flatten(0, 1), self.scale(), per_class=self.options.sub_prototypes)

    def class_vectors(self) -> Tensor:
        return F.normalize(orthonormal_rows(self.frames.detach()).mean(dim=1), dim=1)

    @torch.no_grad()
    def observe(self, features: Tensor, targets: Targets, pooled: Tensor | None = None) -> None:
        """Orthonormalize the frames, identically on every rank."""
        super().observe(features, targets, pooled)
        self.frames.copy_(orthonormal_rows(self.frames))


def orthonormal_rows(frames_ckd: Tensor) -> Tensor:
    """Apply Gram–Schmidt along the middle axis of [C, K, d], K ≤ d; differentiable, without host sync.

    Each vector is projected twice, which keeps the rows orthogonal up to rounding error.
    """
    rows: list[Tensor] = []
    for vector in frames_ckd.unbind(dim=1):
        for _ in range(2):
            for row in rows:
                vector = vector - (vector * row).sum(dim=1, keepdim=True) * row
            vector = F.normalize(vector, dim=1)
        rows.append(vector)
    return torch.stack(rows, dim=1)
