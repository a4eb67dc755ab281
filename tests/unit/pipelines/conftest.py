"""Fixtures: photographs, if the machine has them, and small generated images."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.batch import Pipeline
from pipelines.build import build_pipeline
from pipelines.dataset import Dataset
from pipelines.datasets.folder import index_folder
from pipelines.datasets.table import ImageTable
from pipelines.encoded import FaultLimits
from pipelines.sampler import EvalSampler, TrainSampler
from pipelines.transforms import Transforms
from support.threads import one_thread as one_thread

SHARED = Path(__file__).resolve().parents[4] / "shared/data"


@pytest.fixture(scope="session")
def photographs() -> list[Path]:
    """A dozen ImageNet photographs of various sizes and aspect ratios, some gray."""
    folder = SHARED / "imagenet-samples"
    if not folder.exists():
        pytest.skip(f"needs photographs: there is no {folder}")
    return sorted(folder.rglob("*.JPEG"))[::22]


class Drawn:
    """Encoded images of smooth gradients, different for each i."""

    @staticmethod
    def image(i: int, height: int = 60, width: int = 80) -> Image.Image:
        y, x = np.mgrid[0:height, 0:width]
        channels = [(x * 3 + i * 11) % 256, y * 4 % 256, (x + y + 5 * i) * 2 % 256]
        return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))

    @classmethod
    def encoded(cls, i: int, form: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
        file = io.BytesIO()
        cls.image(i).convert(mode).save(file, form, **options)
        return file.getvalue()


@pytest.fixture(scope="session")
def drawn() -> type[Drawn]:
    return Drawn


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., ImageTable]:
    """``folder(8, {5: data})``: 8 generated JPEGs, 4 of class a and 4 of class b; the bytes of sample 5 are `data`."""

    def make(count: int, others: dict[int, bytes] | None = None) -> ImageTable:
        root = tmp_path / f"set {len(list(tmp_path.iterdir()))}"
        for i in range(count):
            file = root / ("a" if 2 * i < count else "b") / f"{i:03d}.jpeg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((others or {}).get(i, Drawn.encoded(i)))
        return index_folder(root, None, "data.root")

    return make


@pytest.fixture
def pipeline_over() -> Iterator[Callable[..., Pipeline]]:
    """Build pipelines on the CPU with one thread; close them after the test."""
    opened: list[Pipeline] = []

    def build(
        dataset: Dataset,
        loader: str,
        transforms: Transforms,
        sampler: TrainSampler | EvalSampler,
        **options: Any,
    ) -> Pipeline:
        settings = {"seed": 0, "device": torch.device("cpu"), "threads": 1, "limits": FaultLimits(0.5)}
        pipeline = build_pipeline(dataset, transforms, sampler, loader=loader, **{**settings, **options})
        opened.append(pipeline)
        return pipeline

    yield build
    for pipeline in opened:
        pipeline.close()
