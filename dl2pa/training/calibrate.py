"""Calibration of the probabilities at the end of a run: one temperature (Guo et al., ICML 2017).

The temperature divides the logits before the softmax, so it changes no prediction. It minimizes the negative
log-likelihood (NLL) of training images that were not trained on (`data.calibration_fraction`), else of the validation
images. In the second case the results after calibration are cross-fitted: each half of the validation images is
calibrated with the temperature of the other half, and the model's temperature is that of all of them. If the
temperatures of the halves do not lower the NLL of the other halves, as with few images of a good model, the temperature
is 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from dl2pa.osutil import reason_of
from dl2pa.training.data import DataSplits, build_calibration_pipeline
from dl2pa.training.distributed import World
from dl2pa.training.evaluate import Predictions, calibration_error, fixed_point
from dl2pa.training.trainer import Trainer
from pipelines.batch import Batch, Pipeline
from pipelines.dataset import num_samples

log = logging.getLogger(__name__)

MAX_STORED = 2**28
"""Maximum number of logits (images times classes) that rank 0 stores: 1 GiB of float32."""
_BLOCK = 2**20
"""Number of logits that are processed at once, in float64."""
_LOG_RANGE = math.log(1e4)
"""The logarithm of the temperature is between minus this and this."""
_MAX_ITERATIONS = 100
_EVEN, _ODD = slice(0, None, 2), slice(1, None, 2)

Logits = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class ScoredImages:
    """Logits of N images, in the order of the data set.

    Attributes:
        samples: int64 [N], indices in the data set; unreadable images are missing.
        targets: int64 [N].
        logits: float32 [N, C].
    """

    samples: Labels
    targets: Labels
    logits: Logits

    def part(self, rows: slice) -> ScoredImages:
        """The images of a slice, without copying."""
        return ScoredImages(self.samples[rows], self.targets[rows], self.logits[rows])


@dataclass(frozen=True)
class Calibration:
    """Temperature of a model, and results on the validation images.

    Attributes:
        temperature: divides the logits.
        ece_calibrated: calibration error after calibration, percent.
        nll, nll_calibrated: mean negative log-likelihood before and after calibration.
        calibrated_on: split that the images of the fit are from.
        num_calibration: number of these images.
        samples: int64 [N], validation images, in the order of the data set.
        confidence: float64 [N], calibrated probability of their predicted classes.
    """

    temperature: float
    ece_calibrated: float
    nll: float
    nll_calibrated: float
    calibrated_on: Literal["training", "validation"]
    num_calibration: int
    samples: Labels
    confidence: NDArray[np.float64]

    def metrics(self) -> dict[str, float]:
        """Results by name."""
        return {key: getattr(self, key) for key in _METRICS}


_METRICS = ("ece_calibrated", "nll", "nll_calibrated", "temperature")


def calibration_results(calibration: Calibration | None) -> dict[str, Any]:
    """Entries of `result.json`; None if no temperature was fitted."""
    names = (*_METRICS, "calibrated_on", "num_calibration")
    return {key: None if calibration is None else getattr(calibration, key) for key in names}


def calibrate(trainer: Trainer, data: DataSplits) -> tuple[bool, Calibration | None]:
    """Fit the temperature of a trained model, which gets the state of the last validation; a collective.

    Returns:
        False if all ranks agreed to stop before the end; and the calibration, on rank 0 if it was not skipped.
    """
    num_classes, progress = len(data.classes), trainer.progress
    # A resumed run at its end has trained and validated nothing in this attempt.
    trainer.train_state.begin_epoch(progress.epoch + (progress.step > 0))
    most = max(num_samples(split) for split in (data.val, data.calibration) if split is not None)
    if most * num_classes > MAX_STORED:
        log.warning(
            "the probabilities are not calibrated: %d images of %d classes have more than %d logits",
            *(most, num_classes, MAX_STORED),
        )
        return True, None
    held: ScoredImages | None = None
    if data.calibration is not None:
        pipeline = build_calibration_pipeline(trainer.config, data.calibration, trainer.world)
        try:
            completed, held = _score(trainer, pipeline, num_classes)
        finally:
            pipeline.close()
        if not completed:
            return False, None
    completed, val = _score(trainer, trainer.eval_pipeline, num_classes)
    return completed, None if val is None else _fit(val, held)


def _fit(val: ScoredImages, held: ScoredImages | None) -> Calibration | None:
    """Calibration from the logits of the validation images and of held-out training images, if any; rank 0 only.

    A failure only logs a warning.
    """
    source = val if held is None else held
    if not np.isfinite(val.logits).all() or not np.isfinite(source.logits).all() or len(source.targets) < 2:
        log.warning(
            "the probabilities are not calibrated: fewer than two images, or logits that are not finite"
        )
        return None
    try:
        result = fit_calibration(val, held)
    except Exception as error:
        log.warning("the probabilities are not calibrated: %s: %s", type(error).__name__, error)
        return None
    log.info(
        "temperature %.4g, fitted on %d %s images: NLL raw %.4f, calibrated %.4f; ECE calibrated %.2f %%",
        *(result.temperature, result.num_calibration, result.calibrated_on),
        *(result.nll, result.nll_calibrated, result.ece_calibrated),
    )
    return result


def fit_calibration(val: ScoredImages, held: ScoredImages | None) -> Calibration:
    """Fit the temperature and evaluate it on the validation images.

    Args:
        val: at least two images.
        held: training images that were not trained on; None fits on the validation images, see the module.
    """
    source = val if held is None else held
    temperature, of_halves = fit_temperature(source), _of_other_halves(source)
    raw, crossed = _likelihood(source, 1.0)[0], _likelihood_of_halves(source, of_halves)[0]
    if _mean(crossed) >= _mean(raw):
        temperature, of_halves = 1.0, (1.0, 1.0)
    if held is None:
        nll, confidence = _likelihood_of_halves(val, of_halves)
    else:
        nll, confidence = _likelihood(val, temperature)
    hits = val.logits.argmax(axis=1) == val.targets
    return Calibration(
        temperature=temperature,
        ece_calibrated=calibration_error(hits, fixed_point(confidence)),
        nll=_mean(_likelihood(val, 1.0)[0]),
        nll_calibrated=_mean(nll),
        calibrated_on="validation" if held is None else "training",
        num_calibration=len((val if held is None else held).targets),
        samples=val.samples,
        confidence=confidence,
    )


def _of_other_halves(images: ScoredImages) -> tuple[float, float]:
    """Temperatures for the images at even and at odd positions, each fitted on the other half."""
    return fit_temperature(images.part(_ODD)), fit_temperature(images.part(_EVEN))


def _likelihood_of_halves(
    images: ScoredImages, temperatures: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`_likelihood` with one temperature for the images at even and one for those at odd positions."""
    nll, confidence = np.empty(len(images.targets)), np.empty(len(images.targets))
    for rows, temperature in zip((_EVEN, _ODD), temperatures, strict=True):
        nll[rows], confidence[rows] = _likelihood(images.part(rows), temperature)
    return nll, confidence


