"""Exact evaluation over all ranks: integer sums, padding masked, every image counted once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from dl2pa.errors import TrainingFailure
from dl2pa.osutil import replacing
from dl2pa.specs import MAX_LOGITS
from pipelines.batch import Batch, Pipeline
from pipelines.encoded import too_many
from pipelines.longtail import GROUPS, Group

log = logging.getLogger(__name__)

BINS = 15
"""Number of equal-width bins of the calibration error."""
_ONE = 2**32
"""Fixed-point scale of confidences and likelihoods."""
_MAX_NLL = 2**30

Scorer = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] to logits [B, C]."""


@dataclass(frozen=True)
class Predictions:
    """Predictions for N validation images, in the data set's order.

    Attributes:
        samples: int64 [N], indices in the data set; unreadable images are missing.
        targets, predicted: int64 [N], class indices.
        confidence: float64 [N], softmax probability of the predicted class.
        in_top5: bool [N], whether the target is among the first min(5, C) predictions.
        calibrated: float64 [N], confidence after calibration; None without a temperature.
    """

    samples: NDArray[np.int64]
    targets: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    in_top5: NDArray[np.bool_]
    calibrated: NDArray[np.float64] | None = None

    @property
    def final_confidence(self) -> NDArray[np.float64]:
        """Calibrated confidence if the model has a temperature, otherwise the raw one."""
        return self.confidence if self.calibrated is None else self.calibrated

    def save(self, path: Path) -> None:
        """Write the arrays to an ``.npz`` file, atomically.

        Raises:
            OSError: the file cannot be written; an existing one is unchanged.
        """
        arrays: dict[str, Any] = {
            "samples": self.samples.astype(np.int32),
            "targets": self.targets.astype(np.int32),
            "predicted": self.predicted.astype(np.int32),
            "confidence": self.confidence,
            "in_top5": self.in_top5,
        }
        if self.calibrated is not None:
            arrays["calibrated"] = self.calibrated
        with replacing(path) as temporary:
            np.savez(temporary, **arrays)

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read a file written by ``save``."""
        with np.load(path, allow_pickle=False) as stored:
            samples, targets, predicted = (
                stored[name].astype(np.int64) for name in ("samples", "targets", "predicted")
            )
            calibrated = stored.get("calibrated", None)
            return cls(samples, targets, predicted, stored["confidence"], stored["in_top5"], calibrated)


@dataclass(frozen=True)
class Evaluation:
    """Results on the validation set; accuracies and calibration error in percent.

    Attributes:
        top1, top5: accuracy (top5 over min(5, C) predictions).
        ece: raw expected calibration error, 15 equal-width bins (Naeini et al., AAAI 2015).
        num_validated: number of images counted.
        num_missing: unreadable images skipped, if data.max_bad_val_fraction allows it.
        class_correct, class_total: correct top-1 predictions and images per class.
        top1_by_group: ``top1_head``, ``top1_medium`` and ``top1_tail`` if the training data is long-tailed: mean
            of the class accuracies, so that on an imbalanced validation set every class has the same weight.
        predictions: predictions per image.
        nll: mean negative log-likelihood of the raw probabilities; None if it was not measured.
        ece_calibrated, nll_calibrated: after the logits are divided by `temperature`; None without one.
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
    nll: float | None = None
    ece_calibrated: float | None = None
    nll_calibrated: float | None = None
    temperature: float | None = None

    def metrics(self) -> dict[str, float | int]:
        """Results by name, without the counts per class."""
        overall = {"top1": self.top1, "top5": self.top5, "ece": self.ece}
        names = ("nll", "ece_calibrated", "nll_calibrated", "temperature")
        probabilities = {name: value for name in names if (value := getattr(self, name)) is not None}
        missing = {"num_missing": self.num_missing} if self.num_missing else {}
        counts = {"num_validated": self.num_validated, **missing}
        return {**overall, **probabilities, **counts, **self.top1_by_group}

    def record(self) -> dict[str, object]:
        """Content of validation.json: everything except the predictions."""
        return {**self.metrics(), "class_correct": self.class_correct, "class_total": self.class_total}


