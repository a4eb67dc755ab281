"""Training time, memory and cost of a configuration, extrapolated from a few measured steps."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from dl2pa.bench.loaders import iterate_epochs
from dl2pa.bench.memory import peak_gib
from dl2pa.bench.runners import synchronize
from dl2pa.config import Config
from dl2pa.errors import UserError
from dl2pa.model.model import build_model, method_options
from dl2pa.training.data import DataSplits, build_eval_pipeline, build_train_pipeline
from dl2pa.training.distributed import World
from dl2pa.training.evaluate import evaluate
from dl2pa.training.train_state import TrainState
from pipelines.batch import Batch
from pipelines.dataset import num_samples

_WARM_UP = 3
_LARGEST_BATCH = 2**16


@dataclass(frozen=True)
class Target:
    """Hardware to estimate for.

    Attributes:
        devices: number of GPUs like this one (on a CPU: processes).
        link_gb_per_s: bandwidth between devices, per direction.
        price: price per device-hour; None if unknown.
    """

    devices: int
    link_gb_per_s: float
    price: float | None


def estimate(config: Config, data: DataSplits, world: World, target: Target, steps: int) -> dict[str, Any]:
    """Measure `steps` training steps, part of a validation and an assignment update on one device, and extrapolate.

    The steps use the configured data, from the first epoch on. For N devices, a step takes the measured time for 1/N of
    the batch plus a ring all-reduce of the gradients, 2(N-1)/N of their bytes over the link. `hours` assumes that the
    backward pass hides the all-reduce completely, `hours_at_most` that it hides none of it. Validation time is divided
    by N.

    Args:
        data: data opened for `target.devices` processes.

    Returns:
        `steps_per_epoch epochs steps step_ms data_wait_share validate_s match_s all_reduce_ms hours hours_at_most
        device_hours cost memory_gib largest_batch`; the last is per device and None on a CPU.

    Raises:
        UserError: a device's share of the batch does not fit in its memory.
    """
    batch = config.train.batch_size
    share = config.train.model_copy(
        update={"batch_size": batch // target.devices, "virtual_shards": None, "eval_batch_size": None}
    )
    probe = _Probe(config.model_copy(update={"train": share}), data, world)
    try:
        measured = probe.measure(steps)
    except torch.OutOfMemoryError:
        raise UserError(
            "train.batch_size",
            batch,
            f"{share.batch_size} images per device do not fit in its memory",
            "Use train.accumulate=auto, a smaller batch or more --devices.",
        ) from None
    finally:
        probe.close()
    return {**_extrapolate(config, data, target, measured), "largest_batch": probe.largest_batch()}


def _extrapolate(
    config: Config, data: DataSplits, target: Target, measured: dict[str, float]
) -> dict[str, Any]:
    train, devices = config.train, target.devices
    per_epoch = num_samples(data.train) // train.batch_size
    total = train.epochs * per_epoch
    if train.max_steps is not None:
        total = min(total, train.max_steps)
    epochs = total / per_epoch
    validations = math.ceil(epochs / train.eval_every_epochs)
    validate_s = measured["validated_image_s"] * num_samples(data.val) / devices
    all_reduce_s = 2 * (devices - 1) / devices * measured["gradient_bytes"] / (target.link_gb_per_s * 1e9)
    match_s = measured["match_s"] * _num_updates(config, per_epoch, total)
    shortest = total * measured["step_s"] + validations * validate_s + match_s
    longest = shortest + total * all_reduce_s
    return {
        "steps_per_epoch": per_epoch,
        "epochs": epochs,
        "steps": total,
        "step_ms": measured["step_s"] * 1e3,
        "images_per_second": train.batch_size / measured["step_s"],
        "data_wait_share": measured["waited_s"] / measured["step_s"],
        "validate_s": validate_s,
        "match_s": measured["match_s"],
        "all_reduce_ms": all_reduce_s * 1e3,
        "hours": shortest / 3600,
        "hours_at_most": longest / 3600,
        "device_hours": devices * longest / 3600,
        "cost": None if target.price is None else devices * longest / 3600 * target.price,
        "memory_gib": measured["memory_gib"],
    }


def _num_updates(config: Config, per_epoch: int, total: int) -> int:
    """Return the number of assignment updates in the schedule."""
    options = method_options(config)
    if not options.dynamic:
        return 0
    after_epochs = sum(options.schedule.after_epoch(epoch) for epoch in range(math.ceil(total / per_epoch)))
    after_steps = sum(options.schedule.after_step((n - 1) // per_epoch, n) for n in range(1, total + 1))
    return after_epochs + after_steps


class _Probe:
    """Train state and data of the configuration, in this process."""

    def __init__(self, config: Config, data: DataSplits, world: World) -> None:
        self._config, self._data, self._world = config, data, world
        self._pipeline = build_train_pipeline(config, data.train, world)
        model = build_model(config, len(data.classes))
        self._train_state = TrainState(config, model, world, self._pipeline.steps_per_epoch)
        self._train_state.begin_epoch(0)
        self._train_state.wrap()
        self._train_state.model.train()
        self._largest: int | None = None

    def measure(self, steps: int) -> dict[str, float]:
        """Return the seconds per step (median), of waiting for data, per validated image and per assignment update, and
        the bytes of gradients and of memory."""
        gpu = self._world.device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats(self._world.device)
        durations, waited = self._steps(steps)
        memory_gib = torch.cuda.max_memory_allocated(self._world.device) / 2**30 if gpu else peak_gib()
        gradients = sum(p.numel() * p.element_size() for p in self._train_state.model.parameters())
        start = time.perf_counter()
        self._train_state.rematch()
        synchronize(self._world.device)
        match_s = time.perf_counter() - start
        validated_image_s = self._validated_image_seconds(steps)
        if gpu:
            self._largest = self._find_largest_batch()
        return {
            "step_s": statistics.median(durations),
            "waited_s": statistics.median(waited),
            "match_s": match_s,
            "validated_image_s": validated_image_s,
            "gradient_bytes": float(gradients),
            "memory_gib": memory_gib,
        }

    def _steps(self, steps: int) -> tuple[list[float], list[float]]:
        durations: list[float] = []
        waited: list[float] = []
        batches = iterate_epochs(self._pipeline)
        for number in range(_WARM_UP + steps):
            start = time.perf_counter()
            batch = next(batches)
            loaded = time.perf_counter()
            self._train_state.step(batch, number)
            synchronize(self._world.device)
            durations.append(time.perf_counter() - start)
            waited.append(loaded - start)
        return durations[_WARM_UP:], waited[_WARM_UP:]

    def _validated_image_seconds(self, steps: int) -> float:
        """Measure part of a validation."""
        pipeline = build_eval_pipeline(self._config, self._data.val, self._world)
        done = {"steps": 0, "images": 0, "start": 0.0, "end": 0.0}
        self._train_state.evaluated.eval()

        def score(images: Any) -> Any:
            logits = self._train_state.score(images)
            synchronize(self._world.device)
            done["end"] = time.perf_counter()
            if done["steps"] == 0:
                done["start"] = done["end"]  # the first batch includes the start of the pipeline
            else:
                done["images"] += len(images)
            done["steps"] += 1
            return logits

        try:
            single = pipeline.steps_per_epoch < 2
            if single:
                done["start"] = time.perf_counter()
            evaluate(score, pipeline, len(self._data.classes), lambda: done["steps"] > steps)
            if single:
                return (time.perf_counter() - done["start"]) / pipeline.num_samples
            return (done["end"] - done["start"]) / max(1, done["images"])
        finally:
            pipeline.close()

    def _find_largest_batch(self) -> int:
        """Double the batch until it does not fit."""
        shape, fits = self._train_state.model.embedder.input_shape, self._config.train.batch_size
        batch = fits
        while (batch := batch * 2) <= _LARGEST_BATCH:
            try:
                images = torch.zeros(batch, *shape, device=self._world.device)
                labels = torch.zeros(batch, dtype=torch.int64, device=self._world.device)
                self._train_state.model.train()
                self._train_state.step(Batch(images, labels, labels, batch), 0)
                synchronize(self._world.device)
            except torch.OutOfMemoryError:
                break
            finally:
                torch.cuda.empty_cache()
            fits = batch
        return fits

    def largest_batch(self) -> int | None:
        """Return the largest batch that fits on the device; None on a CPU."""
        return self._largest

    def close(self) -> None:
        """Stop the threads of the pipeline."""
        self._pipeline.close()
