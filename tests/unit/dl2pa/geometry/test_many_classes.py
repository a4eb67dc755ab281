"""Prototypes of very many classes: nothing compares all pairs, and the certificate has the number checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dl2pa.geometry import build_prototypes, load_prototypes, save_prototypes, search, sequences
from dl2pa.geometry import certificate as certificates
from dl2pa.geometry.certificate import certify, nearest_cosines


@pytest.mark.parametrize(("degree", "errors"), [(5, 2), (6, 2), (7, 2), (7, 3), (8, 3)])
def test_dual_bch_words_have_the_published_correlations(degree: int, errors: int) -> None:
    words = sequences.dual_bch(degree, errors, 1500, 0).astype(np.int32)
    assert np.array_equal(words, sequences.dual_bch(degree, errors, 1500, 0))
    products = words @ words.T
    np.fill_diagonal(products, 0)
    length = 1 << degree
    assert len(np.unique(words, axis=0)) == 1500
    largest = np.abs(products[products > -length]).max()
    assert largest == sequences.dual_bch_correlation(degree, errors)


@pytest.mark.parametrize(
    ("classes", "dim", "construction", "cosine"),
    [
        (40_000, 256, "known: ", 0.0625),
        (40_000, 130, "dual BCH 128, 3 errors", 0.25),
        (40_000, 8, "random", None),
    ],
)
def test_many_classes_are_placed_without_all_pairs(
    classes: int, dim: int, construction: str, cosine: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("all pairs were compared")

    for module in (search, certificates):
        monkeypatch.setattr(module, "nearest_cosines", fail)
    monkeypatch.setattr(certificates, "_PAIRS_CHECKED", 2000 * classes)
    prototypes = build_prototypes(classes, dim)
    assert prototypes.points.shape == (classes, dim)
    assert prototypes.points.dtype == torch.float32
    torch.testing.assert_close(prototypes.points.norm(dim=1), torch.ones(classes))
    assert prototypes.certificate.construction.startswith(construction)
    assert prototypes.certificate.checked == 2000
    if cosine is not None:
        assert prototypes.certificate.max_cosine == pytest.approx(cosine, abs=1e-6)
    assert prototypes.certificate.mean_norm < 0.05


def test_sampled_certificate_measures_the_sampled_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    exact = nearest_cosines(points)
    monkeypatch.setattr(certificates, "_MAX_EXHAUSTIVE", 100)
    monkeypatch.setattr(certificates, "_MIN_CHECKED", 500)
    monkeypatch.setattr(certificates, "BLOCK_ELEMENTS", 500 * 64)
    full = certify(points, "file", 0.0)
    assert full.max_cosine == pytest.approx(float(exact.max()), abs=1e-12)
    assert full.mean_nearest_cosine == pytest.approx(float(exact.mean()), abs=1e-12)
    monkeypatch.setattr(certificates, "_MIN_CHECKED", 50)
    monkeypatch.setattr(certificates, "_PAIRS_CHECKED", 0)
    sampled = certify(points, "file", 0.0)
    assert sampled.checked == 50
    assert sampled.max_cosine <= full.max_cosine


def test_number_checked_is_stored_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "_MAX_EXHAUSTIVE", 10)
    monkeypatch.setattr(certificates, "_MIN_CHECKED", 7)
    monkeypatch.setattr(certificates, "_PAIRS_CHECKED", 0)
    path = save_prototypes(build_prototypes(20, 4), tmp_path / "p.safetensors")
    assert load_prototypes(path, 20, 4).certificate.checked == 7
