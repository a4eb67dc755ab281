"""A small folder of images, and the features of a small network for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dl2pa.config import Config, merge, parse_config
from dl2pa.features.write import FeatureOptions, write_features
from dl2pa.training.data import open_data
from support.threads import one_thread as one_thread

SIDE, TRAIN, VAL, CLASSES = 12, 8, 4, 3


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noise around different colors, 24 training and 12 validation images."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.normal(60 + 60 * label, 40, (SIDE, SIDE, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def settings(images: Path) -> Callable[..., Config]:
    """Configuration of a small frozen network on the images, with changes."""

    def make(**change: Any) -> Config:
        base: dict[str, Any] = {
            "data": {
                **{"dataset": "imagefolder", "root": str(images), "loader": "resident"},
                **{"image_size": SIDE, "crop": "none", "flip": 0.0},
            },
            "model": {"backbone": "resnet8", "embedding_dim": 2, "widths": [4, 4, 8]},
            "train": {"batch_size": 4, "epochs": 3},
            "launch": {"device": "cpu", "threads": 1},
            "tracking": {"uri": "none"},
        }
        return parse_config(merge(base, change))

    return make


@pytest.fixture(scope="session")
def write(settings: Callable[..., Config]) -> Callable[..., dict[str, Any]]:
    """Write the features to a folder; returns their record."""

    def run(out: Path, dtype: str = "float32", pca: int | None = None, **change: Any) -> dict[str, Any]:
        config = settings(**change)
        return write_features(config, open_data(config, 1), out, FeatureOptions(dtype, pca))

    return run


@pytest.fixture(scope="session")
def folder(write: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of the images in float32."""
    out = tmp_path_factory.mktemp("features") / "f"
    write(out)
    return out


@pytest.fixture(scope="session")
def on_features(settings: Callable[..., Config], folder: Path) -> Callable[..., Config]:
    """Configuration of a training on the features, with changes."""

    def make(**change: Any) -> Config:
        data = {"dataset": "features", "root": str(folder), "loader": "auto"}
        return settings(**merge({"data": data, "model": {"backbone": "identity"}}, change))

    return make


@pytest.fixture
def file_of(tmp_path: Path) -> Callable[[Config], Path]:
    """Write a configuration to a file."""

    def dump(config: Config) -> Path:
        path = tmp_path / "probe.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
        return path

    return dump
