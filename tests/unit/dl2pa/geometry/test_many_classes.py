"""Prototypes of very many classes: no step looks at all pairs, and the certificate says how many it looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dl2pa.geometry import build_prototypes, load_prototypes, save_prototypes, search, sequences
from dl2pa.geometry import certificate as certificates
from dl2pa.geometry.certificate import certify, nearest_cosines


@pytest.mark.parametrize(("degree", "errors"), [(5, 2), (6, 2), (7, 2), (7, 3), (8, 3)])
def test_words_of_a_dual_bch_code_have_the_correlations_of_the_literature(degree: int, errors: int) -> None:
    words = sequences.dual_bch(degree, errors, 1500, 0).astype(np.int32)
    assert np.array_equal(words, sequences.dual_bch(degree, errors, 1500, 0))
    products = words @ words.T
    np.fill_diagonal(products, 0)
    length = 1 << degree
    assert len(np.unique(words, axis=0)) == 1500
    sizes = set(np.unique(np.abs(products[products > -length])).tolist())
    assert max(sizes) == sequences.dual_bch_correlation(degree, errors)


@pytest.mark.parametrize(
    ("classes", "dim", "made", "cosine"),
    [
        (40_000, 256, "known: ", 0.0625),
        (40_000, 130, "dual BCH 128, 3 errors", 0.25),
        (40_000, 8, "random", None),
    ],
)
def test_many_classes_are_placed_without_looking_at_all_pairs(
    classes: int, dim: int, made: str, cosine: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("all pairs were looked at")

    for module in (search, certificates):
        monkeypatch.setattr(module, "nearest_cosines", refuse)
    monkeypatch.setattr(certificates, "_PAIRS_CHECKED", 2000 * classes)
    found = build_prototypes(classes, dim)
    assert found.points.shape == (classes, dim)
    assert found.points.dtype == torch.float32
    torch.testing.assert_close(found.points.norm(dim=1), torch.ones(classes))
    assert found.certificate.construction.startswith(made)
    assert found.certificate.checked == 2000
    if cosine is not None:
        assert found.certificate.max_cosine == pytest.approx(cosine, abs=1e-6)
    assert found.certificate.mean_norm < 0.05


def test_a_sample_of_a_certificate_sees_the_nearest_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    exact = nearest_cosines(points)
    monkeypatch.setattr(certificates, "_ALL_UP_TO", 100)
    monkeypatch.setattr(certificates, "_FEWEST_CHECKED", 500)
    monkeypatch.setattr(certificates, "BLOCK_ELEMENTS", 500 * 64)
    whole = certify(points, "file", 0.0)
    assert whole.max_cosine == pytest.approx(float(exact.max()), abs=1e-12)
    assert whole.mean_nearest_cosine == pytest.approx(float(exact.mean()), abs=1e-12)
    monkeypatch.setattr(certificates, "_FEWEST_CHECKED", 50)
    monkeypatch.setattr(certificates, "_PAIRS_CHECKED", 0)
    part = certify(points, "file", 0.0)
    assert part.checked == 50
    assert part.max_cosine <= whole.max_cosine


def test_the_number_checked_is_kept_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "_ALL_UP_TO", 10)
    monkeypatch.setattr(certificates, "_FEWEST_CHECKED", 7)
    monkeypatch.setattr(certificates, "_PAIRS_CHECKED", 0)
    path = save_prototypes(build_prototypes(20, 4), tmp_path / "p.safetensors")
    assert load_prototypes(path, 20, 4).certificate.checked == 7
