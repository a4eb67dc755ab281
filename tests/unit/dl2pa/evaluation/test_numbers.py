"""Intervals, detection and retrieval, compared with SciPy and scikit-learn on the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from sklearn.neighbors import NearestNeighbors

from dl2pa.errors import UserError
from dl2pa.evaluation.detection import detect
from dl2pa.evaluation.interval import wilson_interval
from dl2pa.evaluation.retrieval import RANKS, measure_retrieval


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (0, 40), (40, 40), (371, 400), (49_000, 50_000)])
def test_wilson_interval_is_scipys(hits: int, count: int) -> None:
    expected = binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson_interval(hits, count) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)


@pytest.mark.parametrize("digits", [1, 6])  # one digit: many equal scores
@pytest.mark.parametrize("count", [1, 19, 20, 400])
def test_detection_is_scikit_learns(digits: int, count: int) -> None:
    generator = np.random.default_rng(count)
    inside = generator.normal(1, 1, count).round(digits)
    outside = generator.normal(0, 1, 300).round(digits)
    is_inside = np.repeat([1, 0], [count, 300])
    scores = np.concatenate([inside, outside])
    accepted, kept, _ = roc_curve(is_inside, scores, drop_intermediate=False)
    result = detect(inside, outside)
    assert result.auroc == pytest.approx(100 * roc_auc_score(is_inside, scores), abs=1e-9)
    assert result.fpr95 == pytest.approx(100 * accepted[np.argmax(kept >= 0.95)], abs=1e-9)


def test_equal_scores_separate_nothing() -> None:
    result = detect(np.ones(5), np.ones(7))
    assert (result.auroc, result.fpr95) == (50.0, 100.0)


def embedded(count: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    centers = torch.randn(classes, 8, generator=generator)
    features = centers[labels] + 1.5 * torch.randn(count, 8, generator=generator)
    return torch.nn.functional.normalize(features, dim=1), labels


def test_retrieval_is_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = embedded(150, 12, 0)
    labels[0] = 50  # a class with one image
    monkeypatch.setattr("dl2pa.evaluation.retrieval._BLOCK", 1000)  # several blocks
    result = measure_retrieval(features, labels)
    nearest = NearestNeighbors(n_neighbors=max(RANKS) + 1, metric="cosine").fit(features.numpy())
    found = nearest.kneighbors(features.numpy(), return_distance=False)[:, 1:]
    same = labels.numpy()[found] == labels.numpy()[:, None]
    assert result.hits == tuple(int(same[:, :k].any(axis=1).sum()) for k in RANKS)
    assert 0 < result.hits[0] < result.hits[1] < result.num_queries
    cosines = (features @ features.T).numpy()
    precisions: list[float] = []
    for i in range(1, 150):
        others = np.arange(150) != i
        precisions.append(
            average_precision_score(labels.numpy()[others] == int(labels[i]), cosines[i, others])
        )
    assert result.average_precision == pytest.approx(100 * float(np.mean(precisions)), abs=1e-9)
    assert (result.num_queries, result.num_alone) == (149, 1)


def test_equal_cosines_do_not_depend_on_the_order_of_the_images() -> None:
    features = torch.eye(3)[torch.tensor([0, 0, 0, 0, 1, 1])]
    labels = torch.tensor([0, 0, 1, 2, 3, 3])
    for seed in range(5):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        result = measure_retrieval(features[order], labels[order])
        # The queries of class 0 have their match among three equal images; those of class 3 find theirs first.
        assert result.hits == (2, 4, 4)
        assert result.average_precision == pytest.approx(100 * (2 / 3 + 2) / 4)


def test_no_class_with_two_images_is_refused() -> None:
    with pytest.raises(UserError, match="no class has two images"):
        measure_retrieval(torch.eye(3), torch.arange(3))
