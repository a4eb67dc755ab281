"""What MLflow has to know of a finished model: an image to try it with, the packages it needs, what it is."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dl2pa.backbones import TORCHVISION
from dl2pa.config import Config
from dl2pa.rundir import RunDirectory
from dl2pa.tracking import Tracker
from pipelines.build import Dataset, num_samples
from pipelines.datasets import ArrayDataset, ImageTable

_NEEDED = ("mlflow", "numpy", "pandas", "pillow", "safetensors", "torch")
_EXAMPLE = "example"
_MOST_BYTES = 1 << 20


def record_model(
    tracker: Tracker, run: RunDirectory, config: Config, val: Dataset, result: Mapping[str, Any]
) -> None:
    """Have the finished model logged; like all tracking this never fails training.

    Args:
        val: the validation set; the first image becomes the input example.
        result: of the run; its accuracy goes with the model.
    """
    if not tracker.enabled:
        return
    try:
        example = write_example(run.root, val)
        fields = describe_model(run, config, result)
    except Exception as error:
        tracker.note_failure("model", error)
        return
    tracker.model(**fields, example=None if example is None else example.name)


def write_example(folder: Path, val: Dataset) -> Path | None:
    """An encoded validation image as ``example.*``: the first of at most 1 MiB; None where the set has no files."""
    for sample in range(min(16, num_samples(val))):
        found = encoded_image(val, sample)
        if found is not None and len(found[0]) <= _MOST_BYTES:
            path = folder / f"{_EXAMPLE}.{found[1]}"
            path.write_bytes(found[0])
            return path
    return None


def find_example(folder: Path) -> Path | None:
    """The image that ``write_example`` left in a run directory."""
    return next(iter(sorted(folder.glob(f"{_EXAMPLE}.*"))), None)


def encoded_image(dataset: Dataset, sample: int) -> tuple[bytes, str] | None:
    """An image as a file holds it, and the file's suffix; None where the set holds none."""
    if isinstance(dataset, ImageTable):
        return dataset.read(sample), dataset.path(sample).suffix.lstrip(".").lower()
    if isinstance(dataset, ArrayDataset):
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(dataset.images[sample]).save(file, "PNG")
        return file.getvalue(), "png"
    return None


def requirements(backbone: str) -> list[str]:
    """What a machine needs to run the model, as installed here: our own code comes with it."""
    torchvision = ("torchvision",) if backbone in TORCHVISION else ()
    pinned: list[str] = []
    for package in sorted((*_NEEDED, *torchvision)):
        try:
            version = metadata.version(package).partition("+")[0]  # a build's own suffix is in no index
        except metadata.PackageNotFoundError:
            continue
        pinned.append(f"{package}=={version}")
    return pinned


def describe_model(run: RunDirectory, config: Config, result: Mapping[str, Any]) -> dict[str, Any]:
    """What ``dl2pa.tracking.model.log_model`` takes, but for the example.

    Args:
        result: of the finished run.
    """
    with run.model.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    params = {
        "method": config.method.name,
        "backbone": config.model.backbone,
        "dim": config.model.embedding_dim,
        "dataset": config.data.dataset,
        "num_classes": result["num_classes"],
        "image_size": config.data.image_size,
        "seed": config.train.seed,
    }
    measured = {f"dl2pa.{key}": f"{result[key]:.2f}" for key in ("top1_last", "top5_last", "ece_last")}
    return {
        "path": run.model.name,
        "sha256": digest,
        "step": result["steps"],
        "requirements": requirements(config.model.backbone),
        "params": {key: str(value) for key, value in params.items()},
        "tags": measured,
    }
