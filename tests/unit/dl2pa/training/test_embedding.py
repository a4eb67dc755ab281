"""Embedding quality, compared with plain loops."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F

from dl2pa.training.embedding import measure_quality


@pytest.fixture
def splits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(5, 4, generator=generator)

    def half(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(0, 4, (count,), generator=generator)  # class 4 has no images
        return F.normalize(centers[labels] + torch.randn(count, 4, generator=generator), dim=1), labels

    return (*half(700), *half(600))


def test_against_loops(splits: tuple[torch.Tensor, ...]) -> None:
    reference, of_reference, features, labels = splits
    found = measure_quality(reference, of_reference, features, labels, 5)
    hits = mean_hits = 0
    means = [reference[of_reference == c].mean(dim=0) for c in range(4)]
    for row, label in zip(features, labels, strict=True):
        cosines = reference @ row
        votes = [0.0] * 5
        for index in cosines.argsort(descending=True)[:20].tolist():
            votes[int(of_reference[index])] += math.exp(float(cosines[index]) / 0.07)
        hits += votes.index(max(votes)) == int(label)
        scores = [float(F.cosine_similarity(row, mean, dim=0)) for mean in means]
        mean_hits += scores.index(max(scores)) == int(label)
    assert (found.knn_top1, found.class_mean_top1) == pytest.approx((hits / 6, mean_hits / 6))
    assert 40 < found.knn_top1 < 100
    own = [features[labels == c].mean(dim=0) for c in range(4)]
    tight = [float((features[labels == c] @ F.normalize(own[c], dim=0)).mean()) for c in range(4)]
    between = [float(F.cosine_similarity(own[a], own[b], dim=0)) for a in range(4) for b in range(a)]
    assert found.compactness == pytest.approx(sum(tight) / 4, rel=1e-5)
    assert found.mean_class_cosine == pytest.approx(sum(between) / 6, rel=1e-4)
    assert found.largest_class_cosine == pytest.approx(max(between), rel=1e-4)
    assert (found.num_reference, found.num_validated) == (700, 600)


def test_fewer_references_than_neighbors() -> None:
    features = torch.eye(3)
    found = measure_quality(features, torch.arange(3), features, torch.arange(3), 3)
    assert (found.knn_top1, found.class_mean_top1, found.compactness) == (100, 100, 1)
    assert (found.mean_class_cosine, found.largest_class_cosine) == (0, 0)


def test_one_validation_class_gives_valid_json() -> None:
    features = torch.eye(3)
    found = measure_quality(features, torch.arange(3), features[:1], torch.zeros(1, dtype=torch.int64), 3)
    metrics = json.loads(json.dumps(found.metrics(), allow_nan=False))
    assert (metrics["knn_top1"], metrics["mean_class_cosine"], metrics["largest_class_cosine"]) == (
        100,
        None,
        None,
    )
