"""One pipeline from a data set, a recipe and an order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dl2pa.errors import UserError
from pipelines.batch import Pipeline
from pipelines.datasets.arrays import ArrayDataset
from pipelines.datasets.folder import FolderDataset
from pipelines.order import EvalOrder, TrainOrder
from pipelines.recipe import Recipe


@dataclass(frozen=True)
class SyntheticDataset:
    """A data set of a given size without files."""

    num_samples: int
    classes: tuple[str, ...]
    fingerprint: str = "synthetic"


Dataset = ArrayDataset | FolderDataset | SyntheticDataset


def num_samples(dataset: Dataset) -> int:
    """Images in the data set."""
    return dataset.num_samples if isinstance(dataset, SyntheticDataset) else len(dataset.labels)


def build_pipeline(
    dataset: Dataset,
    recipe: Recipe,
    order: TrainOrder | EvalOrder,
    *,
    loader: str,
    seed: int,
    device: torch.device,
    threads: int,
    max_bad_fraction: float,
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

        if isinstance(dataset, FolderDataset):
            dataset = decode_folder(dataset, recipe.image_size, threads)
        return ResidentPipeline(dataset, recipe, order, seed, device)
    if isinstance(dataset, ArrayDataset):
        raise UserError("data.loader", loader, "reads image files, not arrays", "Set data.loader=resident.")
    return _build_files(dataset, recipe, order, loader, seed, device, threads, max_bad_fraction)


def _build_files(
    dataset: FolderDataset,
    recipe: Recipe,
    order: TrainOrder | EvalOrder,
    loader: str,
    seed: int,
    device: torch.device,
    threads: int,
    max_bad_fraction: float,
) -> Pipeline:
    from pipelines.encoded import ImageReader
    from pipelines.files import Decoder, ImageFilePipeline

    decoder: Decoder
    if loader == "dali":
        from pipelines.decode_dali import DaliDecoder

        decoder = DaliDecoder(recipe.image_size, order.local_batch, threads, device)
    else:
        from pipelines.decode_pillow import PillowDecoder

        decoder = PillowDecoder(recipe.image_size, threads)
    reader = ImageReader(dataset, recipe, seed, max_bad_fraction)
    return ImageFilePipeline(reader, recipe, order, decoder, device, threads)
