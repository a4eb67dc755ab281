"""Model files give the predictions of the trained model, for every method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dl2pa.config import Config, parse_config
from dl2pa.errors import UserError
from dl2pa.model.inference import Classifier, load_classifier
from dl2pa.model.model import build_model
from dl2pa.model.saved import save_classifier
from dl2pa.specs import METHODS

CLASSES = tuple("abcde")
PICTURES = np.random.default_rng(3).integers(0, 256, (70, 12, 9, 3), dtype=np.uint8)
IMAGES = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def config(name: str, tmp_path: Path, **method: Any) -> Config:
    if name == "word2vec":
        np.save(tmp_path / "vectors.npy", np.random.default_rng(0).standard_normal((5, 9)))
        method["class_vectors"] = str(tmp_path / "vectors.npy")
    return parse_config(
        {
            "data": {"dataset": "synthetic", "num_classes": 5, "image_size": 8},
            "model": {"backbone": "resnet8", "embedding_dim": 4, "widths": [4, 4, 4]},
            "method": {"name": name, **method},
        }
    )


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, {}) for name in METHODS),
        ("psc", {"normalize": False}),
        ("ebv", {"learn_scale": True, "margin": 0.2}),
        ("goto", {"sub_prototypes": 1}),
    ],
)
def test_saved_model_gives_the_scores_of_the_method(
    name: str, method: dict[str, Any], tmp_path: Path
) -> None:
    settings = config(name, tmp_path, **method)
    model = build_model(settings, 5).eval()
    with torch.no_grad():
        for parameter in model.method.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    save_classifier(tmp_path / "model.safetensors", model, settings, CLASSES)
    classifier = load_classifier(tmp_path).to(torch.device("cpu"))
    expected = model.score(IMAGES)
    assert torch.equal(classifier.score(IMAGES), expected)
    assert np.ptp(expected.numpy(), axis=1).min() > 1e-4
    assert classifier.classes == list(CLASSES)


@pytest.mark.parametrize("linear", [False, True])
def test_file_without_normalize_loads(linear: bool, tmp_path: Path) -> None:
    """Early files have no `normalize`; a scale of null is a linear classifier."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    settings = config("psc", tmp_path, normalize=not linear, scale=7.0)
    model = build_model(settings, 5).eval()
    file = tmp_path / "model.safetensors"
    save_classifier(file, model, settings, CLASSES)
    with safe_open(file, framework="pt") as stored:
        description = json.loads(stored.metadata()["dl2pa"])
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    for key in ("normalize", "vectors_per_class"):
        del description[key]
    description["scale"] = None if linear else 7.0
    save_file(tensors, file, metadata={"dl2pa": json.dumps(description)})
    assert torch.equal(load_classifier(file).score(IMAGES), model.score(IMAGES))


def test_file_with_too_few_vectors_is_rejected(tmp_path: Path) -> None:
    settings = config("dnc", tmp_path)
    save_classifier(tmp_path / "model.safetensors", build_model(settings, 5), settings, (*CLASSES, "f"))
    with pytest.raises(UserError, match="number of class names differs"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("backbone", "side"),
    [("timm:test_vit", 48), ("timm:test_efficientnet", 32), ("regnet_y_400mf", 32), ("vit_b_32", 64)],
)
def test_networks_of_libraries_are_loaded_for_their_image_size(
    backbone: str, side: int, tmp_path: Path
) -> None:
    """Some compute tensors while they are built, which a model file does not contain."""
    if backbone.startswith("timm:"):
        pytest.importorskip("timm")
    settings = parse_config(
        {
            "data": {"dataset": "synthetic", "num_classes": 5, "image_size": side},
            "model": {
                **{"backbone": backbone, "embedding_dim": 4},
                **{"init": "somewhere", "freeze_epochs": 1, "freeze_norm": True},
                "freeze_before": {"vit_b_32": "encoder.layers.encoder_layer_3"}.get(backbone),
            },
        }
    )
    model = build_model(settings, 5).eval()
    save_classifier(tmp_path / "model.safetensors", model, settings, CLASSES)
    generator = torch.get_rng_state()
    classifier = load_classifier(tmp_path)
    assert torch.equal(torch.get_rng_state(), generator)
    assert {"init", "freeze_epochs", "freeze_before", "freeze_norm"}.isdisjoint(
        classifier.description["model"]
    )
    images = torch.randn(2, 3, side, side)
    assert torch.equal(classifier.score(images), model.score(images))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    folder = tmp_path_factory.mktemp("model")
    settings = config("dl2pa", folder)
    save_classifier(folder / "model.safetensors", build_model(settings, 5), settings, CLASSES)
    return load_classifier(folder)


