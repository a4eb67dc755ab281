"""Time and memory of a training step for different numbers of classes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from dl2pa.bench.memory import peak_gib, reset_peak, resident_gib
from dl2pa.bench.runners import synchronize, synthetic_config
from dl2pa.model.model import PrototypeInit, build_model
from dl2pa.training.distributed import World
from dl2pa.training.train_state import TrainState
from pipelines.batch import Batch

LOSSES = ("squared_cosine", "cross_entropy")
_CROSS_ENTROPY_STEPS = 1
_CHUNK = 65_536


def bench_classes(
    model: str, class_counts: list[int], dim: int, batch_size: int, steps: int, rounds: int, world: World
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measure steps with each class count in turn, on the same batch; random prototypes, dynamic assignment.

    A turn is `steps` steps with the squared cosine, or one with the cross-entropy, which is slow for many classes.

    Returns:
        Ratios of the step time to that with the fewest classes (median over rounds of the ratio within a round), and
        rows of `classes loss step_ms step_gib method_gib`: fastest step, peak memory of a step in addition to the
        state, and state of the method (prototypes, class vectors, statistic).
    """
    batch = _batch(model, batch_size, min(class_counts), world)
    ratios: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for loss in LOSSES:
        turn_steps = steps if loss == "squared_cosine" else _CROSS_ENTROPY_STEPS
        build = partial(_train_state, model, dim=dim, loss=loss, batch_size=batch_size, world=world)
        results = _bench_loss(build, class_counts, batch, turn_steps, rounds, world)
        for count, (ratio, row) in results.items():
            ratios[f"{loss}: {count}/{min(class_counts)} classes"] = ratio
            rows.append({"classes": count, "loss": loss, "dim": dim, "batch": batch_size, **row})
    return ratios, rows


def _bench_loss(
    build: Callable[[int], TrainState],
    class_counts: list[int],
    batch: Batch,
    steps: int,
    rounds: int,
    world: World,
) -> dict[int, tuple[float, dict[str, float]]]:
    """Return the ratio and the columns of one loss per class count. Frees the train states, gigabytes each."""
    train_states = {count: build(count) for count in class_counts}
    gib = {count: _step_gib(train_state, batch, world) for count, train_state in train_states.items()}
    times: dict[int, list[float]] = {count: [] for count in class_counts}
    for _ in range(rounds):
        for count, train_state in train_states.items():
            times[count].append(_seconds(train_state, batch, steps, world))
    baseline = times[min(class_counts)]
    results: dict[int, tuple[float, dict[str, float]]] = {}
    for count, train_state in train_states.items():
        state = sum(t.numel() * t.element_size() for t in train_state.model.method.buffers())
        row = {"step_ms": min(times[count]) * 1e3, "step_gib": gib[count], "method_gib": state / 2**30}
        results[count] = statistics.median(a / b for a, b in zip(times[count], baseline, strict=True)), row
    return results


def _batch(model: str, batch_size: int, classes: int, world: World) -> Batch:
    side = synthetic_config(model, batch_size).data.image_size
    images = torch.randn(batch_size, 3, side, side, device=world.device)
    images = images.contiguous(memory_format=torch.channels_last)
    indices = torch.arange(batch_size, device=world.device)
    return Batch(images, indices % classes, indices, batch_size)


def _train_state(
    model: str, classes: int, *, dim: int, loss: str, batch_size: int, world: World
) -> TrainState:
    config = synthetic_config(model, batch_size, {"num_classes": classes})
    method = config.method.model_copy(update={"loss": loss})
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"embedding_dim": dim}), "method": method}
    )
    generator = torch.Generator().manual_seed(classes)
    points = torch.empty(classes, dim)
    for part in points.split(_CHUNK):
        part.copy_(F.normalize(torch.randn(part.shape, generator=generator), dim=1))
    train_state = TrainState(config, build_model(config, classes, PrototypeInit(points, None)), world, 100)
    train_state.wrap()
    train_state.model.train()
    return train_state


def _seconds(train_state: TrainState, batch: Batch, steps: int, world: World) -> float:
    train_state.step(batch, 0)
    synchronize(world.device)
    start = time.perf_counter()
    for step in range(steps):
        train_state.step(batch, step)
    synchronize(world.device)
    return (time.perf_counter() - start) / steps


def _step_gib(train_state: TrainState, batch: Batch, world: World) -> float:
    """Return the peak memory of a step in addition to the memory before it."""
    train_state.step(batch, 0)
    if world.device.type == "cuda":
        before = torch.cuda.memory_allocated(world.device)
        torch.cuda.reset_peak_memory_stats(world.device)
        train_state.step(batch, 1)
        return (torch.cuda.max_memory_allocated(world.device) - before) / 2**30
    reset_peak()
    before = resident_gib()
    train_state.step(batch, 1)
    return max(0.0, peak_gib() - before)
