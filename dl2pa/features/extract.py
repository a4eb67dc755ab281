"""Compute features in one process: a frozen network over its chunks of both splits.

A chunk consists of whole batches and is one file, so that the features depend neither on the number of processes nor on
where an earlier pass was stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dl2pa.config import Config
from dl2pa.model.compose import load_network
from dl2pa.osutil import replacing
from dl2pa.training.data import build_subset_pipeline, open_split
from dl2pa.training.distributed import set_numerics
from dl2pa.training.train_state import autocast, memory_format
from pipelines.dataset import num_samples
from pipelines.datasets.arrays import Split
from pipelines.datasets.features import FeatureFolder

_IMAGES = 2048
"""Approximate number of images in a chunk."""


@dataclass(frozen=True)
class Chunks:
    """Division of a split into chunks of consecutive images.

    Attributes:
        count: images of the split.
        batch: images per batch.
    """

    count: int
    batch: int

    @property
    def steps(self) -> int:
        """Batches in a chunk."""
        return max(1, _IMAGES // self.batch)

    @property
    def size(self) -> int:
        """Images in a chunk; the last one may be smaller."""
        return self.steps * self.batch

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def samples(self, chunk: int) -> range:
        """Images of a chunk."""
        return range(chunk * self.size, min((chunk + 1) * self.size, self.count))


@dataclass(frozen=True)
class Task:
    """Work of one process.

    Attributes:
        network: of the record.
        batch: images per batch.
        chunks: numbers of the chunks to compute, in ascending order, per split.
        device: name of the device.
        threads: CPU threads of the process.
    """

    config: Config
    folder: FeatureFolder
    network: dict[str, Any]
    batch: int
    chunks: dict[Split, tuple[int, ...]]
    device: str
    threads: int


@dataclass(frozen=True)
class Part:
    """Content of the file of a chunk: features [n, D] float32, and labels and sample numbers [n] int64.

    Unreadable images are missing.
    """

    features: NDArray[np.float32]
    labels: NDArray[np.int64]
    samples: NDArray[np.int64]


def part_file(folder: FeatureFolder, split: Split, chunk: int) -> Path:
    """File of a chunk."""
    return folder.parts / f"{split}-{chunk:06d}.npz"


def read_part(path: Path) -> Part:
    """Read the file of a chunk."""
    with np.load(path, allow_pickle=False) as stored:
        return Part(stored["features"], stored["labels"], stored["samples"])


def compute(task: Task) -> None:
    """Compute the features of the chunks of a task and write one file each.

    Raises:
        UserError: the images cannot be read.
    """
    device = torch.device(task.device)
    set_numerics(task.config.train, device, 1)
    torch.set_num_threads(task.threads)
    network = load_network(task.folder, task.network).network.to(device)
    for split, chunks in task.chunks.items():
        if chunks:
            _compute_split(task, network, split, chunks, device)


def _compute_split(
    task: Task, network: nn.Module, split: Split, chunks: tuple[int, ...], device: torch.device
) -> None:
    config = task.config
    dataset = open_split(config, split)
    layout = Chunks(num_samples(dataset), task.batch)
    samples = tuple(sample for chunk in chunks for sample in layout.samples(chunk))
    of_training = split == "train"
    pipeline = build_subset_pipeline(
        config, dataset, samples, task.batch, device, task.threads, of_training=of_training
    )
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for step, row in enumerate(_rows(config, network, pipeline, device)):
            if task.folder.stop.exists():
                return
            rows.append(row)
            if len(rows) == layout.steps or step + 1 == pipeline.steps_per_epoch:
                _write(part_file(task.folder, split, chunks[step // layout.steps]), rows)
                rows = []
    finally:
        pipeline.close()


@torch.inference_mode()
def _rows(
    config: Config, network: nn.Module, pipeline: Any, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Features, labels and sample numbers of each batch, on the host."""
    layout, side = memory_format(config, network), config.data.image_size
    network.to(memory_format=layout)
    pipeline.start(0)
    for batch in pipeline:
        images = batch.images
        if images.shape[-1] != side:  # arrays have a size of their own
            mode = config.data.interpolation
            images = F.interpolate(images, (side, side), mode=mode, align_corners=False, antialias=True)
        with autocast(config.train.precision, device):
            features = network(images.contiguous(memory_format=layout))
        count = batch.valid
        yield features[:count].float().cpu(), batch.targets[:count].cpu(), batch.indices[:count].cpu()


def _write(path: Path, rows: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    features, labels, samples = (torch.cat(column).numpy() for column in zip(*rows, strict=True))
    with replacing(path, features.nbytes, durable=False) as temporary:
        np.savez(temporary, features=features, labels=labels, samples=samples)
