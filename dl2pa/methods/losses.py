"""Losses over fixed or learned class vectors, mean-reduced, computed in float32 whatever autocast says.

Shapes: features [B, d], class vectors W [C, d] (row c belongs to class c), result a scalar.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from dl2pa.methods.targets import Targets


def squared_cosine(features: Tensor, weights: Tensor, targets: Targets) -> Tensor:
    """Mean of (1 - cos(f, w_y))² (HPN, NeurIPS 2019, eq. 2; its authors and DL2PA's sum over the batch)."""
    unit = F.normalize(features.float(), dim=1)

    def one(labels: Tensor) -> Tensor:
        return (1.0 - (unit * weights[labels]).sum(dim=1)).square()

    return targets.mean(one(targets.first), None if targets.second is None else one(targets.second))


def cross_entropy(
    logits: Tensor,
    targets: Targets,
    label_smoothing: float = 0.0,
    margin: float | Tensor = 0.0,
    adjustment_c: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of logits [B, C], already scaled, `margin` taken off the own class's logit, `adjustment_c` added.

    With logits s·cos and margin s·m this is CosFace's additive cosine margin (Wang et al., CVPR 2018, eq. 4). With
    τ log π_c added it is the logit-adjusted softmax (Menon et al., ICLR 2021). Ours: of two mixed labels each term
    takes the margin off its own; smoothing acts on what is left.
    """
    logits = logits.float() if adjustment_c is None else logits.float() + adjustment_c

    def one(labels: Tensor) -> Tensor:
        scores = logits
        if isinstance(margin, Tensor) or margin:
            scores = logits - margin * (
                torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
            )
        return F.cross_entropy(scores, labels, reduction="none", label_smoothing=label_smoothing)

    return targets.mean(one(targets.first), None if targets.second is None else one(targets.second))


def dot_regression(features: Tensor, weights: Tensor, targets: Targets) -> Tensor:
    """½ mean (f·w̃_y - |w̃_y||f|)² / |f| with w̃_k = √(γ/n_k) w_k (Yang et al., NeurIPS 2022; eq. 10 there).

    n_k counts class k in the *global* batch and γ = batch size / classes present, so that a batch weighs its
    classes, not its samples. |f| is not differentiated: with f of any length the gradient is along w_y alone and the
    loss grows with |f|, so its authors hand over f at length 1, as `PrototypeMethod` does. A collective wherever there
    is a process group.
    """
    features = features.float()
    norm = features.detach().norm(dim=1).clamp(min=1e-12)

    def one(labels: Tensor) -> Tensor:
        counts = _global_counts(labels, len(weights))
        gamma = counts.sum() / (counts > 0).sum()
        size = torch.sqrt(gamma / counts[labels])
        dot = (features * weights[labels]).sum(dim=1)
        return 0.5 * (size * (dot - norm)).square() / norm

    return targets.mean(one(targets.first), None if targets.second is None else one(targets.second))


def _global_counts(labels: Tensor, num_classes: int) -> Tensor:
    counts = torch.zeros(num_classes, dtype=torch.int64, device=labels.device)
    counts.index_add_(0, labels, torch.ones_like(labels))
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts.float()
