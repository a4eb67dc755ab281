"""Out-of-distribution detection by the embedding and by the layer before it, the features of the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dl2pa.config import Config
from dl2pa.errors import UserError
from dl2pa.evaluation.detection import Scores, detect
from dl2pa.evaluation.sizes import check_image_size
from dl2pa.model.inference import Classifier
from dl2pa.specs import MAX_LOGITS
from dl2pa.training.data import build_eval_pipeline, build_subset_pipeline
from dl2pa.training.distributed import World
from dl2pa.training.train_state import autocast
from pipelines.batch import Pipeline
from pipelines.dataset import Dataset, num_samples
from pipelines.encoded import too_many

NEIGHBORS = 50
"""The k-NN score is the distance to the 50th nearest training image, as in Sun et al. (ICML 2022) for CIFAR-10."""
MAX_REFERENCE = 50_000
"""Maximum number of training images among which neighbors are searched; see `reference_samples`."""
_BLOCK = 512


@dataclass(frozen=True, eq=False)
class Layers:
    """Activations for N images, float32, in the data set's order.

    Attributes:
        embedding: embeddings [N, d], not normalized; of a head with a LayerNorm of the features, after it.
        backbone: features of the backbone [N, p], the input of the projection head; [N, 0] if they were not computed.
        labels: int64 [N].
        samples: int64 [N], numbers of the images in the data set.
        missing, allowed: number of unreadable images, which are left out, and how many may be.
    """

    embedding: Tensor
    backbone: Tensor
    labels: Tensor
    samples: Tensor
    missing: int
    allowed: int

    @property
    def unit(self) -> Tensor:
        """Unit embeddings [N, d]."""
        return F.normalize(self.embedding, dim=1)

    def to(self, device: torch.device) -> Layers:
        """The same on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})

    def save(self, path: Path) -> None:
        """Write the arrays to an ``.npz`` file."""
        arrays: dict[str, Any] = {name: getattr(self, name).cpu().numpy() for name in _TENSORS}
        with path.open("wb") as file:
            np.savez(file, **arrays, counts=np.array([self.missing, self.allowed]))

    @classmethod
    def load(cls, path: Path) -> Layers:
        """Read a file written by ``save``."""
        with np.load(path, allow_pickle=False) as stored:
            tensors = {name: torch.from_numpy(stored[name]) for name in _TENSORS}
            missing, allowed = stored["counts"].tolist()
        return cls(**tensors, missing=missing, allowed=allowed)


_TENSORS = ("embedding", "backbone", "labels", "samples")


def join_layers(parts: Sequence[Layers], root: str, *, of_training: bool = False) -> Layers:
    """Join the shares of all processes, in the data set's order.

    Args:
        root: folder of the images, for messages.
        of_training: the images are training images.

    Raises:
        UserError: no image could be read, or more are unreadable than allowed.
    """
    missing, allowed = sum(part.missing for part in parts), parts[0].allowed
    if missing > allowed:
        raise too_many(of_training, missing, f"exceed the {allowed} allowed")
    readable = [part for part in parts if len(part.labels)]
    if not readable:
        raise UserError("data", root, "contains no image that can be read", "Check the files.")
    order = torch.cat([part.samples for part in readable]).argsort()
    tensors = {name: torch.cat([getattr(part, name) for part in readable])[order] for name in _TENSORS}
    return Layers(**tensors, missing=missing, allowed=allowed)


def reference_samples(count: int, limit: int = MAX_REFERENCE) -> NDArray[np.int64]:
    """Choose training images: all of them, or `limit` of them at equal distances in the data set's order.

    In the order of an image folder, which is sorted by class, every class keeps its share.
    """
    kept = min(count, limit)
    return np.arange(kept, dtype=np.int64) * count // max(1, kept)


def compute_layers(
    config: Config,
    classifier: Classifier,
    dataset: Dataset,
    world: World,
    samples: NDArray[np.int64] | None = None,
    with_backbone: bool = True,
    *,
    of_training: bool = False,
) -> Layers:
    """Compute both layers, or only the embedding, for every image or for `samples`.

    Unreadable images are left out if allowed. With several processes, each computes its share of the batches and
    ``join_layers`` joins them.

    Args:
        of_training: the images are training images, and have their limit of unreadable ones.

    Raises:
        UserError: no image could be read, more are unreadable than allowed, or the network does not accept their size.
    """
    check_image_size(config, classifier)
    everything = samples is None or len(samples) == num_samples(dataset)
    if everything and world.size == 1:
        pipeline = build_eval_pipeline(config, dataset, world, of_training=of_training)
    else:
        batch = config.train.eval_batch_size or config.train.batch_size
        chosen = np.arange(num_samples(dataset)) if samples is None else samples
        share = tuple(share_of_batches(chosen, batch, world.rank, world.size).tolist())
        if not share:
            return _no_layers(classifier)
        pipeline = build_subset_pipeline(
            config, dataset, share, batch, world.device, world.threads, of_training=of_training
        )
    try:
        with autocast(config.train.precision, world.device):
            result = _forward(classifier, pipeline, with_backbone)
    finally:
        pipeline.close()
    if world.size > 1:
        return result
    return join_layers([result], str(getattr(dataset, "root", "data")), of_training=of_training)