def _score_rows(logits_bc: Tensor, batch: Batch) -> Tensor:
    """Rows (sample, target, predicted, confidence, in top 5) of one batch, int64 [B, 5], on the device.

    Padding has sample -1. Integer values make every sum independent of its order.
    """
    logits = logits_bc.float()
    position = torch.arange(len(batch.targets), device=logits.device)
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    confidence = (logits.softmax(dim=1).amax(dim=1).double() * _ONE).round().long()
    in_top5 = (best == batch.targets[:, None]).any(dim=1).long()
    sample = torch.where(position < batch.valid, batch.indices, -1)
    return torch.stack([sample, batch.targets, best[:, 0], confidence, in_top5], dim=1)


@dataclass(frozen=True)
class Likelihood:
    """Request for the negative log-likelihood (NLL), raw and, with a temperature, calibrated.

    Attributes:
        temperature: divides the logits to give calibrated probabilities; None for a model without one.
    """

    temperature: float | None

    def rows(self, logits_bc: Tensor, targets_b: Tensor) -> Tensor:
        """NLL and, with a temperature, calibrated NLL and calibrated confidence, int64 [B, 1 or 3], as integers."""
        logits = logits_bc.double()
        columns = [_nll(logits, targets_b)]
        if self.temperature is not None:
            logits = logits / self.temperature
            columns += [_nll(logits, targets_b), logits.softmax(dim=1).amax(dim=1)]
        return torch.stack([(column * _ONE).round().long() for column in columns], dim=1)

    def results(self, rows: NDArray[np.int64], hits: NDArray[np.bool_]) -> dict[str, float | None]:
        """Fields of `Evaluation` from the rows of all images."""
        result: dict[str, float | None] = {"nll": _mean(rows[:, 0]), "temperature": self.temperature}
        if self.temperature is not None:
            result |= {
                "nll_calibrated": _mean(rows[:, 1]),
                "ece_calibrated": calibration_error(hits, rows[:, 2]),
            }
        return result


def _nll(logits_bc: Tensor, targets_b: Tensor) -> Tensor:
    """Negative log-likelihood of the targets [B], float64, limited to what an integer can represent."""
    nll = F.cross_entropy(logits_bc, targets_b, reduction="none")
    return nll.clamp(max=float(_MAX_NLL))


def _mean(values_n: NDArray[np.int64]) -> float:
    return sum(values_n.tolist()) / len(values_n) / _ONE  # the exact sum, in any order


def _gather(rows_nk: Tensor, missing: int, num_samples: int) -> tuple[NDArray[np.int64], int]:
    """Gather the rows of all ranks in the data set's order, without padding; a collective.

    Args:
        missing: number of images that this rank skipped.

    Returns:
        The rows, and the number of images that were skipped on all ranks.

    Raises:
        TrainingFailure: an image of the set is missing or counted twice.
    """
    parts, skipped = [rows_nk], torch.tensor(missing, device=rows_nk.device)
    if dist.is_initialized():
        parts = [torch.empty_like(rows_nk) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows_nk)
        dist.all_reduce(skipped)
    rows = torch.cat(parts).cpu().numpy()
    rows = rows[rows[:, 0] >= 0]
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    seen, count = len(np.unique(rows[:, 0])), int(skipped)
    if not seen == len(rows) == num_samples - count:
        raise TrainingFailure(
            f"validated {seen} of {num_samples} images, {len(rows)} in total, {count} skipped"
        )
    if not seen:
        raise TrainingFailure("validated no image: no image could be read")
    return rows, count


