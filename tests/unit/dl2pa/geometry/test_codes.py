"""Known codes: sizes, dimensions and exact inner products; every code of the registry is built and measured."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from dl2pa.geometry import golay, max_cosine_bound, sequences
from dl2pa.geometry.codes import Code, derived, known_codes

MAX_GRAM = 5_000


def code_of(size: int, dim: int) -> Code:
    return next(code for code in known_codes() if (code.size, code.dim) == (size, dim))


def inner_products(rows: np.ndarray) -> set[int]:
    """Exact inner products of different rows of an integer matrix."""
    gram = rows.astype(np.int64) @ rows.astype(np.int64).T
    return set(np.unique(gram[~np.eye(len(rows), dtype=bool)]).tolist())


def cosines(points: np.ndarray) -> list[float]:
    gram = points @ points.T
    return np.unique(np.round(gram[~np.eye(len(points), dtype=bool)], 9)).tolist()


def test_weight_distribution_of_the_golay_code() -> None:
    weights = Counter(golay.golay_code().sum(axis=1).tolist())
    assert weights == {0: 1, 8: 759, 12: 2576, 16: 759, 24: 1}


def test_leech_vectors_are_distinct_and_minimal() -> None:
    vectors = golay.leech_minimal_vectors()
    assert vectors.shape == (196_560, 24)
    assert set((vectors * vectors).sum(axis=1).tolist()) == {32}
    assert len(np.unique(vectors, axis=0)) == 196_560
    assert set(np.unique(vectors[::997] @ vectors.T).tolist()) == {-32, -16, -8, 0, 8, 16, 32}


def test_inner_products_of_e8_roots_and_276_lines() -> None:
    assert inner_products(golay.e8_roots()) == {-8, -4, 0, 4}
    ends, normal = golay.equiangular_276()
    assert ends.shape == (552, 24) and not (ends @ normal).any()
    assert set((ends * ends).sum(axis=1).tolist()) == {80}
    assert inner_products(ends) == {-80, -16, 16}


@pytest.mark.parametrize(("degree", "words"), [(3, 256), (5, 4096)])
def test_inner_products_of_kerdock_words(degree: int, words: int) -> None:
    code = sequences.kerdock(degree)
    length = 2 << degree
    root = round(length**0.5)
    assert code.shape == (words, length)
    assert inner_products(code) == {-length, -root, 0, root}


def test_inner_products_of_kerdock_256() -> None:
    code = sequences.kerdock(7)
    assert code.shape == (65_536, 256)
    # These sums are exact in float32, which is fast.
    products = code[::991].astype(np.float32) @ code.astype(np.float32).T
    assert set(np.unique(products).tolist()) == {-256, -16, 0, 16, 256}
    assert (products == 256).sum() == len(products)


@pytest.mark.parametrize("degree", [3, 5])
def test_inner_products_of_gold_words(degree: int) -> None:
    code = sequences.gold(degree)
    length = 1 << degree
    root = round((2 * length) ** 0.5)
    assert code.shape == (2 * length**2, length)
    assert inner_products(code) == {-length, -root, 0, root}


@pytest.mark.parametrize(
    ("size", "dim", "expected"),
    [
        (100, 22, ["-4/11", "1/11"]),
        (77, 21, ["-3/8", "1/12"]),
        (275, 22, ["-1/4", "1/6"]),
        (162, 21, ["-2/7", "1/7"]),
        (105, 20, ["-5/16", "1/8"]),
        (112, 21, ["-1/3", "1/9"]),
        (325, 52, ["-1/4", "1/16"]),
        (256, 51, ["-13/51", "1/17"]),
        (756, 105, ["-1/5", "1/25"]),
        (891, 22, ["-1/2", "-1/8", "1/4"]),
        (128, 15, ["-1/3", "-1/15", "1/5"]),
        (56, 7, ["-1", "-1/3", "1/3"]),
        (27, 6, ["-1/2", "1/4"]),
        (16, 5, ["-3/5", "1/5"]),
    ],
)
def test_cosines_equal_the_known_fractions(size: int, dim: int, expected: list[str]) -> None:
    points = code_of(size, dim).build()
    assert points.shape == (size, dim)
    assert cosines(points) == pytest.approx([float(Fraction(value)) for value in expected], abs=1e-8)


def test_every_code_matches_its_registry_entry() -> None:
    for code in known_codes():
        if code.size > MAX_GRAM and code.size * code.dim > 5_000_000:
            continue  # tested in integers above
        points = code.build()
        assert points.shape == (code.size, code.dim), code
        assert np.abs((points * points).sum(axis=1) - 1).max() < 1e-12, code
        sample = slice(None) if code.size <= MAX_GRAM else slice(0, 100)
        gram = points[sample] @ points.T
        np.fill_diagonal(gram, -1.0)
        assert gram.max() == pytest.approx(code.cosine, abs=1e-12), code
        assert code.cosine >= max_cosine_bound(code.size, code.dim) - 1e-12, code


def test_a_derived_code_has_cosine_c_over_one_plus_c() -> None:
    source = code_of(240, 8)
    points = derived(source.build(), source.cosine)
    assert points.shape == (56, 7)
    assert max(cosines(points)) == pytest.approx(0.5 / 1.5)
