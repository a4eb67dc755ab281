"""DNC: deep nearest centroids (Wang, Han, Zhou and Liu, "Visual recognition with deep nearest centroids", ICLR 2023).

K = 4 sub-centroids per class, unit vectors P [C, K, d], are updated by clustering instead of gradients. With f̂ the
features [B, d] after LayerNorm and L2 normalization, the score of class c is max_k f̂ · P[c, k]; a LayerNorm over the C
scores gives the logits; loss CE(logits, y). After each step, within each class of the batch:

1. samples are assigned to sub-centroids by balanced optimal transport on f̂ · P[y] (`balanced_assignment`);
2. P[y, k] ← normalize(0.999 · P[y, k] + 0.001 · m), m the direction of the mean f̂ of the correctly classified samples
   of k; a sub-centroid without such samples is unchanged.

Details that the source leaves open or that depend on the hardware: the batch is the global one; features are gathered
(B·d floats per step, fewer than the C·K·d sums) and every rank computes the same sums in 64-bit fixed point, so that P
is bit-identical on all ranks, which each save checks. The transport is 20 Sinkhorn iterations at ε = 0.05, then the
largest entry (the nearest of equal ones), without the source's Gumbel noise. The update follows the optimizer step. A
mixed sample counts for the label with the larger share. Both LayerNorms have learned gain and bias. P starts at random.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from dl2pa.assignment import verify_same
from dl2pa.methods.learned import LearnedMethod
from dl2pa.methods.options import MethodOptions
from dl2pa.methods.targets import Targets
from dl2pa.model.head import ClassifierHead, Norm

_ITERATIONS = 20
_EPSILON = 0.05
_TIE = 1e-6
_ONE = 2.0**32
_ONE_OF_PLAN = 2.0**40


class Dnc(LearnedMethod):
    """K = `options.sub_prototypes` sub-centroids per class, updated with momentum `options.centroid_momentum`.

    Buffers:
        centroids: unit vectors [C, K, d], identical on every rank.
    """

    centroids: Tensor

    def __init__(self, num_classes: int, dim: int, options: MethodOptions) -> None:
        super().__init__(num_classes, dim, options, scaled=False)
        start = torch.randn(num_classes, options.sub_prototypes, dim)
        self.register_buffer("centroids", F.normalize(start, dim=2))
        self.feature_norm = nn.LayerNorm(dim)
        self.class_norm = nn.LayerNorm(num_classes)

    def head(self) -> ClassifierHead:
        return ClassifierHead(
            self.centroids.flatten(0, 1),
            per_class=self.options.sub_prototypes,
            feature_norm=Norm(self.feature_norm.weight, self.feature_norm.bias),
            class_norm=Norm(self.class_norm.weight, self.class_norm.bias),
        )

    def class_vectors(self) -> Tensor:
        return F.normalize(self.centroids.mean(dim=1), dim=1)

    @torch.no_grad()
    def observe(self, features: Tensor, targets: Targets, pooled: Tensor | None = None) -> None:
        """Update the sub-centroids from the global batch; a collective."""
        labels = targets.first
        if targets.second is not None and targets.share is not None:
            labels = torch.where(targets.share >= 0.5, targets.first, targets.second)
        head = self.head()
        correct = head.logits(features).argmax(dim=1) == labels
        batch = _all_gather(head.embed(features)), _all_gather(labels), _all_gather(correct.long()).bool()
        self.centroids.copy_(update_centroids(self.centroids, *batch, self.options.centroid_momentum))

    def gather_state(self) -> None:
        """Verify that the sub-centroids are identical on all ranks.

        Raises:
            TrainingFailure: they differ.
        """
        verify_same(self.centroids, "sub-centroids")


def balanced_assignment(cosines_bk: Tensor, labels_b: Tensor, num_classes: int) -> Tensor:
    """Return the sub-centroid of each sample, int64 [B], with about equal counts within a class.

    Sinkhorn scaling of exp(cosine/ε) to sums of 1 per sample and n_c/K per sub-centroid of class c, n_c its number of
    samples; then the largest entry. Ties, as for the only sample of a class, go to the largest cosine. Sums over
    samples are integers, so they do not depend on the order.

    Args:
        cosines_bk: cosines of each sample to the K sub-centroids of its class.
        labels_b: int64.
    """
    count = cosines_bk.shape[1]
    best = cosines_bk.amax(dim=1, keepdim=True)
    kernel = ((cosines_bk - best).double() / _EPSILON).exp()

    def class_sums(values_bk: Tensor) -> Tensor:
        sums = torch.zeros(num_classes, count, dtype=torch.int64, device=labels_b.device)
        return sums.index_add_(0, labels_b, (values_bk * _ONE_OF_PLAN).round().long()).double()

    target_ck = class_sums(torch.ones_like(kernel)) / count
    factor_ck = torch.ones_like(target_ck)
    for _ in range(_ITERATIONS):
        plan = kernel * factor_ck[labels_b]
        plan = plan / plan.sum(dim=1, keepdim=True)
        factor_ck = factor_ck * target_ck / class_sums(plan).clamp(min=1.0)
    plan = kernel * factor_ck[labels_b]
    tied = plan > (1.0 - _TIE) * plan.amax(dim=1, keepdim=True)
    return cosines_bk.masked_fill(~tied, -math.inf).argmax(dim=1)


def update_centroids(
    centroids_ckd: Tensor, unit_bd: Tensor, labels_b: Tensor, correct_b: Tensor, momentum: float
) -> Tensor:
    """Return the sub-centroids after one batch, float32 [C, K, d].

    Args:
        unit_bd: unit features.
        labels_b: int64.
        correct_b: bool; samples that were not classified correctly only take part in the transport.
    """
    num_classes, count, dim = centroids_ckd.shape
    cosines_bk = (centroids_ckd[labels_b] * unit_bd[:, None]).sum(dim=2)
    rows_b = labels_b * count + balanced_assignment(cosines_bk, labels_b, num_classes)
    fixed = (unit_bd * correct_b[:, None] * _ONE).round().long()
    sums = torch.zeros(num_classes * count, dim, dtype=torch.int64, device=unit_bd.device)
    sums.index_add_(0, rows_b, fixed)
    seen = torch.zeros(num_classes * count, dtype=torch.int64, device=unit_bd.device)
    seen.index_add_(0, rows_b, correct_b.long())
    old = centroids_ckd.flatten(0, 1).double()
    new = F.normalize(momentum * old + (1.0 - momentum) * F.normalize(sums.double(), dim=1), dim=1)
    return torch.where(seen[:, None] > 0, new, old).float().view_as(centroids_ckd)


def _all_gather(part: Tensor) -> Tensor:
    """Concatenate the parts of all ranks, which have equal shapes."""
    if not dist.is_initialized():
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)
