"""Hours, memory and money of a configuration, from a short measured probe of it on this machine."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dl2pa.config import Config
from dl2pa.errors import UserError
from dl2pa.model.model import build_model, method_options
from dl2pa.training.data import DataSplits, build_eval_pipeline, build_train_pipeline
from dl2pa.training.distributed import World
from dl2pa.training.evaluate import evaluate
from dl2pa.training.train_state import TrainState
from pipelines.batch import Batch
from pipelines.build import num_samples

_WARM_UP = 3
_LARGEST_BATCH = 2**16
LINK_GB_PER_S = 50.0
"""What a GPU moves between nodes: 400 Gbit/s InfiniBand, one adapter a GPU (NVIDIA's DGX H100 data sheet)."""


@dataclass(frozen=True)
class Target:
    """What the estimate is for.

    Attributes:
        devices: as many GPUs as this one (processes, on a CPU).
        link_gb_per_s: what each moves to and from the others, each way.
        price: of a device for an hour; None: unknown.
    """

    devices: int = 1
    link_gb_per_s: float = LINK_GB_PER_S
    price: float | None = None


def estimate(config: Config, data: DataSplits, world: World, target: Target, steps: int) -> dict[str, Any]:
    """Measure `steps` steps of a device's share of the batch, a part of a validation and a matching, and extrapolate.

    The steps are real ones on the real data, from the first epoch on. What one device cannot show is a model: N devices
    take a step of one on 1/N of the batch, plus a ring's all-reduce of the gradients, 2(N-1)/N of their bytes over the
    link; `hours` has it hidden behind the backward pass, `hours_at_most` none of it. Validation is divided by N.

    Args:
        data: opened for as many processes as there are devices.

    Returns:
        `steps_per_epoch epochs steps step_ms data_wait_share validate_s match_s all_reduce_ms hours hours_at_most
        device_hours cost memory_gib largest_batch`; the last, of one device, is only known of a GPU.

    Raises:
        UserError: a device's share of the batch does not fit this one.
    """
    batch = config.train.batch_size
    share = config.train.model_copy(
        update={"batch_size": batch // target.devices, "virtual_shards": None, "eval_batch_size": None}
    )
    probe = _Probe(config.model_copy(update={"train": share}), data, world)
    try:
        found = probe.measure(steps)
    except torch.OutOfMemoryError:
        raise UserError(
            "train.batch_size",
            batch,
            f"{share.batch_size} images of it do not fit on this device",
            "Give a smaller one, or --devices for more of them.",
        ) from None
    finally:
        probe.close()
    return {**_extrapolate(config, data, target, found), "largest_batch": probe.largest_batch()}


def _extrapolate(config: Config, data: DataSplits, target: Target, found: dict[str, float]) -> dict[str, Any]:
    train, devices = config.train, target.devices
    per_epoch = num_samples(data.train) // train.batch_size
    total = train.epochs * per_epoch
    if train.max_steps is not None:
        total = min(total, train.max_steps)
    epochs = total / per_epoch
    validations = math.ceil(epochs / train.eval_every_epochs)
    validate_s = found["validated_image_s"] * num_samples(data.val) / devices
    all_reduce_s = 2 * (devices - 1) / devices * found["gradient_bytes"] / (target.link_gb_per_s * 1e9)
    match_s = found["match_s"] * _matchings(config, per_epoch, total)
    least = total * found["step_s"] + validations * validate_s + match_s
    most = least + total * all_reduce_s
    return {
        "steps_per_epoch": per_epoch,
        "epochs": epochs,
        "steps": total,
        "step_ms": found["step_s"] * 1e3,
        "images_per_second": train.batch_size / found["step_s"],
        "data_wait_share": found["waited_s"] / found["step_s"],
        "validate_s": validate_s,
        "match_s": found["match_s"],
        "all_reduce_ms": all_reduce_s * 1e3,
        "hours": least / 3600,
        "hours_at_most": most / 3600,
        "device_hours": devices * most / 3600,
        "cost": None if target.price is None else devices * most / 3600 * target.price,
        "memory_gib": found["memory"] / 2**30,
    }


def _matchings(config: Config, per_epoch: int, total: int) -> int:
    """How many matchings the schedule makes."""
    options = method_options(config)
    if not options.dynamic:
        return 0
    after_epochs = sum(options.schedule.after_epoch(epoch) for epoch in range(math.ceil(total / per_epoch)))
    after_steps = sum(options.schedule.after_step((n - 1) // per_epoch, n) for n in range(1, total + 1))
    return after_epochs + after_steps


class _Probe:
    """The configuration's own step on its own data, in this process."""

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
        """Seconds a step (median), of it waiting for data, for a validated image, for a matching; bytes of gradients
        and of memory."""
        gpu = self._world.device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats(self._world.device)
        took, waited = self._steps(steps)
        memory = torch.cuda.max_memory_allocated(self._world.device) if gpu else _resident()
        gradients = sum(p.numel() * p.element_size() for p in self._train_state.model.parameters())
        began = time.perf_counter()
        self._train_state.rematch()
        self._wait()
        match_s = time.perf_counter() - began
        validated_image_s = self._validated_image_seconds(steps)
        if gpu:
            self._largest = self._find_largest_batch()
        return {
            "step_s": statistics.median(took),
            "waited_s": statistics.median(waited),
            "match_s": match_s,
            "validated_image_s": validated_image_s,
            "gradient_bytes": float(gradients),
            "memory": float(memory),
        }

    def _steps(self, steps: int) -> tuple[list[float], list[float]]:
        took: list[float] = []
        waited: list[float] = []
        batches = self._endless()
        for number in range(_WARM_UP + steps):
            began = time.perf_counter()
            batch = next(batches)
            got = time.perf_counter()
            self._train_state.step(batch, number)
            self._wait()
            took.append(time.perf_counter() - began)
            waited.append(got - began)
        return took[_WARM_UP:], waited[_WARM_UP:]

    def _endless(self) -> Any:
        epoch = 0
        while True:
            self._pipeline.start(epoch)
            yield from self._pipeline
            epoch += 1

    def _validated_image_seconds(self, steps: int) -> float:
        """By a part of the validation."""
        pipeline = build_eval_pipeline(self._config, self._data.val, self._world)
        done = {"steps": 0, "images": 0, "began": 0.0, "ended": 0.0}
        self._train_state.evaluated.eval()

        def score(images: Any) -> Any:
            logits = self._train_state.score(images)
            self._wait()
            done["ended"] = time.perf_counter()
            if done["steps"] == 0:
                done["began"] = done["ended"]  # the first holds the start of the pipeline
            else:
                done["images"] += len(images)
            done["steps"] += 1
            return logits

        try:
            few = pipeline.steps_per_epoch < 2
            if few:
                done["began"] = time.perf_counter()
            evaluate(score, pipeline, len(self._data.classes), lambda: done["steps"] > steps)
            if few:
                return (time.perf_counter() - done["began"]) / pipeline.num_samples
            return (done["ended"] - done["began"]) / max(1, done["images"])
        finally:
            pipeline.close()

    def _find_largest_batch(self) -> int:
        """Doubling until it does not fit."""
        side, fits = self._config.data.image_size, self._config.train.batch_size
        batch = fits
        while (batch := batch * 2) <= _LARGEST_BATCH:
            try:
                images = torch.zeros(batch, 3, side, side, device=self._world.device)
                labels = torch.zeros(batch, dtype=torch.int64, device=self._world.device)
                self._train_state.model.train()
                self._train_state.step(Batch(images, labels, labels, batch), 0)
                self._wait()
            except torch.OutOfMemoryError:
                break
            finally:
                torch.cuda.empty_cache()
            fits = batch
        return fits

    def largest_batch(self) -> int | None:
        """Images a device takes at once; None on a CPU."""
        return self._largest

    def _wait(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)

    def close(self) -> None:
        """End the pipeline's threads."""
        self._pipeline.close()


def _resident() -> int:
    """Most memory this process has had, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
