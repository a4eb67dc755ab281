"""One pipeline from a data set, a recipe and an order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dl2pa.errors import UserError
from pipelines.batch import Pipeline
from pipelines.datasets.arrays import ArrayDataset
from pipelines.datasets.table import ImageTable
from pipelines.encoded import FaultLimits, ImageReader
from pipelines.order import Order
from pipelines.recipe import Recipe


@dataclass(frozen=True)
class SyntheticDataset:
    """A data set of a given size without files."""

    num_samples: int
    classes: tuple[str, ...]
    fingerprint: str = "synthetic"


Dataset = ArrayDataset | ImageTable | SyntheticDataset


def num_samples(dataset: Dataset) -> int:
    """Images in the data set."""
    return dataset.num_samples if isinstance(dataset, SyntheticDataset) else len(dataset.labels)


def build_pipeline(
    dataset: Dataset,
    recipe: Recipe,
    order: Order,
    *,
    loader: str,
    seed: int,
    device: torch.device,
    threads: int,
    limits: FaultLimits | None = None,
) -> Pipeline:
    """Build the pipeline that `loader` names (dali, torchvision, resident, synthetic).

    Raises:
        UserError: the loader cannot read this data set, or what it needs is not installed.
    """
    if isinstance(dataset, SyntheticDataset):
        from pipelines.synthetic import SyntheticPipeline

        return SyntheticPipeline(len(dataset.classes), recipe.image_size, order, seed, device)
    if loader == "resident":
        from pipelines.resident import ResidentPipeline, decode_folder

        if isinstance(dataset, ImageTable):
            dataset = decode_folder(dataset, recipe.image_size, threads)
        return ResidentPipeline(dataset, recipe, order, seed, device)
    if isinstance(dataset, ArrayDataset):
        raise UserError("data.loader", loader, "reads image files, not arrays", "Set data.loader=resident.")
    return _build_files(dataset, recipe, order, loader, seed, device, threads, limits or FaultLimits())


def _build_files(
    dataset: ImageTable,
    recipe: Recipe,
    order: Order,
    loader: str,
    seed: int,
    device: torch.device,
    threads: int,
    limits: FaultLimits,
) -> Pipeline:
    from pipelines.files import Decoder, ImageFilePipeline

    decoder: Decoder
    if loader == "dali":
        from pipelines.decode_dali import DaliDecoder

        decoder = DaliDecoder(recipe, order.local_batch, threads, device)
    else:
        from pipelines.decode_pillow import PillowDecoder

        decoder = PillowDecoder(recipe.image_size, threads)
    reader = ImageReader(dataset, recipe, seed, limits)
    return ImageFilePipeline(reader, recipe, order, decoder, device, threads)
