"""Page of nearest images."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from dl2pa.config import Config, parse_config
from dl2pa.model.inference import load_classifier
from dl2pa.model.model import build_model
from dl2pa.model.saved import save_classifier
from dl2pa.reporting import nearest
from dl2pa.reporting.nearest import find_nearest, nearest_of, nearest_page
from dl2pa.training.data import open_split
from dl2pa.training.evaluate import Predictions
from pipelines.datasets import FeatureDataset, ImageTable

NAMES = ("ant", "<b>bee", "cat")
COUNT = 60


def predictions_of(targets: np.ndarray, predicted: np.ndarray) -> Predictions:
    confidence = np.random.default_rng(0).uniform(0.4, 1, len(targets))
    return Predictions(
        np.arange(len(targets)), targets, predicted, confidence, targets == predicted, confidence / 2
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, ImageTable]:
    """Configuration, model file and 60 validation images of three classes, one of them unreadable."""
    root = tmp_path_factory.mktemp("nearest")
    pixels = np.random.default_rng(1).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
    for i in range(COUNT):
        for split in ("train", "val"):
            file = root / split / "abc"[i // 20] / f"{i:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i]).save(file)
    (root / "val/a/03.png").write_bytes(b"no image")
    data = {"dataset": "imagefolder", "root": str(root), "image_size": 8, "loader": "torchvision"}
    model = {"backbone": "resnet8", "embedding_dim": 4, "widths": [4, 4, 4]}
    config = parse_config(
        {"data": {**data, "max_bad_val_fraction": 0.1}, "model": model, "launch": {"device": "cpu"}}
    )
    torch.manual_seed(0)
    save_classifier(root / "model.safetensors", build_model(config, 3), config, NAMES)
    val = open_split(config, "val")
    assert isinstance(val, ImageTable)
    return config, root / "model.safetensors", val


def test_nearest_images_are_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    unit = F.normalize(torch.randn(COUNT, 5, generator=generator), dim=1)
    targets = np.arange(COUNT) % 3
    predicted = np.where(np.arange(COUNT) % 5, targets, (targets + 1) % 3)
    positions = np.arange(0, COUNT, dtype=np.int64)
    result = nearest_of(unit, positions, predictions_of(targets, predicted))
    search = NearestNeighbors(n_neighbors=7, metric="cosine").fit(unit.numpy())
    distances, found = search.kneighbors(unit.numpy())
    assert result.neighbors.tolist() == found[result.queries, 1:].tolist()
    assert result.cosines == pytest.approx(1 - distances[result.queries, 1:], abs=1e-6)
    assert result.same_class == int((targets[found[:, 1]] == targets).sum())
    wrong = predicted[result.queries] != targets[result.queries]
    assert wrong.tolist() == sorted(wrong.tolist(), reverse=True) and wrong.sum() == 12


def test_images_are_found_by_their_embedding(run: tuple[Config, Path, ImageTable]) -> None:
    config, model, val = run
    readable = np.array([i for i in range(COUNT) if i != 3])
    predictions = Predictions(
        *(readable, readable // 20, readable % 3, np.full(59, 0.5), np.full(59, True)),
    )
    result = find_nearest(config, model, val, predictions)
    assert result is not None and result.count == 59
    vectors = load_classifier(model).embed([val.path(i) for i in readable.tolist()])
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    for query, near in zip(result.queries.tolist(), result.neighbors.tolist(), strict=True):
        assert cosines[query, near] == pytest.approx(np.sort(cosines[query])[::-1][:6], abs=1e-5)


def test_number_and_time_are_limited(
    run: tuple[Config, Path, ImageTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model, val = run
    targets = np.arange(COUNT) // 20
    predictions = predictions_of(targets, targets)
    monkeypatch.setattr(nearest, "_MAX_IMAGES", 30)
    limited = find_nearest(config, model, val, predictions)
    assert limited is not None and 28 < limited.count <= 30
    assert {int(targets[i]) for i in limited.queries} == {0, 1, 2}  # drawn from all classes
    monkeypatch.setattr(nearest, "_MAX_IMAGES", COUNT)
    monkeypatch.setattr(nearest, "_MAX_SECONDS", 0.0)
    monkeypatch.setattr(nearest, "BATCH", 16)
    short = find_nearest(config, model, val, predictions)
    assert short is not None and short.count in (15, 16)


def test_feature_vectors_have_no_page(run: tuple[Config, Path, ImageTable]) -> None:
    config, model, _ = run
    features = FeatureDataset.__new__(FeatureDataset)
    targets = np.arange(COUNT) % 3
    assert find_nearest(config, model, features, predictions_of(targets, targets)) is None


def test_right_and_wrong_are_named_in_words() -> None:
    targets = np.array([0, 0, 1, 2])
    predictions = predictions_of(targets, np.array([0, 1, 1, 2]))
    result = nearest_of(torch.eye(4) + 0.1, np.arange(4), predictions)
    text = nearest_page(
        result, predictions, NAMES, dict.fromkeys(range(4), b"\x89PNG"), "run", [("summary", "s.html")]
    )
    assert "<b>bee" not in text and "&lt;b&gt;bee" in text
    captions = re.findall(r"(✓|✗) (correct|wrong|same class|other class)", text)
    assert {("✓", "correct"), ("✗", "wrong"), ("✓", "same class"), ("✗", "other class")} == set(captions)
    assert len(captions) == 4 + 4 * 3
    assert "calibrated confidence" in text and 'href="s.html"' in text
    assert text.index("Wrong predictions") < text.index("Correct predictions")
