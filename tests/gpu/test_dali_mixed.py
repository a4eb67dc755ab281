"""DALI's `mixed` decoder on the GPU gives the batches of the CPU: training, validation, damaged files."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic")
if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
    pytest.skip("DALI is not installed", allow_module_level=True)

from PIL import Image

from pipelines.batch import Batch
from pipelines.build import build_pipeline
from pipelines.datasets.folder import index_folder
from pipelines.encoded import FaultLimits
from pipelines.sampler import EvalSampler, TrainSampler
from pipelines.transforms import Transforms

COUNT, BATCH = 44, 16


def encoded(number: int) -> bytes:
    """A smooth JPEG; size, subsampling and encoding vary, so that hardware and software decoders are used."""
    random = np.random.default_rng(number)
    small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = small.resize((200 + 8 * number, 180 + 5 * number), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    mode = "L" if number % 11 == 5 else "RGB"
    options: dict[str, Any] = {"progressive": number % 5 == 4}
    if mode == "RGB":
        options["subsampling"] = number % 3
    image.convert(mode).save(file, "JPEG", quality=92, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for number in range(COUNT):
        file = root / ("a" if number < COUNT // 2 else "b") / f"{number:03d}.jpeg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encoded(number))
    return root


def batches(
    root: Path, transforms: Transforms, sampler: Any, device: torch.device
) -> tuple[list[Batch], list[str]]:
    """All batches of two epochs, and the unreadable images."""
    dataset = index_folder(root, None, "data.root")
    options: dict[str, Any] = {"seed": 0, "threads": 2, "limits": FaultLimits(0.5, 0.5)}
    pipeline = build_pipeline(dataset, transforms, sampler, loader="dali", device=device, **options)
    found: list[Batch] = []
    try:
        for epoch in range(2):
            pipeline.start(epoch)
            found += list(pipeline)
        return found, pipeline.bad_images()
    finally:
        pipeline.close()


def compare(
    root: Path, transforms: Transforms, sampler: Any, device: torch.device
) -> tuple[list[Batch], list[str]]:
    """Batches on the GPU, after a comparison with those on the CPU."""
    there, bad_there = batches(root, transforms, sampler, device)
    here, bad_here = batches(root, transforms, sampler, torch.device("cpu"))
    assert bad_there == bad_here and len(there) == len(here)
    for one, other in zip(there, here, strict=True):
        assert one.images.device.type == device.type
        assert torch.equal(one.indices.cpu(), other.indices) and torch.equal(one.targets.cpu(), other.targets)
        assert (one.valid, one.missing) == (other.valid, other.missing)
        difference = (one.images[: one.valid].cpu() - other.images[: one.valid]).abs()
        assert difference.mean() < 0.03, "more than about two gray levels"
    return there, bad_there


@pytest.mark.parametrize("augmented", [False, True], ids=["plain", "augmented"])
def test_training_batches_equal_those_of_the_cpu(augmented: bool, folder: Path, device: torch.device) -> None:
    more = {"trivial_augment": True, "erasing": 0.25} if augmented else {}
    transforms = Transforms(image_size=64, train=True, **more)
    found, bad = compare(folder, transforms, TrainSampler(COUNT, BATCH, 0), device)
    assert len(found) == 2 * (COUNT // BATCH) and bad == []


def test_the_last_validation_batch_is_partial(folder: Path, device: torch.device) -> None:
    transforms = Transforms(image_size=64, train=False, eval_resize=72)
    found, _ = compare(folder, transforms, EvalSampler(COUNT, BATCH), device)
    assert [batch.valid for batch in found] == [16, 16, 12] * 2


@pytest.mark.parametrize("train", [True, False], ids=["training", "validation"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_corrupt_file_is_replaced_or_left_out(
    damage: str, train: bool, folder: Path, device: torch.device, tmp_path: Path
) -> None:
    root = tmp_path / "set"
    for path in folder.rglob("*.jpeg"):
        target = root / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    bad = root / "a/003.jpeg"
    content = bad.read_bytes()
    bad.write_bytes(content[: len(content) // 3] if damage == "truncated" else b"no image at all" * 50)
    transforms = Transforms(image_size=64, train=train, eval_resize=72)
    sampler = TrainSampler(COUNT, BATCH, 0) if train else EvalSampler(COUNT, BATCH)
    _, names = compare(root, transforms, sampler, device)
    assert len(names) == 1 and names[0].endswith("003.jpeg")
