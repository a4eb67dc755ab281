from __future__ import annotations

import itertools

import numpy as np
import pytest

from dl2pa.reporting.class_metrics import calibration, class_rows, confuse, neighbors_together, worst_pairs
from dl2pa.reporting.samples import select_samples
from dl2pa.training.evaluate import Predictions

NAMES = ("ant", "bee", "cow", "<dog>")
RNG = np.random.default_rng(3)
TARGETS = RNG.integers(0, 3, 200)
PREDICTED = np.where(RNG.random(200) < 0.6, TARGETS, RNG.integers(0, 4, 200))
CONFIDENCE = RNG.random(200)
CONFIDENCE[:2] = (0.0, 1.0)
IN_TOP5 = (TARGETS == PREDICTED) | (RNG.random(200) < 0.5)
PREDICTIONS = Predictions(np.arange(200), TARGETS, PREDICTED, CONFIDENCE, IN_TOP5)


def matrix() -> np.ndarray:
    counted = np.zeros((4, 4), dtype=int)
    for true, predicted in zip(TARGETS, PREDICTED, strict=True):
        counted[true, predicted] += 1
    return counted


def test_the_confusion_matrix_equals_a_direct_count() -> None:
    result = confuse(TARGETS, PREDICTED, 4)
    dense = np.zeros((4, 4), dtype=int)
    dense[result.true, result.predicted] = result.count
    assert dense.tolist() == matrix().tolist()
    assert result.totals.tolist() == matrix().sum(1).tolist()
    assert result.share() == pytest.approx(result.count / matrix().sum(1)[result.true])


def test_the_worst_pairs_come_first() -> None:
    counted = matrix()
    cells = [(t, p) for t, p in itertools.product(range(4), range(4)) if t != p and counted[t, p]]
    expected = sorted(cells, key=lambda c: (-counted[c], -counted[c] / counted[c[0]].sum(), c[0], c[1]))
    result = worst_pairs(confuse(TARGETS, PREDICTED, 4), 5)
    assert [(p.true, p.predicted) for p in result] == expected[:5]
    assert [p.back for p in result] == [counted[p, t] for t, p in expected[:5]]


def test_class_rows_equal_a_direct_count() -> None:
    rows = class_rows(PREDICTIONS, NAMES, trained=[5, 6, 7, 8])
    counted = matrix()
    for c, row in enumerate(rows[:3]):
        mask = c == TARGETS
        assert row.images == mask.sum()
        assert row.top1 == pytest.approx(100 * counted[c, c] / mask.sum())
        assert row.top5 == pytest.approx(100 * IN_TOP5[mask].mean())
        assert row.precision == pytest.approx(100 * counted[c, c] / counted[:, c].sum())
        assert row.confidence == pytest.approx(100 * CONFIDENCE[mask].mean())
        others = [0 if p == c else counted[c, p] for p in range(4)]
        assert row.taken_for_count == max(others)
        assert counted[c, NAMES.index(str(row.taken_for))] == max(others)
    assert (rows[3].images, rows[3].top1, rows[3].taken_for, rows[3].trained) == (0, None, None, 8)
    assert rows[3].precision == 0.0


def test_calibration_equals_a_direct_computation() -> None:
    hits = TARGETS == PREDICTED
    result = calibration(PREDICTIONS, 15)
    total = 0.0
    for i, (low, high) in enumerate(itertools.pairwise(np.linspace(0, 1, 16))):
        inside = (low <= CONFIDENCE) & ((high > CONFIDENCE) | (high == 1))
        assert result.count[i] == inside.sum()
        if inside.any():
            assert result.accuracy[i] == pytest.approx(hits[inside].mean())
            assert result.confidence[i] == pytest.approx(CONFIDENCE[inside].mean())
            total += inside.mean() * abs(hits[inside].mean() - CONFIDENCE[inside].mean())
    assert result.error == pytest.approx(100 * total)


def test_confused_classes_are_adjacent() -> None:
    targets = np.repeat(np.arange(6), 10)
    predicted = targets.copy()
    predicted[targets == 0] = 4
    predicted[targets == 1][:5] = 1
    predicted[np.flatnonzero(targets == 5)[:5]] = 2
    order = neighbors_together(confuse(targets, predicted, 6)).tolist()
    assert sorted(order) == list(range(6))
    assert abs(order.index(0) - order.index(4)) == 1
    assert abs(order.index(2) - order.index(5)) == 1


def test_samples_are_confident_and_diverse() -> None:
    selection = select_samples(PREDICTIONS)
    wrong = [i for i in np.argsort(-CONFIDENCE, kind="stable") if TARGETS[i] != PREDICTED[i]]
    assert selection.errors[0] == wrong[0]
    assert len(set(selection.errors)) == len(selection.errors) == min(24, len(wrong))
    assert all(TARGETS[i] == PREDICTED[i] for i in selection.hits)
    assert {int(TARGETS[i]) for i in selection.hits[:3]} == {0, 1, 2}, "one per class first"
    counted = matrix()
    rates = [counted[c, c] / counted[c].sum() for c in range(3)]
    assert list(selection.by_class) == sorted(range(3), key=lambda c: rates[c]), "the lowest accuracy first"
    for c, samples in selection.by_class.items():
        assert {int(TARGETS[i]) for i in samples} == {c}
        assert samples[0] == next(i for i in wrong if TARGETS[i] == c)
