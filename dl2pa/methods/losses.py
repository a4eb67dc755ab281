"""Mean-reduced losses for fixed or learned class vectors, computed in float32 also under autocast.

Shapes: features [B, d], class vectors W [C, d] with row c for class c, result a scalar.
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
    """Return the mean of (1 - cos(f, w_y))² (HPN, NeurIPS 2019, eq. 2; the HPN and DL2PA papers sum over the batch)."""
    unit = F.normalize(features.float(), dim=1)

    def per_sample(labels: Tensor) -> Tensor:
        return (1.0 - (unit * weights[labels]).sum(dim=1)).square()

    return targets.mean(per_sample)


def generalized(cross_entropy_b: Tensor, q: float) -> Tensor:
    """Return (1 − p^q) / q for p = exp(−cross-entropy), the generalized cross-entropy of each sample; itself for q = 0.

    Wrong labels have a bounded effect on it (Zhang and Sabuncu, NeurIPS 2018, eq. 6; without its truncation).
    """
    return -torch.expm1(-q * cross_entropy_b) / q if q else cross_entropy_b


def ntce(head: ClassifierHead, features: Tensor, targets: Targets) -> Tensor:
    """Return the mean over the samples i of −log(e^{s cos(w_y, f_i)} / Σ_j e^{s cos(w_y, f_j)}), y the label of i.

    NTCE of Koromilas et al., "Neural collapse by design" (ICML 2026), formula after the documentation of its code: the
    vector of the class is contrasted with the features of all samples j of the batch, also those of its class.
    """
    unit = head.embed(features)
    positives = torch.arange(len(unit), device=unit.device)

    def per_sample(labels: Tensor) -> Tensor:
        scores = head.scale * (head.vectors.float()[labels] @ unit.T)
        return F.cross_entropy(scores, positives, reduction="none")

    return targets.mean(per_sample)


def cross_entropy(
    logits: Tensor,
    targets: Targets,
    label_smoothing: float = 0.0,
    margin: float | Tensor = 0.0,
    adjustment_c: Tensor | None = None,
    gce_q: float = 0.0,
) -> Tensor:
    """Return the cross-entropy of scaled logits [B, C], less `margin` at the label, plus `adjustment_c`.

    With logits s·cos and margin s·m this is CosFace's additive cosine margin (Wang et al., CVPR 2018, eq. 4); with
    adjustment τ log π_c, the logit-adjusted softmax (Menon et al., ICLR 2021). With mixed labels, each of the two terms
    subtracts the margin at its own label; label smoothing applies to the result. `gce_q`: see `generalized`.
    """
    logits = logits.float() if adjustment_c is None else logits.float() + adjustment_c

    def per_sample(labels: Tensor) -> Tensor:
        scores = logits
        if isinstance(margin, Tensor) or margin:
            scores = logits - margin * (
                torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
            )
        loss = F.cross_entropy(scores, labels, reduction="none", label_smoothing=label_smoothing)
        return generalized(loss, gce_q)

    return targets.mean(per_sample)


def head_cross_entropy(
    head: ClassifierHead,
    features: Tensor,
    targets: Targets,
    label_smoothing: float = 0.0,
    margin: float | Tensor = 0.0,
    adjustment_c: Tensor | None = None,
    max_logits: int = MAX_LOGITS,
    gce_q: float = 0.0,
) -> Tensor:
    """Return the `cross_entropy` of a head's logits, at most `max_logits` of which exist at a time.

    If B × C is larger, classes are processed in blocks: log-sum-exp, target logit and sum of logits are collected per
    block, and the backward pass recomputes each block. A head with a LayerNorm over the classes needs all logits at
    once.
    """
    if len(features) * head.num_classes <= max_logits or head.class_norm is not None:
        return cross_entropy(head.logits(features), targets, label_smoothing, margin, adjustment_c, gce_q)
    size = max(1, max_logits // len(features))
    heads = head.split(size)
    adjustments = [None] * len(heads) if adjustment_c is None else adjustment_c.split(size)

    def per_sample(labels: Tensor) -> Tensor:
        parts = [
            checkpoint(
                _block_terms, block, features, labels - number * size, margin, adjustment,
                use_reentrant=False, preserve_rng_state=False,
            )
            for number, (block, adjustment) in enumerate(zip(heads, adjustments, strict=True))
        ]  # fmt: skip
        logsumexp, target, total = torch.stack(parts).unbind(dim=1)
        logsumexp = logsumexp.logsumexp(dim=0)
        loss = logsumexp - target.sum(dim=0)
        if not label_smoothing:
            return generalized(loss, gce_q)
        uniform = logsumexp - total.sum(dim=0) / head.num_classes
        return (1.0 - label_smoothing) * loss + label_smoothing * uniform

    return targets.mean(per_sample)


def _block_terms(
    head: ClassifierHead, features: Tensor, labels: Tensor, margin: float | Tensor, adjustment: Tensor | None
) -> Tensor:
    """Return log-sum-exp, target logit (0 if in another block) and sum of a block's logits, [3, B].

    Args:
        labels: int64 [B], relative to the block's first class.
    """
    logits = head.logits(features)
    if adjustment is not None:
        logits = logits + adjustment
    is_target = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    if isinstance(margin, Tensor) or margin:
        logits = logits - margin * is_target
    target = torch.where(is_target, logits, 0.0).sum(dim=1)
    return torch.stack([logits.logsumexp(dim=1), target, logits.sum(dim=1)])


def dot_regression(features: Tensor, weights: Tensor, targets: Targets) -> Tensor:
    """Return ½ mean (f·w̃_y - |w̃_y||f|)² / |f| with w̃_k = √(γ/n_k) w_k (Yang et al., NeurIPS 2022, eq. 10).

    n_k counts class k in the global batch and γ = batch size / classes present, so that all classes present have equal
    weight. |f| is not differentiated: the gradient is along w_y only and the loss grows with |f|, so the paper's head
    normalizes f to length 1, as does `PrototypeMethod`. A collective if there is a process group, unless the targets
    have counts.
    """
    features = features.float()
    norm = features.detach().norm(dim=1).clamp(min=1e-12)

    def per_sample(labels: Tensor) -> Tensor:
        known = targets.first_counts if labels is targets.first else targets.second_counts
        counts = (global_counts(labels, len(weights)) if known is None else known).float()
        gamma = counts.sum() / (counts > 0).sum()
        size = torch.sqrt(gamma / counts[labels])
        dot = (features * weights[labels]).sum(dim=1)
        return 0.5 * (size * (dot - norm)).square() / norm

    return targets.mean(per_sample)


def global_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Labels of each class over all processes, int64 [C]; a collective if there is a process group."""
    counts = torch.zeros(num_classes, dtype=torch.int64, device=labels.device)
    counts.index_add_(0, labels, torch.ones_like(labels))
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts
