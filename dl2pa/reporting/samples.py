"""Validation images to show: confident errors, confident correct predictions and the hardest classes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from dl2pa.config import Config
from dl2pa.training.data import build_transforms
from dl2pa.training.evaluate import Predictions
from pipelines.batch import Pipeline
from pipelines.build import Dataset, build_pipeline
from pipelines.datasets import FeatureDataset, ImageTable
from pipelines.encoded import FaultLimits
from pipelines.sampler import SubsetSampler

_THUMBNAIL = 112
"""Longest side, pixels."""
_ERRORS, _HITS, _CLASSES, _PER_CLASS = 24, 12, 12, 6


@dataclass(frozen=True)
class SampleSelection:
    """Indices into the predictions.

    Attributes:
        errors: most confident errors, preferably at most two per pair of classes.
        hits: most confident correct predictions, preferably one per class.
        by_class: for the classes with the lowest accuracy, lowest first: the most confident errors, then the least
            confident correct predictions.
    """

    errors: list[int]
    hits: list[int]
    by_class: dict[int, list[int]]

    @property
    def all(self) -> list[int]:
        """Every index once, ascending."""
        return sorted({*self.errors, *self.hits, *(i for one in self.by_class.values() for i in one)})


def select_samples(predictions: Predictions) -> SampleSelection:
    """Select from predictions; ties in confidence are broken by index."""
    targets_n, predicted_n = predictions.targets, predictions.predicted
    order = np.argsort(-predictions.final_confidence, kind="stable")
    wrong = order[targets_n[order] != predicted_n[order]]
    right = order[targets_n[order] == predicted_n[order]]
    pairs = list(zip(targets_n[wrong].tolist(), predicted_n[wrong].tolist(), strict=True))
    errors = diversify(wrong.tolist(), pairs, 2, _ERRORS)
    hits = diversify(right.tolist(), targets_n[right].tolist(), 1, _HITS)
    images = np.bincount(targets_n)
    accuracy = np.bincount(targets_n[right], minlength=len(images)) / np.maximum(1, images)
    accuracy[images == 0] = 2.0
    worst = [c for c in np.argsort(accuracy, kind="stable")[:_CLASSES].tolist() if images[c]]
    by_class: dict[int, list[int]] = {}
    for c in worst:
        missed, recognized = wrong[targets_n[wrong] == c].tolist(), right[targets_n[right] == c].tolist()
        by_class[c] = [*missed, *reversed(recognized)][:_PER_CLASS]
    return SampleSelection(errors, hits, by_class)


def diversify(samples: list[int], kinds: Sequence[object], most: int, limit: int) -> list[int]:
    """Take up to `limit` samples in order, at most `most` per kind; fill up with the skipped ones."""
    seen: dict[object, int] = {}
    first: list[int] = []
    rest: list[int] = []
    for sample, kind in zip(samples, kinds, strict=True):
        seen[kind] = seen.get(kind, 0) + 1
        (first if seen[kind] <= most else rest).append(sample)
        if len(first) == limit:
            break
    return [*first, *rest][:limit]


def make_thumbnails(config: Config, dataset: Dataset, samples: Sequence[int]) -> dict[int, bytes]:
    """Encode samples, as validation preprocesses them, as JPEG (PNG if small); returns images by sample.

    Feature vectors have no picture.
    """
    if not samples or isinstance(dataset, FeatureDataset):
        return {}
    transforms = build_transforms(config, train=False)
    pipeline = open_samples(config, dataset, samples, 16, torch.device("cpu"), 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (transforms.mean, transforms.std))
    thumbnails: dict[int, bytes] = {}
    try:
        pipeline.start(0)
        for batch in pipeline:
            images = batch.images[: batch.valid]
            pixels = ((images * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
            encoded = map(_encode, pixels.permute(0, 2, 3, 1).numpy())
            thumbnails |= zip(batch.indices.tolist(), encoded, strict=False)
    finally:
        pipeline.close()
    return thumbnails


def open_samples(
    config: Config, dataset: Dataset, samples: Sequence[int], batch: int, device: torch.device, threads: int
) -> Pipeline:
    """Pipeline of at least one sample, preprocessed as in validation; unreadable ones are left out."""
    transforms = build_transforms(config, train=False)
    loader = config.loader
    if isinstance(dataset, ImageTable):
        if loader == "resident":  # a data set in memory is resized to the crop size directly
            transforms = replace(transforms, eval_resize=config.data.image_size)
        loader = "torchvision"  # same crop; starting DALI for a few images is slow
    return build_pipeline(
        dataset,
        transforms,
        SubsetSampler(tuple(samples), min(batch, len(samples))),
        loader=loader,
        seed=config.train.seed,
        device=device,
        threads=threads,
        limits=FaultLimits(max_bad_fraction=1.0, max_bad_val_fraction=1.0),
    )


def _encode(image_hwc: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image_hwc))
    target = io.BytesIO()
    if max(picture.size) <= 64:
        factor = _THUMBNAIL // max(picture.size)
        enlarged = (picture.width * factor, picture.height * factor)
        picture.resize(enlarged, Image.Resampling.NEAREST).save(target, "PNG", optimize=True)
    else:
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        picture.save(target, "JPEG", quality=82)
    return target.getvalue()
