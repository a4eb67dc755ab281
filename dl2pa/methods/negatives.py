"""Cross-entropy over the class of the image, the classes with the nearest prototypes, and random classes.

The cost of a step does not depend on the number of classes C. For a sample with label y and logits z, let N be the K
classes whose vectors are nearest to that of y, and R the classes drawn for the sample except y and N. Of the
C − 1 − K classes that R is drawn from, each is equally likely, so the loss

    −z_y + log(e^{z_y} + Σ_{j∈N} e^{z_j} + (C − 1 − K) / |R| · Σ_{j∈R} e^{z_j})

has an unbiased estimate of the denominator of the softmax. If all classes are drawn, it is the softmax cross-entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dl2pa.methods.losses import generalized
from dl2pa.methods.targets import Targets
from dl2pa.model.head import ClassifierHead

_BLOCK_SCORES = 2**24
_GRID = 2.0**21
"""Products of multiples of 1 / _GRID, and sums of up to 2048 of them, are exact in float64."""


@torch.no_grad()
def nearest_classes(vectors_cd: Tensor, count: int) -> Tensor:
    """Return the `count` classes with the largest cosine to each class, int64 [C, count], in ascending order.

    Ties go to the smaller class number. Cosines are exact sums of rounded products, so the result does not depend on
    device, threads or processes. No C × C array is stored.

    Args:
        vectors_cd: unit rows.
    """
    total = len(vectors_cd)
    rows = (vectors_cd.double() * _GRID).round() / _GRID
    block = max(1, _BLOCK_SCORES // total)
    found: list[Tensor] = []
    for start in range(0, total, block):
        scores = rows[start : start + block] @ rows.T
        own = torch.arange(start, start + len(scores), device=rows.device)
        scores.scatter_(1, own[:, None], -torch.inf)
        least = scores.topk(count, dim=1).values[:, -1:]
        above, tied = scores > least, scores == least
        places = count - above.sum(dim=1, keepdim=True)
        chosen = above | (tied & (tied.cumsum(dim=1) <= places))
        found.append(chosen.nonzero()[:, 1].view(-1, count))
    return torch.cat(found)


def sampled_cross_entropy(
    head: ClassifierHead,
    features: Tensor,
    targets: Targets,
    neighbors_ck: Tensor | None,
    margin: float | Tensor = 0.0,
    adjustment_c: Tensor | None = None,
    gce_q: float = 0.0,
) -> Tensor:
    """Return the mean of the loss above over a batch; gradients reach only the vectors of the selected classes.

    Args:
        head: one vector per class, without a LayerNorm over the classes.
        targets: with the drawn classes in `negatives`, or None without random classes.
        neighbors_ck: nearest classes of each class; None without neighbors.
        margin: subtracted from the logit of the label.
        adjustment_c: added to the logits.
    """
    unit = head.embed(features)
    vectors = head.vectors.float()
    added = adjustment_c if head.bias is None else head.bias
    if head.bias is not None and adjustment_c is not None:
        added = head.bias + adjustment_c
    drawn = targets.negatives

    def logits(classes: Tensor) -> Tensor:
        """Logits [B, n] of n classes per sample."""
        scores = head.scale * (vectors[classes] @ unit[:, :, None]).squeeze(2)
        return scores if added is None else scores + added[classes]

    random = None if drawn is None else logits(drawn)

    def per_sample(labels: Tensor) -> Tensor:
        near = labels[:, None]
        if neighbors_ck is not None:
            near = torch.cat([near, neighbors_ck[labels]], dim=1)
        scores = logits(near)
        own = scores[:, :1] - margin
        parts = [own, scores[:, 1:]]
        if drawn is not None and random is not None:
            known = (near[:, :, None] == drawn[:, None]).any(dim=1)
            count = (~known).sum(dim=1, keepdim=True).clamp(min=1)
            weight = (max(1, head.num_classes - near.shape[1]) / count).log()
            parts.append(random.masked_fill(known, -torch.inf) + weight)
        return generalized(torch.cat(parts, dim=1).logsumexp(dim=1) - own.squeeze(1), gce_q)

    return targets.mean(per_sample)
