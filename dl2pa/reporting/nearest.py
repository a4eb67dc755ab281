"""Page of nearest images: validation images, each with its nearest images in the embedding."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dl2pa.config import Config
from dl2pa.model.inference import BATCH, Classifier, load_classifier
from dl2pa.osutil import usable_cores
from dl2pa.reporting.pages import Links
from dl2pa.reporting.render import render
from dl2pa.reporting.samples import diversify, open_samples
from dl2pa.training.distributed import choose_device
from dl2pa.training.evaluate import Predictions
from pipelines.build import Dataset
from pipelines.datasets import FeatureDataset
from pipelines.sampler import permute

_MAX_IMAGES, _MAX_SECONDS = 2000, 60.0
"""Maximum number of embedded validation images, and seconds after which no further batch is started."""
_QUERIES, _NEIGHBORS = 12, 6
"""Number of wrong and of correct predictions that are shown, and of nearest images for each."""

Positions = NDArray[np.int64]
"""Indices into the predictions."""


@dataclass(frozen=True, eq=False)
class NearestImages:
    """The K nearest images of Q images among M embedded ones, by cosine.

    Attributes:
        count: M.
        queries: [Q], wrong predictions first.
        neighbors: [Q, K], nearest first, without the image itself.
        cosines: [Q, K].
        same_class: number of the M images whose nearest image has their class.
    """

    count: int
    queries: Positions
    neighbors: Positions
    cosines: NDArray[np.float32]
    same_class: int

    @property
    def shown(self) -> list[int]:
        """Every shown image once, ascending."""
        return sorted({*self.queries.tolist(), *self.neighbors.flatten().tolist()})


def find_nearest(
    config: Config, model: Path, dataset: Dataset, predictions: Predictions
) -> NearestImages | None:
    """Embed validation images in a fixed random order within limits of number and time, and find nearest ones.

    Returns:
        None for feature vectors, which have no picture, and with fewer than two images.
    """
    if isinstance(dataset, FeatureDataset) or len(predictions.samples) < 2:
        return None
    total = len(predictions.samples)
    drawn = permute(np.arange(min(total, _MAX_IMAGES), dtype=np.int64), total, 0)
    classifier = load_classifier(model).to(choose_device(config.launch.device, 0))
    unit_md, positions = _embed(config, classifier, dataset, predictions, drawn)
    if len(positions) < 2:
        return None
    order = np.argsort(positions)
    return nearest_of(unit_md[torch.from_numpy(order).to(unit_md.device)], positions[order], predictions)


@torch.inference_mode()
def _embed(
    config: Config, classifier: Classifier, dataset: Dataset, predictions: Predictions, drawn: Positions
) -> tuple[Tensor, Positions]:
    """Unit embeddings [M, d] of the drawn images that are readable and in time, and their positions [M]."""
    device, threads = classifier.device, min(8, usable_cores())
    pipeline = open_samples(config, dataset, predictions.samples[drawn].tolist(), BATCH, device, threads)
    position = dict(zip(predictions.samples[drawn].tolist(), drawn.tolist(), strict=True))
    vectors: list[Tensor] = []
    positions: list[int] = []
    ends = time.monotonic() + _MAX_SECONDS
    try:
        pipeline.start(0)
        for batch in pipeline:
            vectors.append(classifier.unit_vectors(batch.images)[: batch.valid].float())
            positions += [position[i] for i in batch.indices[: batch.valid].tolist()]
            if time.monotonic() > ends:
                break
    finally:
        pipeline.close()
    return torch.cat(vectors), np.array(positions, dtype=np.int64)


def nearest_of(unit_md: Tensor, positions: Positions, predictions: Predictions) -> NearestImages:
    """Choose images and find their nearest ones.

    Args:
        unit_md: unit embeddings [M, d], M at least 2.
        positions: of the embedded images in the predictions, [M].
    """
    cosines_mm = (unit_md @ unit_md.T).fill_diagonal_(-2.0)
    targets_m = predictions.targets[positions]
    first = cosines_mm.argmax(dim=1).cpu().numpy()
    queries = _choose(positions, predictions)
    rows = torch.from_numpy(np.searchsorted(positions, queries)).to(unit_md.device)
    k = min(_NEIGHBORS, len(positions) - 1)
    cosines, indices = (part.cpu().numpy() for part in cosines_mm[rows].topk(k, dim=1))
    same = int((targets_m[first] == targets_m).sum())
    return NearestImages(len(positions), queries, positions[indices], cosines, same)


def _choose(positions: Positions, predictions: Predictions) -> Positions:
    """The most confident errors, preferably two per pair of classes, and correct predictions of various classes."""
    targets, predicted = predictions.targets[positions], predictions.predicted[positions]
    order = np.argsort(-predictions.final_confidence[positions], kind="stable")
    wrong = order[targets[order] != predicted[order]]
    right = order[targets[order] == predicted[order]]
    pairs = list(zip(targets[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    errors = diversify(wrong.tolist(), pairs, 2, _QUERIES)
    hits = diversify(right.tolist(), targets[right].tolist(), 1, _QUERIES)
    return positions[np.array([*errors, *hits], dtype=np.int64)]


def nearest_page(
    nearest: NearestImages,
    predictions: Predictions,
    names: Sequence[str],
    thumbnails: Mapping[int, bytes],
    title: str,
    links: Links,
) -> str:
    """Render the page.

    Args:
        thumbnails: JPEG or PNG by position; rows and images without one are left out.
    """
    rows = [
        _row(query, neighbors, predictions, names, thumbnails)
        for query, *neighbors in zip(
            nearest.queries.tolist(), nearest.neighbors.tolist(), nearest.cosines.tolist(), strict=True
        )
        if query in thumbnails
    ]
    total = len(predictions.samples)
    share = f"{nearest.same_class:,} of {nearest.count:,} images ({100 * nearest.same_class / nearest.count:.1f} %)"
    return render(
        "nearest.html",
        title=title,
        links=links,
        among=f"all {total:,}" if nearest.count == total else f"{nearest.count:,} of {total:,}",
        share=share,
        kind="raw" if predictions.calibrated is None else "calibrated",
        sections=[
            ("Wrong predictions, most confident first", [row for row in rows if not row["correct"]]),
            ("Correct predictions", [row for row in rows if row["correct"]]),
        ],
    )


def _row(
    query: int,
    neighbors: Sequence[Sequence[Any]],
    predictions: Predictions,
    names: Sequence[str],
    thumbnails: Mapping[int, bytes],
) -> dict[str, Any]:
    """One image with its nearest ones."""
    true, predicted = int(predictions.targets[query]), int(predictions.predicted[query])
    near = [
        {
            "name": names[int(predictions.targets[i])],
            "same": int(predictions.targets[i]) == true,
            "cosine": f"{cosine:.2f}",
            "image": thumbnails[i],
        }
        for i, cosine in zip(*neighbors, strict=True)
        if i in thumbnails
    ]
    return {
        "true": names[true],
        "predicted": names[predicted],
        "correct": true == predicted,
        "confidence": f"{100 * predictions.final_confidence[query]:.0f}",
        "image": thumbnails[query],
        "near": near,
        "same": len([one for one in near if one["same"]]),
    }