def fit_temperature(images: ScoredImages) -> float:
    """Temperature with the smallest NLL, six significant digits; between 0.0001 and 10,000.

    The NLL is convex in the inverse temperature; Newton's method on its logarithm, with bisection, finds the zero of
    the derivative. If every prediction is correct, the NLL has no minimum above 0. The targets are therefore smoothed
    as in Platt (Advances in Large Margin Classifiers, 1999): by the weight of one more image with a random class.
    """
    low, high, position = -_LOG_RANGE, _LOG_RANGE, 0.0
    for _ in range(_MAX_ITERATIONS):
        beta = math.exp(position)
        slope, curvature = _derivatives(images, beta)
        if slope == 0.0:
            break
        low, high = (low, position) if slope > 0 else (position, high)
        bend = beta * slope + beta**2 * curvature  # second derivative by the logarithm
        following = position - beta * slope / bend if bend > 0 else math.inf
        if not low < following < high:
            following = (low + high) / 2
        change, position = abs(following - position), following
        if change < 1e-9:
            break
    return float(f"{math.exp(-position):.6g}")


def _derivatives(images: ScoredImages, beta: float) -> tuple[float, float]:
    """First and second derivative of the mean NLL by the inverse temperature."""
    smoothing = 1.0 / (len(images.targets) + 1)
    slopes: list[float] = []
    curvatures: list[float] = []
    for scores, targets in _blocks(images):
        exponentials = np.exp(beta * scores)
        total = exponentials.sum(axis=1)
        mean = (exponentials * scores).sum(axis=1) / total
        square = (exponentials * scores**2).sum(axis=1) / total
        true = scores[np.arange(len(targets)), targets]
        slopes += (mean - (1 - smoothing) * true - smoothing * scores.mean(axis=1)).tolist()
        curvatures += (square - mean**2).tolist()
    return math.fsum(slopes) / len(slopes), math.fsum(curvatures) / len(curvatures)


