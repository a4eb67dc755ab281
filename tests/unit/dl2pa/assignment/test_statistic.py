from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dl2pa.assignment import ClassStatistic

CLASSES, DIM = 7, 5


def samples(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features of any norm, repeated labels without the last class, and shares."""
    generator = torch.Generator().manual_seed(seed)
    norms = 10.0 ** torch.randint(-3, 4, (count, 1), generator=generator)
    features = torch.randn(count, DIM, generator=generator) * norms
    labels = torch.randint(0, CLASSES - 1, (count,), generator=generator)
    return features, labels, torch.rand(count, generator=generator)


def statistic_of(*parts: tuple[Tensor, Tensor, Tensor | None]) -> ClassStatistic:
    statistic = ClassStatistic(CLASSES, DIM)
    for part in parts:
        statistic.add(*part)
    return statistic


def reference_means(features: Tensor, labels: Tensor, shares: Tensor) -> np.ndarray:
    f, y, s = features.double().numpy(), labels.numpy(), shares.double().numpy()
    f = f / np.linalg.norm(f, axis=1, keepdims=True)
    means = np.zeros((CLASSES, DIM))
    for c in set(y.tolist()):
        means[c] = (f[y == c] * s[y == c, None]).sum(0) / s[y == c].sum()
    return means


@pytest.mark.parametrize("shared", [False, True])
def test_means_are_share_weighted_means_of_unit_features(shared: bool) -> None:
    features, labels, shares = samples(500)
    means, counts = statistic_of((features, labels, shares if shared else None)).means()
    weights = shares if shared else torch.ones(500)
    assert np.abs(means.numpy() - reference_means(features, labels, weights)).max() < 2e-7
    expected = np.bincount(labels.numpy(), weights=weights.double().numpy(), minlength=CLASSES)
    assert np.abs(counts.numpy() - expected).max() < 1e-6


def test_order_and_split_of_samples_do_not_change_a_bit() -> None:
    features, labels, shares = samples(300)
    expected = statistic_of((features, labels, shares))
    for seed in range(4):
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
        pieces = order.split(1 + 37 * seed)
        again = statistic_of(*((features[p], labels[p], shares[p]) for p in pieces))
        assert torch.equal(again.sums, expected.sums)
        assert torch.equal(again.counts, expected.counts)


def test_sum_over_ranks_equals_one_process() -> None:
    features, labels, shares = samples(96)
    expected = statistic_of((features, labels, shares))
    parts = [statistic_of((features[r::3], labels[r::3], shares[r::3])) for r in range(3)]
    assert torch.equal(sum(p.sums for p in parts), expected.sums)  # type: ignore[arg-type]
    assert torch.equal(sum(p.counts for p in parts), expected.counts)  # type: ignore[arg-type]


def test_repeated_labels_in_a_batch_all_count() -> None:
    """The authors' indexed += keeps only one sample per label (ALGORITHMS, section 5)."""
    features = torch.eye(DIM)[[0, 0, 1, 2]]
    means, counts = statistic_of((features, torch.tensor([3, 3, 3, 4]), None)).means()
    assert counts.tolist() == [0, 0, 0, 3, 1, 0, 0]
    assert torch.allclose(means[3], torch.tensor([2 / 3, 1 / 3, 0, 0, 0], dtype=torch.float64))


def test_mixed_samples_count_by_their_shares() -> None:
    features, share = torch.eye(DIM)[:2], torch.tensor([0.25, 1.0])
    first, second = torch.tensor([0, 1]), torch.tensor([1, 0])
    statistic = statistic_of((features, first, share), (features, second, 1 - share))
    means, counts = statistic.means()
    assert counts.tolist()[:2] == [0.25, 1.75]
    assert means[0].tolist() == [1, 0, 0, 0, 0]
    assert means[1].tolist() == pytest.approx([0.75 / 1.75, 1 / 1.75, 0, 0, 0])


def test_rows_of_classes_without_samples() -> None:
    features, labels, _ = samples(50)
    statistic = statistic_of((features, labels, None))
    rows = statistic.directions()
    assert rows[CLASSES - 1].tolist() == [0] * DIM
    assert torch.allclose(rows[: CLASSES - 1].norm(dim=1), torch.ones(CLASSES - 1, dtype=torch.float64))
    statistic.rows.copy_(rows)
    statistic.reset()
    statistic.add(torch.eye(DIM)[:1], torch.tensor([2]))
    again = statistic.directions()
    assert again[2].tolist() == [1, 0, 0, 0, 0]
    kept = [c for c in range(CLASSES) if c != 2]
    assert torch.equal(again[kept], rows[kept])


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
def test_momentum_blends_directions(momentum: float) -> None:
    statistic = ClassStatistic(CLASSES, DIM)
    statistic.rows[0, 0] = 1.0
    statistic.add(torch.tensor([[0.0, 50.0, 0, 0, 0]]), torch.tensor([0]))
    row = statistic.directions(momentum)[0]
    expected = np.array([momentum, 1 - momentum]) / np.hypot(momentum, 1 - momentum)
    assert row[:2].tolist() == pytest.approx(expected.tolist())


def test_directions_do_not_depend_on_the_number_of_samples() -> None:
    feature = torch.tensor([[3.0, 4.0, 0, 0, 0]])
    statistic = statistic_of(
        (feature, torch.tensor([0]), None), (feature.repeat(9, 1), torch.full((9,), 1), None)
    )
    rows = statistic.directions()
    assert torch.allclose(rows[0], rows[1])


def test_state_dict_is_complete() -> None:
    statistic = statistic_of(samples(40))
    statistic.rows.copy_(statistic.directions())
    other = ClassStatistic(CLASSES, DIM)
    other.load_state_dict(statistic.state_dict())
    for each in (statistic, other):
        each.add(*samples(10, seed=1))
    assert torch.equal(other.directions(0.5), statistic.directions(0.5))


def test_bfloat16_features_are_summed_without_rounding() -> None:
    features, labels, _ = samples(400)
    rounded = features.bfloat16()
    means, _ = statistic_of((rounded, labels, None)).means()
    assert np.abs(means.numpy() - reference_means(rounded, labels, torch.ones(400))).max() < 2e-7
