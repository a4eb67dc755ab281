"""The loaders that `dl2pa bench pipeline` compares: each gives the same kind of training batch without end.

A batch is random resized crops of 224 pixels, mirrored half the time, normalized, float32, in memory of the host.
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

from dl2pa.bench.reference import data_loader
from dl2pa.config import parse_config
from dl2pa.errors import UserError
from dl2pa.osutil import usable_cores
from dl2pa.specs import IMAGE_FOLDER
from dl2pa.training.data import build_transforms, open_split
from pipelines.batch import Pipeline
from pipelines.build import SyntheticDataset, build_pipeline
from pipelines.datasets.folder import index_folder
from pipelines.datasets.index import INDEX_NAME
from pipelines.datasets.table import ImageTable
from pipelines.images import open_image
from pipelines.sampler import TrainSampler
from pipelines.transforms import Transforms

LOADERS = ("ours", "native-dali", "torchvision", "synthetic")
PACKED = "packed"
"""Ours as well, over shards of the same images as `dl2pa data pack --short-side 256` writes them."""
NEEDS_DALI = ("ours", PACKED, "native-dali")

_EPOCH = 20_000
"""Images of an epoch at least: a few photographs are shown over and over."""
_AHEAD = 2
_SEED = 0


@dataclass(frozen=True)
class Source:
    """Where the images are, and how many make a batch."""

    root: Path
    batch_size: int


@dataclass(frozen=True)
class Loader:
    """Batches without end; how many different images they are of."""

    batches: Iterator[Any]
    images: int
    close: Callable[[], None]


@dataclass(frozen=True)
class RepeatedSampler(TrainSampler):
    """A training order over `distinct` images, each shown several times an epoch."""

    distinct: int = 1

    def indices(self, epoch: int, step: int) -> NDArray[np.int64]:
        return super().indices(epoch, step) % self.distinct


def open_loader(name: str, source: Source) -> Loader:
    """One of ``LOADERS``, or ``PACKED``, on the cores that this process may use.

    Raises:
        UserError: no images there, or a form that this loader cannot read.
    """
    threads = usable_cores()
    torch.set_num_threads(threads)
    transforms = build_transforms(parse_config({"data": {"crop": "random_resized", "image_size": 224}}), True)
    if name == "synthetic":
        classes = tuple(str(c) for c in range(1000))
        return _of_pipeline(SyntheticDataset(_EPOCH, classes), _EPOCH, transforms, source, threads)
    table = open_images(source.root)
    if name in ("ours", PACKED):
        return _of_pipeline(table, len(table.labels), transforms, source, threads)
    if table.members is not None:
        remedy = "Use --loaders ours, or give a folder of images."
        raise UserError("--data", str(source.root), f"holds shards, which {name} does not read", remedy)
    paths = [str(table.path(i)) for i in range(len(table.labels))]
    labels = table.labels.tolist()
    if name == "native-dali":
        return Loader(
            _native_dali(paths, labels, transforms, source.batch_size, threads), len(paths), _nothing
        )
    repeats = -(-_EPOCH // len(paths))
    loader = data_loader(
        _Photographs(paths * repeats, labels * repeats, transforms), source.batch_size, torch.device("cpu")
    )
    return Loader(itertools.chain.from_iterable(itertools.repeat(loader)), len(paths), _nothing)


def open_images(root: Path) -> ImageTable:
    """Class folders, the training half of a folder with train/, or of what an index describes.

    Raises:
        UserError: no images there.
    """
    if not root.is_dir():
        raise UserError("--data", str(root), "is no folder", "Give a folder of images, one folder a class.")
    if not (root / "train").is_dir() and not (root / INDEX_NAME).exists():
        return index_folder(root, None, "--data")
    # With a place for validation, an index of one half, without a name, will do.
    places = {"root": str(root), "val_root": str(root)}
    config = parse_config({"data": {"dataset": IMAGE_FOLDER, **places, "loader": "dali"}})
    dataset = open_split(config, "train")
    assert isinstance(dataset, ImageTable), "of an image folder"
    return dataset


def _of_pipeline(
    dataset: ImageTable | SyntheticDataset, count: int, transforms: Transforms, source: Source, threads: int
) -> Loader:
    shown = count * -(-max(_EPOCH, source.batch_size) // count)
    pipeline = build_pipeline(
        dataset,
        transforms,
        RepeatedSampler(shown, source.batch_size, _SEED, distinct=count),
        loader="dali",
        seed=_SEED,
        device=torch.device("cpu"),
        threads=threads,
    )
    return Loader(endless(pipeline), count, pipeline.close)


def endless(pipeline: Pipeline) -> Iterator[Any]:
    """Its batches, epoch after epoch."""
    for epoch in itertools.count():
        pipeline.start(epoch)
        yield from pipeline


def _nothing() -> None:
    """The end of the process ends it."""


def _native_dali(
    paths: list[str], labels: list[int], transforms: Transforms, batch_size: int, threads: int
) -> Iterator[Tensor]:
    """DALI as its own examples use it, with our decoder's and filter's settings: nothing of Python in the loop."""
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


class _Photographs(Dataset[tuple[Tensor, int]]):
    """Files through PIL, then torchvision's transforms (v2) on tensors."""

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