def _likelihood(images: ScoredImages, temperature: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """NLL of the target and probability of the predicted class, both [N]."""
    nll = [np.empty(0)]
    confidence = [np.empty(0)]
    for scores, targets in _blocks(images):
        scores /= temperature
        total = np.exp(scores).sum(axis=1)
        nll.append(np.log(total) - scores[np.arange(len(targets)), targets])
        confidence.append(1.0 / total)
    return np.concatenate(nll), np.concatenate(confidence)


def _blocks(images: ScoredImages) -> Iterator[tuple[NDArray[np.float64], Labels]]:
    """Logits minus the largest of the image, float64 [B, C], and targets [B]."""
    rows = max(1, _BLOCK // images.logits.shape[1])
    for start in range(0, len(images.targets), rows):
        scores = images.logits[start : start + rows].astype(np.float64)
        scores -= scores.max(axis=1, keepdims=True)
        yield scores, images.targets[start : start + rows]


def _mean(values: NDArray[np.float64]) -> float:
    return math.fsum(values.tolist()) / len(values)  # the exact sum, in any order


@torch.inference_mode()
def _score(trainer: Trainer, pipeline: Pipeline, num_classes: int) -> tuple[bool, ScoredImages | None]:
    """Score every image of a pipeline; a collective.

    Returns:
        False if all ranks agreed to stop; and the logits, on rank 0.
    """
    state, world = trainer.train_state, trainer.world
    state.sync_buffers()
    state.evaluated.eval()
    rows = _Rows(pipeline.num_samples, num_classes, world)
    size = max(1, trainer.config.method.max_logits // num_classes)
    pipeline.start(0)
    for step, batch in enumerate(pipeline):
        if trainer.stop.poll():
            if world.is_main:
                trainer.run_dir.write_status(state="stopping")
            return False, None
        for part in batch.split(size):
            rows.add(part, state.score(part.images))
        trainer.display.evaluating(step + 1, pipeline.steps_per_epoch)
    state.model.train()
    return True, rows.result()


class _Rows:
    """Logits of all ranks, collected on rank 0 batch by batch."""

    def __init__(self, num_samples: int, num_classes: int, world: World) -> None:
        self._world = world
        count = num_samples if world.is_main else 0
        self._logits = np.empty((count, num_classes), dtype=np.float32)
        self._targets = np.full(count, -1, dtype=np.int64)

    def add(self, batch: Batch, logits_bc: Tensor) -> None:
        """Add a batch of every rank; a collective."""
        position = torch.arange(len(batch.targets), device=batch.indices.device)
        samples = torch.where(position < batch.valid, batch.indices, -1)
        columns = [self._gather(tensor.cpu()) for tensor in (samples, batch.targets, logits_bc.float())]
        for part, targets, logits in zip(*columns, strict=True):
            kept = part >= 0
            self._targets[part[kept]] = targets[kept]
            self._logits[part[kept]] = logits[kept]

    def _gather(self, tensor: Tensor) -> list[NDArray[Any]]:
        """The tensors of all ranks on rank 0; none on the others."""
        if self._world.size == 1:
            return [tensor.numpy()]
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self._world.size)] if self._world.is_main else None
        dist.gather(tensor, parts, dst=0, group=self._world.side_group)
        return [part.numpy() for part in parts or ()]

    def result(self) -> ScoredImages | None:
        if not self._world.is_main:
            return None
        samples = np.flatnonzero(self._targets >= 0)
        if len(samples) < len(self._targets):
            return ScoredImages(samples, self._targets[samples], self._logits[samples])
        return ScoredImages(samples, self._targets, self._logits)


def add_to_predictions(path: Path, calibration: Calibration) -> None:
    """Add the calibrated confidences to the predictions of the last validation. A failure only logs a warning."""
    try:
        predictions = Predictions.load(path)
        if np.array_equal(predictions.samples, calibration.samples):
            replace(predictions, calibrated=calibration.confidence).save(path)
    except OSError as error:  # only the report needs them
        log.warning("%s cannot be written: %s", path, reason_of(error))
