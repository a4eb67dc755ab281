"""Exact evaluation over all ranks: integers only, padding masked, every image once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from dl2pa.errors import TrainingFailure
from dl2pa.specs import MAX_LOGITS
from pipelines.batch import Batch, Pipeline
from pipelines.encoded import too_many
from pipelines.longtail import GROUPS, Group

log = logging.getLogger(__name__)

BINS = 15
"""Of equal width, of the calibration error."""
_ONE = 2**32

Scorer = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] to logits [B, C]."""


@dataclass(frozen=True)
class Predictions:
    """What the model said of each of N images, in the order of the set.

    Attributes:
        samples: int64 [N], places in the set; all of them, but for images left out as unreadable.
        targets, predicted: int64 [N].
        confidence: float64 [N], the softmax's share of the class predicted.
        in_top5: bool [N], whether the target is among the first min(5, C) guesses.
    """

    samples: NDArray[np.int64]
    targets: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    in_top5: NDArray[np.bool_]

    def save(self, path: Path) -> None:
        """Write an ``.npz`` of the five arrays, atomically.

        Raises:
            OSError: nothing was replaced.
        """
        aside = path.with_name(f".{path.name}.aside.npz")
        np.savez(
            aside,
            samples=self.samples.astype(np.int32),
            targets=self.targets.astype(np.int32),
            predicted=self.predicted.astype(np.int32),
            confidence=self.confidence,
            in_top5=self.in_top5,
        )
        aside.replace(path)

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            samples, targets, predicted = (
                stored[name].astype(np.int64) for name in ("samples", "targets", "predicted")
            )
            return cls(samples, targets, predicted, stored["confidence"], stored["in_top5"])


@dataclass(frozen=True)
class Evaluation:
    """Results over the whole set; accuracies and calibration error in per cent.

    Attributes:
        top1, top5: accuracy (top5 over min(5, C) guesses).
        ece: expected calibration error, 15 equal-width bins (Naeini et al., AAAI 2015).
        num_validated: images counted.
        num_missing: unreadable images left out, where data.max_bad_val_fraction allows it.
        class_correct, class_total: top-1 hits and images of each class.
        top1_by_group: ``top1_head``, ``top1_medium`` and ``top1_tail`` where the training data is long-tailed:
            the mean of the classes' accuracies, as the field reports it, so that on an uneven validation set
            every class weighs the same.
        predictions: image by image.
    """

    top1: float
    top5: float
    ece: float
    num_validated: int
    class_correct: list[int]
    class_total: list[int]
    top1_by_group: dict[str, float]
    predictions: Predictions = field(compare=False, repr=False)
    num_missing: int = 0

    def metrics(self) -> dict[str, float | int]:
        """What is reported by name: everything but the counts of each class."""
        overall = {"top1": self.top1, "top5": self.top5, "ece": self.ece}
        missing = {"num_missing": self.num_missing} if self.num_missing else {}
        return {**overall, "num_validated": self.num_validated, **missing, **self.top1_by_group}

    def record(self) -> dict[str, object]:
        """Everything but the predictions, as it is written to validation.json."""
        return {**self.metrics(), "class_correct": self.class_correct, "class_total": self.class_total}


def _judge(logits_bc: Tensor, batch: Batch) -> Tensor:
    """The images of one batch as rows (sample, target, predicted, confidence, in top 5), int64 [B, 5], on the
    device; padding has sample -1. Integers, so that no sum depends on its order."""
    logits = logits_bc.float()
    place = torch.arange(len(batch.targets), device=logits.device)
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    confidence = (logits.softmax(dim=1).amax(dim=1).double() * _ONE).round().long()
    in_top5 = (best == batch.targets[:, None]).any(dim=1).long()
    sample = torch.where(place < batch.valid, batch.indices, -1)
    return torch.stack([sample, batch.targets, best[:, 0], confidence, in_top5], dim=1)


