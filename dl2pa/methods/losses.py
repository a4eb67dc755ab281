"""Losses over fixed or learned class vectors, mean-reduced, computed in float32 whatever autocast says.

Shapes: features [B, d], class vectors W [C, d] (row c belongs to class c), result a scalar.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dl2pa.methods.targets import Targets
from dl2pa.model.head import ClassifierHead
from dl2pa.specs import MAX_LOGITS


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


def head_cross_entropy(
    head: ClassifierHead,
    features: Tensor,
    targets: Targets,
    label_smoothing: float = 0.0,
    margin: float | Tensor = 0.0,
    adjustment_c: Tensor | None = None,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """`cross_entropy` of a head's logits, of which no more than `max_logits` exist at a time.

    Where B × C is larger, classes are processed in blocks: the log-sum-exp, the own class's logit and the sum of the
    logits are collected block by block, and the backward pass computes each block again. A head with a LayerNorm over
    the classes needs all logits at once.
    """
    if len(features) * head.num_classes <= max_logits or head.class_norm is not None:
        return cross_entropy(head.logits(features), targets, label_smoothing, margin, adjustment_c)
    size = max(1, max_logits // len(features))
    heads = head.split(size)
    adjustments = [None] * len(heads) if adjustment_c is None else adjustment_c.split(size)

    def one(labels: Tensor) -> Tensor:
        parts = [
            checkpoint(
                _block_terms, block, features, labels - number * size, margin, adjustment,
                use_reentrant=False, preserve_rng_state=False,
            )
            for number, (block, adjustment) in enumerate(zip(heads, adjustments, strict=True))
        ]  # fmt: skip
        logsumexp, own, total = torch.stack(parts).unbind(dim=1)
        logsumexp = logsumexp.logsumexp(dim=0)
        loss = logsumexp - own.sum(dim=0)
        if not label_smoothing:
            return loss
        uniform = logsumexp - total.sum(dim=0) / head.num_classes
        return (1.0 - label_smoothing) * loss + label_smoothing * uniform

    return targets.mean(one(targets.first), None if targets.second is None else one(targets.second))


def _block_terms(
    head: ClassifierHead, features: Tensor, labels: Tensor, margin: float | Tensor, adjustment: Tensor | None
) -> Tensor:
    """Log-sum-exp, own logit (0 where it is in another block) and sum of a block's logits, [3, B].

    Args:
        labels: int64 [B], counted from the block's first class.
    """
    logits = head.logits(features)
    if adjustment is not None:
        logits = logits + adjustment
    is_own = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    if isinstance(margin, Tensor) or margin:
        logits = logits - margin * is_own
    own = torch.where(is_own, logits, 0.0).sum(dim=1)
    return torch.stack([logits.logsumexp(dim=1), own, logits.sum(dim=1)])


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