def _no_layers(classifier: Classifier) -> Layers:
    empty, numbers = torch.empty(0, classifier.head.vectors.shape[1]), torch.empty(0, dtype=torch.int64)
    return Layers(empty, torch.empty(0, 0), numbers, numbers, 0, 0)


def share_of_batches(samples: NDArray[np.int64], batch: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """The samples of every `world_size`-th batch from that of the rank on; batches are those of one process."""
    starts = range(rank * batch, len(samples), world_size * batch)
    return np.concatenate([samples[:0], *(samples[start : start + batch] for start in starts)])


@torch.inference_mode()
def _forward(classifier: Classifier, pipeline: Pipeline, with_backbone: bool) -> Layers:
    """Layers of the readable images of a pipeline, in its order."""
    head, device = classifier.head, classifier.device
    dim = head.vectors.shape[1]
    embedding, backbone = [torch.empty(0, dim, device=device)], list[Tensor]()
    numbers = [torch.empty(0, 2, dtype=torch.int64, device=device)]
    missing = 0
    pipeline.start(0)
    for batch in pipeline:
        missing += batch.missing
        if not batch.valid:
            continue
        features = classifier.embedder.backbone(batch.images)
        embedding.append(head.layer_norm(classifier.embedder.head(features)[: batch.valid]))
        if with_backbone:
            backbone.append(features[: batch.valid].float())
        numbers.append(torch.stack([batch.targets, batch.indices], dim=1)[: batch.valid].clone())
    labels, samples = torch.cat(numbers).unbind(dim=1)
    first = torch.cat(backbone) if backbone else torch.empty(len(labels), 0, device=device)
    return Layers(torch.cat(embedding), first, labels, samples, missing, pipeline.max_bad_images)


class Detector:
    """Scores that are high for in-distribution images.

    Args:
        reference: layers of training images.
    """

    def __init__(self, classifier: Classifier, reference: Layers) -> None:
        self._head = classifier.head._replace(feature_norm=None)  # part of `Layers.embedding`
        self._embedding = F.normalize(reference.embedding, dim=1)
        self._backbone = F.normalize(reference.backbone, dim=1)
        self._means = _class_means(self._backbone, reference.labels)

    @torch.inference_mode()
    def score(self, layers: Layers) -> dict[str, Scores]:
        """Scores [N] by layer and rule.

        ``embedding_cosine``: largest cosine to a class vector; ``embedding_logit``, the largest logit, for a head that
        does not normalize embeddings. ``embedding_energy``: log-sum-exp of the logits (Liu et al., NeurIPS 2020).
        ``backbone_class_mean``: largest cosine to the mean direction of a training class. ``…_knn``: cosine of the
        50th nearest training image, a decreasing function of its distance.
        """
        largest, energy = self._score_embedding(layers.embedding)
        backbone = F.normalize(layers.backbone, dim=1)
        means = torch.cat([(rows @ self._means.T).amax(dim=1) for rows in backbone.split(_BLOCK)])
        scores = {
            "embedding_cosine" if self._head.normalize else "embedding_logit": largest,
            "embedding_energy": energy,
            "embedding_knn": _nearest(F.normalize(layers.embedding, dim=1), self._embedding),
            "backbone_class_mean": means,
            "backbone_knn": _nearest(backbone, self._backbone),
        }
        return {name: value.double().cpu().numpy() for name, value in scores.items()}

    def _score_embedding(self, embedding_nd: Tensor) -> tuple[Tensor, Tensor]:
        """Largest cosine or logit, and energy, both [N]."""
        head, largest, energy = self._head, list[Tensor](), list[Tensor]()
        vectors = F.normalize(head.vectors.float(), dim=1)
        for rows in embedding_nd.split(max(1, MAX_LOGITS // len(vectors))):
            logits = head.logits(rows)
            energy.append(logits.double().logsumexp(dim=1))
            cosines = head.embed(rows) @ vectors.T if head.normalize else logits
            largest.append(cosines.amax(dim=1))
        return torch.cat(largest), torch.cat(energy)


def compare_scores(inside: dict[str, Scores], outside: dict[str, Scores]) -> dict[str, float]:
    """AUROC and FPR at 95 % TPR, in percent, of each score."""
    return {
        f"{name}_{key}": value
        for name in inside
        for key, value in detect(inside[name], outside[name]).metrics().items()
    }


def _class_means(unit_nd: Tensor, labels_n: Tensor) -> Tensor:
    """Unit mean directions of the classes with images."""
    classes, position = labels_n.unique(return_inverse=True)
    sums = unit_nd.new_zeros(len(classes), unit_nd.shape[1]).index_add_(0, position, unit_nd)
    return F.normalize(sums, dim=1)


def _nearest(unit_nd: Tensor, reference_md: Tensor) -> Tensor:
    """Cosine of the 50th nearest reference vector, or of the last one if there are fewer."""
    k = min(NEIGHBORS, len(reference_md))
    return torch.cat([(rows @ reference_md.T).topk(k, dim=1).values[:, -1] for rows in unit_nd.split(_BLOCK)])