def _gather(rows_n5: Tensor, missing: int, num_samples: int) -> tuple[NDArray[np.int64], int]:
    """The rows of all ranks in the order of the set, without padding, and how many images were left out; a collective.

    Args:
        missing: images that this rank left out.

    Raises:
        TrainingFailure: they are not the set's images, each once.
    """
    parts, left_out = [rows_n5], torch.tensor(missing, device=rows_n5.device)
    if dist.is_initialized():
        parts = [torch.empty_like(rows_n5) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows_n5)
        dist.all_reduce(left_out)
    rows = torch.cat(parts).cpu().numpy()
    rows = rows[rows[:, 0] >= 0]
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    seen, count = len(np.unique(rows[:, 0])), int(left_out)
    if not seen == len(rows) == num_samples - count:
        raise TrainingFailure(
            f"validated {seen} of {num_samples} images, {len(rows)} in all, {count} left out"
        )
    if not seen:
        raise TrainingFailure("validated no image: none could be read")
    return rows, count


def _evaluation(
    rows_n5: NDArray[np.int64], missing: int, num_classes: int, groups: Sequence[Group] | None
) -> Evaluation:
    count = len(rows_n5)
    samples, targets, predicted, confidence, in_top5 = rows_n5.T
    hits = targets == predicted
    bins = np.minimum(confidence * BINS // _ONE, BINS - 1)
    gap = 0
    for part in range(BINS):
        inside = bins == part
        gap += abs(int(hits[inside].sum()) * _ONE - int(confidence[inside].sum()))
    total = np.bincount(targets, minlength=num_classes).tolist()
    correct = np.bincount(targets[hits], minlength=num_classes).tolist()
    return Evaluation(
        top1=100.0 * int(hits.sum()) / count,
        top5=100.0 * int(in_top5.sum()) / count,
        ece=100.0 * gap / _ONE / count,
        num_validated=count,
        class_correct=correct,
        class_total=total,
        top1_by_group=_group_accuracies(correct, total, groups),
        predictions=Predictions(samples, targets, predicted, confidence / _ONE, in_top5.astype(bool)),
        num_missing=missing,
    )


def _group_accuracies(
    correct: list[int], total: list[int], groups: Sequence[Group] | None
) -> dict[str, float]:
    """Mean accuracy over the classes of each group that has validation images."""
    found: dict[str, float] = {}
    for group in GROUPS if groups is not None else ():
        counted = zip(correct, total, groups or (), strict=True)
        rates = [hits / images for hits, images, of in counted if of == group and images]
        if rates:
            found[f"top1_{group}"] = 100.0 * sum(rates) / len(rates)
    return found


@torch.inference_mode()
def evaluate(
    score: Scorer,
    pipeline: Pipeline,
    num_classes: int,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda step: None,
    groups: Sequence[Group] | None = None,
    max_logits: int = MAX_LOGITS,
) -> Evaluation | None:
    """Run the whole set through `score`; None where a stop was agreed on the way. A collective.

    Args:
        groups: head, medium or tail for each class, for their accuracies.
        max_logits: images times classes scored at a time.

    Raises:
        TrainingFailure: the images counted are not the images in the set.
        UserError: more unreadable images were left out than allowed.
    """
    rows: list[Tensor] = []
    left_out = 0
    pipeline.start(0)
    for step, batch in enumerate(pipeline):
        if should_stop():
            return None
        for part in batch.split(max(1, max_logits // num_classes)):
            rows.append(_judge(score(part.images), part))
        left_out += batch.missing
        progress(step + 1)
    found, missing = _gather(torch.cat(rows), left_out, pipeline.num_samples)
    if missing:
        if missing > pipeline.max_bad_images:
            raise too_many(
                False, missing, f"exceed the {pipeline.max_bad_images} allowed, over all processes"
            )
        log.warning("%d unreadable image(s) of %d were left out", missing, pipeline.num_samples)
    return _evaluation(found, missing, num_classes, groups)
