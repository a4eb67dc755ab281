"""A finished run on a small folder of images, and other images of its classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from support.commands import run_here
from support.threads import one_thread as one_thread

SIDE = 12
CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox")


def write_images(root: Path, counts: dict[str, int], seed: int, spread: float = 70) -> Path:
    """Write noise around one gray value per class; the classes overlap."""
    generator = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        gray = 30 + 35 * CLASSES.index(name) if name in CLASSES else 250
        for i in range(count):
            shade = generator.normal(gray, spread / 3, 3)
            pixels = generator.normal(shade, spread, (SIDE, SIDE, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes, 72 training and 36 validation images."""
    root = tmp_path_factory.mktemp("evaluated")
    write_images(root / "train", dict.fromkeys(CLASSES, 12), 0)
    write_images(root / "val", dict.fromkeys(CLASSES, 6), 1)
    return root


@pytest.fixture(scope="session")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    config = {
        "data": {
            **{"dataset": "imagefolder", "root": str(images), "loader": "resident"},
            **{"image_size": SIDE, "crop": "none", "flip": 0.0},
        },
        "model": {"backbone": "resnet8", "embedding_dim": 4, "widths": [4, 8, 8]},
        "optim": {"lr": 0.1},
        "train": {"batch_size": 12, "epochs": 4},
        "launch": {"device": "cpu", "threads": 1},
        "tracking": {"uri": "none", "figures": False},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    done = run_here("train", folder / "small.yaml", "--run-dir", folder / "run")
    assert done.code == 0, done.error
    return folder / "run"
