"""Build a pipeline from a data set, transforms and a sampler."""

from __future__ import annotations

import torch

from dl2pa.errors import UserError
from pipelines.batch import Pipeline
from pipelines.dataset import Dataset, SyntheticDataset
from pipelines.datasets.arrays import ArrayDataset
from pipelines.datasets.features import FeatureDataset
from pipelines.datasets.table import ImageTable
from pipelines.encoded import FaultLimits, ImageReader
from pipelines.hints import DecoderHints
from pipelines.sampler import Sampler
from pipelines.transforms import Transforms


def build_pipeline(
    dataset: Dataset,
    transforms: Transforms,
    sampler: Sampler,
    *,
    loader: str,
    seed: int,
    device: torch.device,
    threads: int,
    limits: FaultLimits | None = None,
    hints: DecoderHints | None = None,
) -> Pipeline:
    """Build the pipeline of a loader: dali, torchvision, resident or synthetic.

    Raises:
        UserError: the loader cannot read this data set, or needs a package that is not installed.
    """
    if isinstance(dataset, SyntheticDataset):
        from pipelines.synthetic import SyntheticPipeline

        return SyntheticPipeline(len(dataset.classes), transforms.image_size, sampler, seed, device)
    if isinstance(dataset, FeatureDataset):
        from pipelines.features import FeaturePipeline

        return FeaturePipeline(dataset, sampler, device)
    if loader == "resident":
        from pipelines.decoded import decode_folder
        from pipelines.resident import ResidentPipeline

        if isinstance(dataset, ImageTable):
            dataset = decode_folder(dataset, transforms.image_size, threads, transforms.interpolation)
        return ResidentPipeline(dataset, transforms, sampler, seed, device)
    if isinstance(dataset, ArrayDataset):
        raise UserError(
            "data.loader",
            loader,
            "cannot read an array data set",
            "Set data.loader=resident.",
        )
    limits, hints = limits or FaultLimits(), hints or DecoderHints()
    return _build_files(dataset, transforms, sampler, loader, seed, device, threads, limits, hints)


def _build_files(
    dataset: ImageTable,
    transforms: Transforms,
    sampler: Sampler,
    loader: str,
    seed: int,
    device: torch.device,
    threads: int,
    limits: FaultLimits,
    hints: DecoderHints,
) -> Pipeline:
    from pipelines.files import Decoder, ImageFilePipeline

    decoder: Decoder
    if loader == "dali":
        from pipelines.decode_dali import DaliDecoder

        decoder = DaliDecoder(transforms, sampler.local_batch, threads, device, hints)
    else:
        from pipelines.decode_pillow import PillowDecoder

        decoder = PillowDecoder(transforms.image_size, threads, transforms.interpolation)
    reader = ImageReader(dataset, transforms, seed, limits)
    return ImageFilePipeline(reader, transforms, sampler, decoder, device, threads)
