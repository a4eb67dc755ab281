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
from dl2pa.model.inference import load_classifier
from dl2pa.model.model import build_model
from dl2pa.model.saved import save_classifier
from dl2pa.specs import METHODS

CLASSES = tuple("abcde")
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
            "model": {"backbone": backbone, "embedding_dim": 4, "init": "somewhere", "freeze_epochs": 1},
        }
    )
    model = build_model(settings, 5).eval()
    save_classifier(tmp_path / "model.safetensors", model, settings, CLASSES)
    generator = torch.get_rng_state()
    classifier = load_classifier(tmp_path)
    assert torch.equal(torch.get_rng_state(), generator)
    assert {"init", "freeze_epochs"}.isdisjoint(classifier.description["model"])
    images = torch.randn(2, 3, side, side)
    assert torch.equal(classifier.score(images), model.score(images))
