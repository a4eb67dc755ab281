"""Evaluate an embedding without its class vectors: k-NN, nearest class mean, compactness, separation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

NEIGHBORS, TEMPERATURE = 20, 0.07
"""k-NN votes are weighted by exp(cos / 0.07), as in Wu et al. (CVPR 2018)."""
_BLOCK = 512


@dataclass(frozen=True)
class EmbeddingQuality:
    """Quality of validation features, with training features as the reference; accuracies in percent.

    Attributes:
        knn_top1: accuracy of the weighted vote of the 20 nearest training images by cosine.
        class_mean_top1: accuracy of the nearest class mean of the training images.
        compactness: mean over classes of the mean cosine of validation features to their class's mean direction.
        mean_class_cosine, largest_class_cosine: mean and maximum cosine between the mean directions of two
            validation classes; None with one class.
        num_reference, num_validated: images in the training and validation split.
    """

    knn_top1: float
    class_mean_top1: float
    compactness: float
    mean_class_cosine: float | None
    largest_class_cosine: float | None
    num_reference: int
    num_validated: int

    def metrics(self) -> dict[str, float | int | None]:
        return asdict(self)


def measure_quality(
    reference_nd: Tensor, reference_n: Tensor, features_md: Tensor, labels_m: Tensor, num_classes: int
) -> EmbeddingQuality:
    """Measure the quality of unit features against those of a reference set.

    Args:
        reference_nd, reference_n: unit features [N, d] and labels [N] of the reference (training) split.
        features_md, labels_m: unit features [M, d] and labels [M] of the validation split.
        num_classes: C; classes without images are ignored.
    """
    neighbors = class_means = 0
    anchors, seen = _means(reference_nd, reference_n, num_classes)
    anchors = F.normalize(anchors, dim=1)
    for rows, labels in zip(features_md.split(_BLOCK), labels_m.split(_BLOCK), strict=True):
        cosines, nearest = (rows @ reference_nd.T).topk(min(NEIGHBORS, len(reference_nd)), dim=1)
        votes = torch.zeros(len(rows), num_classes, device=rows.device)
        votes.scatter_add_(1, reference_n[nearest], (cosines / TEMPERATURE - 1 / TEMPERATURE).exp())
        neighbors += int((votes.argmax(dim=1) == labels).sum())
        scores = (rows @ anchors.T).masked_fill(~seen, -math.inf)
        class_means += int((scores.argmax(dim=1) == labels).sum())
    means, present = _means(features_md, labels_m, num_classes)
    lengths = means[present].norm(dim=1)
    directions = F.normalize(means[present], dim=1)
    pairs = directions @ directions.T
    between = pairs[~torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)]
    return EmbeddingQuality(
        knn_top1=100.0 * neighbors / len(labels_m),
        class_mean_top1=100.0 * class_means / len(labels_m),
        compactness=float(lengths.mean()),
        mean_class_cosine=float(between.mean()) if len(between) else None,
        largest_class_cosine=float(between.max()) if len(between) else None,
        num_reference=len(reference_n),
        num_validated=len(labels_m),
    )


def _means(features_nd: Tensor, labels_n: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean feature per class, [C, d], and whether a class has any features, bool [C]."""
    sums = features_nd.new_zeros(num_classes, features_nd.shape[1]).index_add_(0, labels_n, features_nd)
    counts = torch.bincount(labels_n, minlength=num_classes)
    return sums / counts.clamp(min=1)[:, None], counts > 0
