from __future__ import annotations

import numpy as np
import pytest

from dl2pa.errors import UserError
from pipelines.longtail import class_groups, long_tail, long_tail_legacy

# Images of the digits 0 to 9 in SVHN's training and extra sets, as published.
SVHN_TRAIN = [4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659]
SVHN_EXTRA = [45550, 90560, 74740, 60765, 50633, 53490, 41582, 43997, 35358, 34456]


def names(count: int) -> tuple[str, ...]:
    return tuple(f"class {k}" for k in range(count))


def shuffled(counts: list[int], seed: int = 7) -> np.ndarray:
    """Shuffled labels with the given number of images per class."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


def authors_split(labels: np.ndarray, imbalance: float) -> tuple[np.ndarray, np.ndarray]:
    """Samples and labels by the authors' algorithm, with NumPy's global generator."""
    classes = int(labels.max()) + 1
    state = np.random.get_state()
    np.random.seed(0)
    samples: list[int] = []
    assigned: list[int] = []
    for k in range(classes):
        share = int(len(labels) / classes * (imbalance ** (k / (classes - 1.0))))
        members = np.where(labels == k)[0]
        np.random.shuffle(members)
        samples += members[:share].tolist()
        assigned += [k] * share
    np.random.set_state(state)
    return np.array(samples), np.array(assigned)[: len(samples)]


@pytest.mark.parametrize(
    ("name", "per_class", "classes", "imbalance", "total"),
    [
        ("cifar10", 5000, 10, 0.005, 11_203),
        ("cifar10", 5000, 10, 0.01, 12_406),
        ("cifar10", 5000, 10, 0.02, 13_996),
        ("cifar100", 500, 100, 0.005, 9_502),
        ("cifar100", 500, 100, 0.01, 10_847),
        ("cifar100", 500, 100, 0.02, 12_608),
        ("stl10", 500, 10, 0.005, 1_117),
        ("stl10", 500, 10, 0.01, 1_236),
        ("stl10", 500, 10, 0.02, 1_394),
    ],
)
def test_totals_are_the_published_ones(
    name: str, per_class: int, classes: int, imbalance: float, total: int
) -> None:
    labels = shuffled([per_class] * classes)
    kept = long_tail(labels, names(classes), imbalance)
    assert len(kept) == len(set(kept.tolist())) == total
    counts = np.bincount(labels[kept], minlength=classes)
    assert (counts[0], counts[-1]) == (per_class, int(per_class * imbalance))
    assert (np.diff(counts) <= 0).all()


@pytest.mark.parametrize("imbalance", [0.005, 0.01, 0.02, 0.3])
def test_images_are_those_of_the_authors_algorithm(imbalance: float) -> None:
    labels = shuffled([500] * 10)
    samples, assigned = authors_split(labels, imbalance)
    np.testing.assert_array_equal(long_tail(labels, names(10), imbalance), samples)
    np.testing.assert_array_equal(labels[samples], assigned)


def test_global_generator_is_neither_read_nor_changed() -> None:
    labels = shuffled([100] * 5)
    np.random.seed(3)
    first = long_tail(labels, names(5), 0.1)
    drawn = np.random.random()
    np.random.seed(3)
    assert np.random.random() == drawn
    np.testing.assert_array_equal(long_tail(labels, names(5), 0.1), first)


@pytest.mark.parametrize(("imbalance", "total"), [(0.005, 14_035), (0.01, 15_800), (0.02, 18_130)])
def test_class_with_fewer_images_than_its_share_keeps_all(
    imbalance: float, total: int, caplog: pytest.LogCaptureFixture
) -> None:
    labels = shuffled(SVHN_TRAIN)
    kept = long_tail(labels, names(10), imbalance)
    assert len(kept) == total
    counts = np.bincount(labels[kept])
    assert counts[0] == SVHN_TRAIN[0]
    assert counts[1:].tolist() == [int(7325.7 * imbalance ** (k / 9)) for k in range(1, 10)]
    assert "'class 0': 4948 of 7325" in caplog.text


@pytest.mark.parametrize(("imbalance", "wrong"), [(0.005, 0.327), (0.01, 0.340), (0.02, 0.349)])
def test_a_third_of_the_authors_svhn_labels_are_wrong(imbalance: float, wrong: float) -> None:
    right: list[np.ndarray] = []
    for counts in (SVHN_TRAIN, SVHN_EXTRA):
        labels = shuffled(counts)
        samples, assigned = long_tail_legacy(labels, names(10), imbalance)
        expected = authors_split(labels, imbalance)
        np.testing.assert_array_equal(samples, expected[0])
        np.testing.assert_array_equal(assigned, expected[1])
        right.append(labels[samples] == assigned)
    assert 1 - np.concatenate(right).mean() == pytest.approx(wrong, abs=5e-4)


def test_authors_labels_are_right_without_a_short_class() -> None:
    labels = shuffled([50] * 10)
    samples, assigned = long_tail_legacy(labels, names(10), 0.1)
    np.testing.assert_array_equal(samples, long_tail(labels, names(10), 0.1))
    np.testing.assert_array_equal(labels[samples], assigned)


@pytest.mark.parametrize("per_class", [3, 7, 50, 143, 500, 625])
def test_empty_class_is_refused_with_a_valid_remedy(per_class: int) -> None:
    labels = shuffled([per_class] * 10)
    with pytest.raises(UserError, match=r"the class 'class \d' would keep no training image") as caught:
        long_tail(labels, names(10), 0.9 / per_class)
    assert (caught.value.field, caught.value.value) == ("data.imbalance", 0.9 / per_class)
    advised = float(caught.value.remedy.removeprefix("Choose at least ").removesuffix("."))
    assert np.bincount(labels[long_tail(labels, names(10), advised)], minlength=10).min() >= 1


def test_data_set_too_small_for_any_imbalance() -> None:
    with pytest.raises(UserError, match=r"Leave data\.imbalance out"):
        long_tail(np.arange(5), names(5), 0.5)


def test_class_without_images_stays_empty() -> None:
    labels = shuffled([90, 90, 90])
    kept = long_tail(labels, names(4), 0.1)
    assert np.bincount(labels[kept], minlength=4)[3] == 0


@pytest.mark.parametrize(("classes", "starts"), [(10, (3, 7)), (100, (36, 71))])
def test_groups_are_the_published_ones(classes: int, starts: tuple[int, int]) -> None:
    groups = class_groups(np.full(classes, 500), 0.01)
    medium, tail = starts
    expected = ("head",) * medium + ("medium",) * (tail - medium) + ("tail",) * (classes - tail)
    assert groups == expected


def test_other_numbers_of_classes_are_grouped_by_images() -> None:
    counts = np.array([500, 101, 100, 20, 19, 0])
    expected = ("head", "head", "medium", "medium", "tail", "tail")
    assert class_groups(counts, 0.01) == expected
    assert class_groups(counts, None) == expected


@pytest.mark.parametrize(
    ("counts", "has_tail"),
    [
        ([500] * 10, False),
        (SVHN_TRAIN, False),
        ([1300, 732], False),
        ([100, 11], False),
        ([100, 10], True),
        ([1280] + [5] * 99, True),
        ([60, 0, 60], False),
        ([0, 0], False),
    ],
)
def test_natural_split_has_groups_only_if_long_tailed(counts: list[int], has_tail: bool) -> None:
    groups = class_groups(np.array(counts), None)
    assert (groups is not None) == has_tail