def test_predictions_are_arrays_of_documented_shapes(classifier: Classifier) -> None:
    predictions = classifier.predict(PICTURES)
    assert (predictions.scores.shape, predictions.probabilities.shape) == ((70, 5), (70, 5))
    assert predictions.scores.dtype == predictions.probabilities.dtype == np.float32
    assert np.allclose(predictions.probabilities.sum(axis=1), 1, atol=1e-6)
    labels = predictions.labels
    assert (labels.dtype, labels.shape) == (np.int64, (70,))
    assert len(set(labels.tolist())) > 1
    assert predictions.names == [CLASSES[label] for label in labels]
    for row, label, probabilities in zip(predictions.top(2), labels, predictions.probabilities, strict=True):
        assert (row[0].label, row[0].name) == (label, CLASSES[label])
        assert [p.probability for p in row] == sorted(probabilities.tolist())[:-3:-1]
    assert len(predictions.top(9)[0]) == 5


def test_a_single_image_is_a_batch_of_one(classifier: Classifier) -> None:
    one, all_ = classifier.predict(PICTURES[3]), classifier.predict(PICTURES)
    assert one.scores.shape == (1, 5)
    assert np.allclose(one.scores[0], all_.scores[3], atol=1e-5)
    assert classifier.embed(PICTURES[3]).shape == (1, 4)
    assert classifier.predict([]).scores.shape == (0, 5)
    assert classifier.embed([]).shape == (0, 4)


def test_products_of_embeddings_and_class_vectors_give_the_predicted_class(classifier: Classifier) -> None:
    embeddings, vectors = classifier.embed(iter(PICTURES)), classifier.class_vectors
    assert (embeddings.shape, embeddings.dtype, vectors.shape) == ((70, 4), np.float32, (5, 4))
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    predictions = classifier.predict(PICTURES)
    assert np.array_equal((embeddings @ vectors.T).argmax(axis=1), predictions.labels)


def test_a_classifier_is_printed_in_one_line(classifier: Classifier) -> None:
    assert repr(classifier) == "Classifier(resnet8, 4 dimensions, 5 classes, cpu)"


def test_the_temperature_changes_probabilities_only(classifier: Classifier, tmp_path: Path) -> None:
    settings = config("dl2pa", tmp_path)
    file = tmp_path / "model.safetensors"
    save_classifier(file, build_model(settings, 5), settings, CLASSES, temperature=0.1)
    calibrated = load_classifier(file).to(torch.device("cpu"))
    before, after = classifier.predict(PICTURES), calibrated.predict(PICTURES)
    assert (classifier.temperature, calibrated.temperature) == (1.0, 0.1)
    assert np.array_equal(after.scores, before.scores)
    assert np.array_equal(after.labels, before.labels)
    expected = torch.softmax(10 * torch.from_numpy(before.scores), dim=1).numpy()
    assert np.allclose(after.probabilities, expected, atol=1e-5)
    assert after.top(1)[0][0].probability > before.top(1)[0][0].probability


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), "cold"])
def test_file_with_an_invalid_temperature_is_rejected(temperature: Any, tmp_path: Path) -> None:
    settings = config("dl2pa", tmp_path)
    file = tmp_path / "model.safetensors"
    save_classifier(file, build_model(settings, 5), settings, CLASSES, temperature=temperature)
    with pytest.raises(UserError, match="its temperature is"):
        load_classifier(file)
