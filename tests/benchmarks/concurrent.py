"""Throughput of concurrent runs on one device, compared with a single run."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import distributed as dist

from dl2pa.bench.group import run_in_group
from dl2pa.bench.runners import Compile, TrainStateRunner, resident_config, synchronize
from dl2pa.osutil import usable_cores
from dl2pa.training.distributed import World, set_numerics

_WARM_UP = 5
_DISCARDED = 2


def bench_concurrent(
    model: str, counts: list[int], batch_size: int, steps: int, rounds: int, precision: str, compile: Compile
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measure runs of a small network on images in memory, one process each, as started by `dl2pa sweep --parallel K`.

    In every round first one run trains alone, then all train. On a CPU they share the cores.

    Args:
        model: a CIFAR backbone.
        counts: numbers of concurrent runs.
        batch_size: batch size per run.
        steps: steps per run and round.

    Returns:
        Ratios of the total images per second to those of a single run, medians over the rounds; rows of `runs step_ms
        images_per_second alone_step_ms alone_images_per_second`.
    """
    arguments = model, batch_size, steps, rounds, precision, compile
    rows = [run_in_group(n, 1, f"{n} runs", _measure, *arguments) for n in counts]
    return {f"{row['runs']} runs/1": row.pop("ratio") for row in rows}, rows


def _measure(
    model: str, batch_size: int, steps: int, rounds: int, precision: str, compile: Compile
) -> dict[str, Any]:
    rank, runs = dist.get_rank(), dist.get_world_size()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    cores = usable_cores()
    config = resident_config(model, batch_size, {"precision": precision, "compile": compile, "seed": rank})
    set_numerics(config.train, device, 1)
    # The runs are independent; the group only synchronizes them.
    runner = TrainStateRunner(config, World(0, 1, 0, 1, device, 1))
    runner.run(_WARM_UP)
    alone: list[float] = []
    together: list[float] = []
    for _ in range(rounds):
        for concurrent, seconds in ((False, alone), (True, together)):
            torch.set_num_threads(max(1, cores // runs) if concurrent else cores)
            dist.barrier()
            if concurrent or rank == 0:
                runner.run(_DISCARDED)
            synchronize(device)
            if concurrent:
                dist.barrier()
            start = time.perf_counter()
            if concurrent or rank == 0:
                runner.run(steps)
            synchronize(device)
            if concurrent:
                dist.barrier()
            seconds.append((time.perf_counter() - start) / steps)
    runner.close()
    single_s, concurrent_s = statistics.median(alone), statistics.median(together)
    return {
        "runs": runs,
        "step_ms": concurrent_s * 1e3,
        "images_per_second": runs * batch_size / concurrent_s,
        "alone_step_ms": single_s * 1e3,
        "alone_images_per_second": batch_size / single_s,
        "ratio": statistics.median(runs * a / b for a, b in zip(alone, together, strict=True)),
    }
