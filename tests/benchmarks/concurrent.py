"""Several trainings at once on one device, beside one alone: what a small network leaves idle."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import distributed as dist

from dl2pa.bench.group import in_a_group
from dl2pa.bench.runners import Compile, Ours, resident_config, wait
from dl2pa.osutil import usable_cores
from dl2pa.training.distributed import World

_WARM_UP = 5
_DISCARDED = 2


def bench_concurrent(
    model: str, counts: list[int], batch_size: int, steps: int, rounds: int, precision: str, compile: Compile
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Runs of a small network on images in memory, a process each, as `dl2pa sweep --parallel K` starts them.

    In every round one of them trains while the others wait, then all do. On a CPU the cores are divided among those
    that train.

    Args:
        model: of CIFAR's networks.
        counts: how many at once.
        batch_size: of each.
        steps: of each, a round.

    Returns:
        Ratios of all runs' images a second to those of one alone, medians over the rounds; rows of `runs step_ms
        images_per_second alone_step_ms alone_images_per_second`.
    """
    rows = [
        in_a_group(n, 1, f"{n} runs", _measure, model, batch_size, steps, rounds, precision, compile)
        for n in counts
    ]
    return {f"{row['runs']} runs/1": row.pop("ratio") for row in rows}, rows


def _measure(
    model: str, batch_size: int, steps: int, rounds: int, precision: str, compile: Compile
) -> dict[str, Any]:
    rank, runs = dist.get_rank(), dist.get_world_size()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    torch.backends.cudnn.benchmark = gpu
    cores = usable_cores()
    config = resident_config(model, batch_size, {"precision": precision, "compile": compile, "seed": rank})
    # Each is a training of its own: the group only says when.
    runner = Ours(config, World(0, 1, 0, 1, device, 1))
    runner.run(_WARM_UP)
    alone: list[float] = []
    together: list[float] = []
    for _ in range(rounds):
        for everybody, seconds in ((False, alone), (True, together)):
            torch.set_num_threads(max(1, cores // runs) if everybody else cores)
            dist.barrier()
            if everybody or rank == 0:
                runner.run(_DISCARDED)
            wait(device)
            if everybody:
                dist.barrier()
            began = time.perf_counter()
            if everybody or rank == 0:
                runner.run(steps)
            wait(device)
            if everybody:
                dist.barrier()
            seconds.append((time.perf_counter() - began) / steps)
    runner.close()
    one, all_ = statistics.median(alone), statistics.median(together)
    return {
        "runs": runs,
        "step_ms": all_ * 1e3,
        "images_per_second": runs * batch_size / all_,
        "alone_step_ms": one * 1e3,
        "alone_images_per_second": batch_size / one,
        "ratio": statistics.median(runs * a / b for a, b in zip(alone, together, strict=True)),
    }
