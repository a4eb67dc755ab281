"""Certificates: measured values, and lower bounds that known optimal codes attain."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dl2pa.geometry import certify, max_cosine_bound


def test_certificate_measures_cosines_and_mean_norm() -> None:
    points = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    certificate = certify(points, "by hand", 1.5)
    assert certificate.max_cosine == pytest.approx(0.6, abs=1e-6)
    assert certificate.mean_nearest_cosine == pytest.approx((0.6 + 0.6 + 0.0) / 3, abs=1e-6)
    assert certificate.as_dict() == {
        "num_classes": 3,
        "dim": 2,
        "max_cosine": certificate.max_cosine,
        "mean_nearest_cosine": certificate.mean_nearest_cosine,
        "mean_norm": pytest.approx(math.sqrt(2.6) / 3, abs=1e-6),
        "lower_bound": -0.5,
        "construction": "by hand",
        "seconds": 1.5,
        "checked": 3,
    }


def test_blocks_of_rows_equal_the_full_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(101, 6, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(points.double(), dim=1)
    gram = (unit @ unit.T).fill_diagonal_(-2.0)
    monkeypatch.setattr("dl2pa.geometry.certificate.BLOCK_ELEMENTS", 101 * 7)
    certificate = certify(points, "random", 0.0)
    assert certificate.max_cosine == pytest.approx(float(gram.max()), abs=1e-14)
    assert certificate.mean_nearest_cosine == pytest.approx(float(gram.amax(dim=1).mean()), abs=1e-14)


@pytest.mark.parametrize(
    ("num_classes", "dim", "cosine"),
    [
        (12, 3, 1 / math.sqrt(5)),
        (16, 5, 1 / 5),
        (27, 6, 1 / 4),
        (56, 7, 1 / 3),
        (240, 8, 1 / 2),
        (100, 22, 1 / 11),
        (275, 22, 1 / 6),
        (552, 23, 1 / 5),
        (4600, 23, 1 / 3),
        (196_560, 24, 1 / 2),
    ],
)
def test_sharp_codes_attain_the_bound(num_classes: int, dim: int, cosine: float) -> None:
    assert max_cosine_bound(num_classes, dim) == pytest.approx(cosine, abs=1e-9)


def test_bound_in_each_regime() -> None:
    assert max_cosine_bound(100, 99) == -1 / 99
    assert max_cosine_bound(101, 99) == 0.0
    assert max_cosine_bound(1000, 512) == 0.0
    assert max_cosine_bound(8, 2) == pytest.approx(math.cos(math.pi / 4))
    assert max_cosine_bound(3, 1) == 1.0
    assert max_cosine_bound(100, 3) == pytest.approx(0.928, abs=1e-3)
    assert 0.03 < max_cosine_bound(21_841, 512) < 0.04


@pytest.mark.parametrize("dim", [2, 3, 4, 7, 25])
def test_bound_is_monotonic_in_the_number_of_classes(dim: int) -> None:
    bounds = [max_cosine_bound(num_classes, dim) for num_classes in range(2, 400)]
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(bounds))
