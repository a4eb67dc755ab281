"""Training throughput over the number of processes, measured on this machine, and a model for many GPUs."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.profiler import ProfilerActivity, profile

from dl2pa.bench import LINK_GB_PER_S
from dl2pa.bench.group import run_in_group
from dl2pa.bench.runners import synthetic_config
from dl2pa.config import Config
from dl2pa.model.model import build_model
from dl2pa.osutil import usable_cores
from dl2pa.training.data import build_train_pipeline, open_split
from dl2pa.training.distributed import World
from dl2pa.training.train_state import TrainState

MODEL_DEVICES = (1, 8, 16, 32, 64)
NODE = 8
"""GPUs per node."""
NODE_GB_PER_S = 450.0
"""Bandwidth per GPU and direction within a node: NVLink 4 (NVIDIA's H100 data sheet)."""
_WARM_UP = 3
_PROFILED = 3
_Interval = tuple[float, float]


def bench_scaling(
    model: str, process_counts: list[int], batch_size: int, steps: int, rounds: int, step_ms: float | None
) -> tuple[dict[str, float], list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure weak scaling: a fixed batch per process, with the cores of this machine divided among the processes.

    Args:
        model: backbone, trained on synthetic images.
        batch_size: batch size per process.
        step_ms: step time of one GPU for the model, measured elsewhere; None: that of one process here.

    Returns:
        Ratios of images per second to those of the first count; rows of `processes threads step_ms images_per_second
        gradient_mib all_reduce_ms overlap`: time of a separate all-reduce of the gradients, and from a trace the
        fraction of DDP's all-reduce time that overlaps the backward pass; and the model's rows `devices step_ms
        all_reduce_ms hidden at_least`: the fraction of the speed of one device that remains if the backward pass (two
        thirds of a step) hides the all-reduce, and if it hides none of it.
    """
    cores = usable_cores()
    rows: list[dict[str, Any]] = []
    for count in process_counts:
        threads = max(1, cores // count)
        arguments = model, batch_size, steps, rounds, threads
        rows.append(run_in_group(count, threads, f"{count} processes", _measure, *arguments))
    first = rows[0]
    base_name, base_speed = f"processes/{first['processes']}", first["images_per_second"]
    ratios = {f"{row['processes']} {base_name}": row["images_per_second"] / base_speed for row in rows[1:]}
    model_step_ms: float = step_ms or first["step_ms"]
    return ratios, rows, [_model(devices, first["gradient_mib"], model_step_ms) for devices in MODEL_DEVICES]


def _model(devices: int, gradient_mib: float, step_ms: float) -> dict[str, Any]:
    """Model a ring all-reduce, which sends 2(N-1)/N of the gradients over the slowest link."""
    link = NODE_GB_PER_S if devices <= NODE else LINK_GB_PER_S
    reduce_ms = 2 * (devices - 1) / devices * gradient_mib * 2**20 / (link * 1e9) * 1e3
    visible_ms = max(0.0, reduce_ms - 2 / 3 * step_ms)
    return {
        "devices": devices,
        "step_ms": step_ms,
        "all_reduce_ms": reduce_ms,
        "hidden": step_ms / (step_ms + visible_ms),
        "at_least": step_ms / (step_ms + reduce_ms),
    }


def _measure(model: str, batch_size: int, steps: int, rounds: int, threads: int) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size, rank, size, torch.device("cpu"), threads, dist.group.WORLD)
    config = synthetic_config(model, batch_size * size)
    training = _Training(config, world)
    training.run(_WARM_UP)
    seconds: list[float] = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        training.run(steps)
        dist.barrier()
        seconds.append((time.perf_counter() - start) / steps)
    step = statistics.median(seconds)
    gradients = training.gradients()
    return {
        "processes": size,
        "threads": threads,
        "step_ms": step * 1e3,
        "images_per_second": batch_size * size / step,
        "gradient_mib": gradients.numel() * gradients.element_size() / 2**20,
        "all_reduce_ms": _all_reduce_seconds(gradients, rounds) * 1e3,
        "overlap": training.overlap() if size > 1 else None,
    }


class _Training:
    """Training steps of dl2pa."""

    def __init__(self, config: Config, world: World) -> None:
        dataset = open_split(config, "train")
        self._pipeline = build_train_pipeline(config, dataset, world)
        self._train_state = TrainState(
            config, build_model(config, len(dataset.classes)), world, self._pipeline.steps_per_epoch
        )
        self._train_state.wrap()
        self._train_state.model.train()
        self._step = 0

    def run(self, steps: int) -> None:
        self._pipeline.start(0, self._step)
        for _, batch in zip(range(steps), self._pipeline, strict=False):
            self._train_state.step(batch, self._step)
            self._step += 1

    def gradients(self) -> Tensor:
        """Return a vector of the size of all gradients."""
        return torch.zeros(sum(p.numel() for p in self._train_state.model.parameters()))

    def overlap(self) -> float | None:
        """Return the fraction of the all-reduce time that overlaps the backward pass."""
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            self.run(_PROFILED)
        events: Any = profiler.events()
        reduces = [(e.time_range.start, e.time_range.end) for e in events if "all_reduce" in e.name]
        backward = [(e.time_range.start, e.time_range.end) for e in events if _is_gradient(e.name)]
        return overlap_fraction(reduces, backward)


def _is_gradient(name: str) -> bool:
    return name.startswith("autograd::engine::evaluate_function") and "AccumulateGrad" not in name


def overlap_fraction(intervals: list[_Interval], others: list[_Interval]) -> float | None:
    """Return the fraction of the time in `intervals` that is also in `others`; None if they are empty."""
    first, second = _union(intervals), _union(others)
    total = sum(end - start for start, end in first)
    common = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in first for b in second)
    return common / total if total else None


def _union(intervals: list[_Interval]) -> list[_Interval]:
    """Return the union as sorted disjoint intervals."""
    merged: list[_Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _all_reduce_seconds(gradients: Tensor, times: int) -> float:
    best = float("inf")
    for _ in range(times):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradients)
        best = min(best, time.perf_counter() - start)
    return best
