"""Data loaders compared by `dl2pa bench pipeline`; each yields equivalent training batches endlessly.

A batch contains random resized crops of 224 pixels, flipped with probability 0.5, normalized, float32, in host memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dl2pa.bench import OURS, PACKED, check_folder
from dl2pa.bench.reference import data_loader
from dl2pa.config import parse_config
from dl2pa.errors import UserError
from dl2pa.osutil import usable_cores
from dl2pa.specs import IMAGE_FOLDER
from dl2pa.training.data import build_transforms, open_split
from pipelines.batch import Pipeline
from pipelines.build import build_pipeline
from pipelines.dataset import SyntheticDataset
from pipelines.datasets.folder import index_folder
from pipelines.datasets.index import INDEX_NAME
from pipelines.datasets.table import ImageTable
from pipelines.images import open_image
from pipelines.sampler import TrainSampler
from pipelines.transforms import Transforms

_EPOCH = 20_000
"""Minimum images per epoch; a few images are repeated."""
_AHEAD = 2
_SEED = 0


@dataclass(frozen=True)
class Source:
    """Location of the images, and batch size."""

    root: Path
    batch_size: int


@dataclass(frozen=True)
class Loader:
    """Endless batches, and the number of distinct images."""

    batches: Iterator[Any]
    images: int
    close: Callable[[], None]


@dataclass(frozen=True)
class RepeatedSampler(TrainSampler):
    """Training sampler that repeats `distinct` images within an epoch."""

    distinct: int = 1

    def indices(self, epoch: int, step: int) -> NDArray[np.int64]:
        return super().indices(epoch, step) % self.distinct


def open_loader(name: str, source: Source) -> Loader:
    """Open one of ``LOADERS`` or ``PACKED`` with all cores available to this process.

    Raises:
        UserError: the source has no images, or the loader cannot read its format.
    """
    threads = usable_cores()
    torch.set_num_threads(threads)
    transforms = build_transforms(parse_config({"data": {"crop": "random_resized", "image_size": 224}}), True)
    if name == "synthetic":
        classes = tuple(str(c) for c in range(1000))
        return _of_pipeline(SyntheticDataset(_EPOCH, classes), _EPOCH, transforms, source, threads)
    table = open_images(source.root)
    if name in (OURS, PACKED):
        return _of_pipeline(table, len(table.labels), transforms, source, threads)
    if table.members is not None:
        remedy = "Use --loaders ours, or give a folder of images."
        raise UserError("--data", str(source.root), f"contains shards, which {name} cannot read", remedy)
    paths = [str(table.path(i)) for i in range(len(table.labels))]
    labels = table.labels.tolist()
    if name == "native-dali":
        batches = _native_dali(paths, labels, transforms, source.batch_size, threads)
    else:
        repeats = -(-_EPOCH // len(paths))
        dataset = _ImageFiles(paths * repeats, labels * repeats, transforms)
        loader = data_loader(dataset, source.batch_size, torch.device("cpu"))
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
    return Loader(batches, len(paths), lambda: None)  # ended by the end of the process


def open_images(root: Path) -> ImageTable:
    """Index class folders, or the training split of a folder with train/ or an index.

    Raises:
        UserError: the folder does not exist or has no images.
    """
    check_folder(root)
    if not (root / "train").is_dir() and not (root / INDEX_NAME).exists():
        return index_folder(root, None, "--data")
    # val_root, because the folder may have an index of a single, unnamed split.
    roots = {"root": str(root), "val_root": str(root)}
    config = parse_config({"data": {"dataset": IMAGE_FOLDER, **roots, "loader": "dali"}})
    dataset = open_split(config, "train")
    assert isinstance(dataset, ImageTable), "an image folder has an image table"
    return dataset


def _of_pipeline(
    dataset: ImageTable | SyntheticDataset, count: int, transforms: Transforms, source: Source, threads: int
) -> Loader:
    epoch_size = count * -(-max(_EPOCH, source.batch_size) // count)
    pipeline = build_pipeline(
        dataset,
        transforms,
        RepeatedSampler(epoch_size, source.batch_size, _SEED, distinct=count),
        loader="dali",
        seed=_SEED,
        device=torch.device("cpu"),
        threads=threads,
    )
    return Loader(iterate_epochs(pipeline), count, pipeline.close)


def iterate_epochs(pipeline: Pipeline) -> Iterator[Any]:
    """Yield the batches of epoch after epoch."""
    for epoch in itertools.count():
        pipeline.start(epoch)
        yield from pipeline


def _native_dali(
    paths: list[str], labels: list[int], transforms: Transforms, batch_size: int, threads: int
) -> Iterator[Tensor]:
    """Yield batches of a DALI pipeline as in DALI's examples, with the decoder and filter settings of loader `ours`."""
    from nvidia import dali

    fn: Any = dali.fn
    types: Any = dali.types
    pipeline_def: Any = dali.pipeline_def
    side = transforms.image_size

    @pipeline_def(
        batch_size=batch_size, num_threads=threads, device_id=None, prefetch_queue_depth=_AHEAD, seed=_SEED
    )
    def graph() -> Any:
        data, label = fn.readers.file(files=paths, labels=labels, random_shuffle=True)
        images = fn.decoders.image_random_crop(
            data,
            device="cpu",
            output_type=types.RGB,
            random_area=list(transforms.crop_scale),
            random_aspect_ratio=list(transforms.crop_ratio),
            jpeg_fancy_upsampling=True,
            adjust_orientation=False,
        )
        images = fn.resize(images, size=[side, side], interp_type=types.INTERP_TRIANGULAR, antialias=True)
        images = fn.crop_mirror_normalize(
            images,
            mirror=fn.random.coin_flip(probability=transforms.flip),
            mean=[255 * m for m in transforms.mean],
            std=[255 * s for s in transforms.std],
            dtype=types.FLOAT,
            output_layout="HWC",
        )
        return images, label

    pipe: Any = graph()
    pipe.build()
    while True:
        images, _ = pipe.run()
        yield torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)


class _ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files decoded by PIL and transformed by torchvision.transforms.v2."""

    def __init__(self, paths: list[str], labels: list[int], transforms: Transforms) -> None:
        from torchvision.transforms import v2

        self._paths, self._labels = paths, labels
        self._transform: Any = v2.Compose(
            [
                v2.PILToTensor(),
                v2.RandomResizedCrop(
                    transforms.image_size,
                    scale=transforms.crop_scale,
                    ratio=transforms.crop_ratio,
                    antialias=True,
                ),
                v2.RandomHorizontalFlip(transforms.flip),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(transforms.mean), list(transforms.std)),
            ]
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with open_image(Path(self._paths[index]).read_bytes()) as image:
            pixels = image.convert("RGB")
        return self._transform(pixels), self._labels[index]
