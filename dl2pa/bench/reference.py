"""Plain PyTorch training loop, the baseline of `dl2pa bench train`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from dl2pa.backbones import build_embedder
from dl2pa.config import Config
from dl2pa.errors import UserError
from dl2pa.osutil import usable_cores
from dl2pa.specs import BACKBONES
from dl2pa.training.train_state import autocast
from pipelines.datasets.arrays import ArrayDataset

_WORKERS = 8


class ReferenceLoop:
    """torchvision network with linear classifier, NCHW, mixed precision with GradScaler, SGD, DataLoader with workers,
    PIL and torchvision transforms, and `loss.item()` after every step.

    CIFAR ResNets, which torchvision does not have, are those of dl2pa with a linear classifier.

    Args:
        dataset: images in memory, augmented one by one: pad-crop, flip.
        root: folder with train/, one folder per class: random resized crop, flip.
            If both are None, a single batch on the device is reused.
    """

    def __init__(
        self, config: Config, device: torch.device, dataset: ArrayDataset | None, root: Path | None
    ) -> None:
        self._device, self._precision = device, config.train.precision
        classes = 1000 if dataset is None else len(dataset.classes)
        self._network = _network(config.model.backbone, classes).to(device)
        self._optimizer = torch.optim.SGD(self._network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
        self._loader: Any = None
        if dataset is None and root is None:
            side = config.data.image_size
            images = torch.randn(config.train.batch_size, 3, side, side, device=device)
            self._batches: Iterator[Any] = itertools.repeat(
                (images, torch.arange(len(images), device=device) % classes)
            )
        else:
            source = _Arrays(dataset, config) if dataset is not None else _folder(root, config)
            self._loader = data_loader(source, config.train.batch_size, device)
            self._batches = itertools.chain.from_iterable(itertools.repeat(self._loader))

    def run(self, steps: int) -> None:
        """Train for `steps` steps."""
        self._network.train()
        for _ in range(steps):
            images, labels = next(self._batches)
            images = images.to(self._device, non_blocking=True)
            labels = labels.to(self._device, non_blocking=True)
            self._optimizer.zero_grad()
            with autocast(self._precision, self._device):
                loss = F.cross_entropy(self._network(images), labels)
            self._scaler.scale(loss).backward()
            self._scaler.step(self._optimizer)
            self._scaler.update()
            loss.item()

    def close(self) -> None:
        """Stop the workers."""
        self._batches = iter(())
        self._loader = None


def _network(backbone: str, classes: int) -> nn.Module:
    spec = BACKBONES[backbone]
    if spec.small:
        return build_embedder(backbone, classes)
    return resolve_name(spec.builder)(weights=None, num_classes=classes)


def data_loader(source: Dataset[Any], batch_size: int, device: torch.device) -> DataLoader[Any]:
    """Return a shuffling DataLoader with one persistent worker per core, at most eight.

    Raises:
        UserError: a batch is larger than the data set.
    """
    workers = min(_WORKERS, usable_cores())
    if len(source) < batch_size:  # pyright: ignore[reportArgumentType]
        raise UserError("--batch-size", batch_size, "is larger than the data set", "Use a smaller batch.")
    return DataLoader(
        source,
        batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        drop_last=True,
        persistent_workers=True,
    )


class _Arrays(Dataset[tuple[Tensor, int]]):
    """Images in memory converted to PIL, as in torchvision's CIFAR data sets."""

    def __init__(self, dataset: ArrayDataset, config: Config) -> None:
        from torchvision import transforms

        self._dataset = dataset
        self._transform: Any = transforms.Compose(
            [
                transforms.RandomCrop(config.data.image_size, padding=config.data.pad),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(config.data.mean, config.data.std),
            ]
        )

    def __len__(self) -> int:
        return len(self._dataset.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        image = Image.fromarray(self._dataset.images[index])
        return self._transform(image), int(self._dataset.labels[index])


def _folder(root: Path | None, config: Config) -> Dataset[Any]:
    from torchvision import datasets, transforms

    assert root is not None, "checked by the caller"
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(config.data.image_size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(config.data.mean, config.data.std),
        ]
    )
    return datasets.ImageFolder(str(root / "train"), transform)