def _evaluation(
    rows: NDArray[np.int64],
    missing: int,
    num_classes: int,
    groups: Sequence[Group] | None,
    likelihood: Likelihood | None,
) -> Evaluation:
    count = len(rows)
    samples, targets, predicted, confidence, in_top5 = rows[:, :5].T
    hits = targets == predicted
    total = np.bincount(targets, minlength=num_classes).tolist()
    correct = np.bincount(targets[hits], minlength=num_classes).tolist()
    calibrated = rows[:, 7] / _ONE if rows.shape[1] > 7 else None
    result: dict[str, Any] = {} if likelihood is None else likelihood.results(rows[:, 5:], hits)
    return Evaluation(
        top1=100.0 * int(hits.sum()) / count,
        top5=100.0 * int(in_top5.sum()) / count,
        ece=calibration_error(hits, confidence),
        num_validated=count,
        class_correct=correct,
        class_total=total,
        top1_by_group=_group_accuracies(correct, total, groups),
        predictions=Predictions(
            samples, targets, predicted, confidence / _ONE, in_top5.astype(bool), calibrated
        ),
        num_missing=missing,
        **result,
    )


def calibration_error(hits: NDArray[np.bool_], confidence: NDArray[np.int64]) -> float:
    """Expected calibration error in percent, from exact sums (Naeini et al., AAAI 2015).

    Args:
        hits: [N], whether the prediction is correct.
        confidence: [N], in units of 1 / ``_ONE``.
    """
    bins = np.minimum(confidence * BINS // _ONE, BINS - 1)
    gap = 0
    for part in range(BINS):
        inside = bins == part
        gap += abs(int(hits[inside].sum()) * _ONE - int(confidence[inside].sum()))
    return 100.0 * gap / _ONE / len(hits)


def fixed_point(confidence: NDArray[np.float64]) -> NDArray[np.int64]:
    """Confidences for ``calibration_error``."""
    return np.rint(confidence * _ONE).astype(np.int64)


def _group_accuracies(
    correct: list[int], total: list[int], groups: Sequence[Group] | None
) -> dict[str, float]:
    """Mean class accuracy per group, over classes with validation images."""
    accuracies: dict[str, float] = {}
    for group in GROUPS if groups is not None else ():
        counted = zip(correct, total, groups or (), strict=True)
        rates = [hits / images for hits, images, name in counted if name == group and images]
        if rates:
            accuracies[f"top1_{group}"] = 100.0 * sum(rates) / len(rates)
    return accuracies


@torch.inference_mode()
def evaluate(
    score: Scorer,
    pipeline: Pipeline,
    num_classes: int,
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda step: None,
    groups: Sequence[Group] | None = None,
    max_logits: int = MAX_LOGITS,
    likelihood: Likelihood | None = None,
) -> Evaluation | None:
    """Evaluate every image of the pipeline; a collective. None if `should_stop` returned true.

    Args:
        groups: head, medium or tail per class, for the accuracies of the groups.
        max_logits: maximum number of images times classes scored at once.
        likelihood: also measure the likelihood, raw and calibrated.

    Raises:
        TrainingFailure: an image of the set is missing or counted twice.
        UserError: more unreadable images were skipped than allowed.
    """
    rows: list[Tensor] = []
    skipped = 0
    pipeline.start(0)
    for step, batch in enumerate(pipeline):
        if should_stop():
            return None
        for part in batch.split(max(1, max_logits // num_classes)):
            logits = score(part.images)
            columns = [_score_rows(logits, part)]
            if likelihood is not None:
                columns.append(likelihood.rows(logits, part.targets))
            rows.append(torch.cat(columns, dim=1))
        skipped += batch.missing
        progress(step + 1)
    gathered, missing = _gather(torch.cat(rows), skipped, pipeline.num_samples)
    if missing:
        if missing > pipeline.max_bad_images:
            raise too_many(
                False, missing, f"exceed the {pipeline.max_bad_images} allowed, over all processes"
            )
        log.warning("%d unreadable image(s) of %d were skipped", missing, pipeline.num_samples)
    return _evaluation(gathered, missing, num_classes, groups, likelihood)
