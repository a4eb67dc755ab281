"""Seconds of one matching on statistics as an untrained and a trained network leave them, and what a solve in the
background costs the training beside it."""

from __future__ import annotations

import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from dl2pa.assignment import ClassStatistic
from dl2pa.assignment.background import BackgroundSolve
from dl2pa.assignment.insight import with_margin
from dl2pa.assignment.match import is_main, settle, take
from dl2pa.assignment.solve import centred_cost, solve_assignment
from dl2pa.backbones import build_embedder
from dl2pa.bench.group import in_a_group

STATES = ("untrained", "trained")
_ONE = 2.0**32
_WINDOW_S = 10.0
"""Training timed before a solve, seconds."""
_WARM_UP_S = 2.0
_LONGEST_S = 300.0
"""Training timed during one."""


def bench_matching(class_counts: list[int], dim: int, rounds: int, nproc: int) -> list[dict[str, Any]]:
    """One row a class count and state; the fastest of `rounds`, the states taking turns.

    Each class count has a group of `nproc` processes of its own, joined by gloo.

    Returns:
        Rows of `classes dim state reduce_s solve_s solve_cpu_s broadcast_s insight_s peak_gib`: all-reduce and
        normalisation of the statistic; cost and assignment on rank 0, and the processor's share of that time; σ
        broadcast, compared and in force; margin and separation, which rank 0 computes afterwards; the most memory
        rank 0's process had, torch's own included.
    """
    return [
        row
        for count in class_counts
        for row in in_a_group(nproc, 1, f"{count} classes", _rank, count, dim, rounds)
    ]


def _rank(count: int, dim: int, rounds: int) -> list[dict[str, Any]]:
    best: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for state in STATES:
            row = _measure(count, dim, state)
            old = best.setdefault(state, row)
            for key in ("reduce_s", "solve_s", "solve_cpu_s", "broadcast_s", "insight_s"):
                old[key] = min(old[key], row[key])
            old["peak_gib"] = row["peak_gib"]
    return list(best.values())


def _measure(count: int, dim: int, state: str) -> dict[str, Any]:
    """One matching as training does it, in its parts."""
    statistic, points = _share_of_statistic(count, dim, state)
    sigma = torch.arange(count)
    dist.barrier()
    taken = take(statistic, points, sigma)
    rows, places = statistic.rows.numpy(), points.double().numpy()
    began, used = time.perf_counter(), time.process_time()
    solved = solve_assignment(rows, places) if is_main() else None
    solve_s, solve_cpu_s = time.perf_counter() - began, time.process_time() - used
    dist.barrier()
    result = settle(statistic.rows, points, sigma, solved, taken.own_cosine, taken.classes_seen)
    insight_s = 0.0
    if solved is not None:
        insight_s = with_margin(taken.look(), lambda: centred_cost(rows, places), solved).seconds
    return {
        "classes": count,
        "dim": dim,
        "state": state,
        "reduce_s": taken.seconds,
        "solve_s": solve_s,
        "solve_cpu_s": solve_cpu_s,
        "broadcast_s": result.seconds,
        "insight_s": insight_s,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _share_of_statistic(count: int, dim: int, state: str) -> tuple[ClassStatistic, Tensor]:
    """This rank's part of one sample a class, and the prototypes."""
    rows, points = rows_and_points(count, dim, state)
    statistic, share = ClassStatistic(count, dim), _ONE / dist.get_world_size()
    statistic.sums.copy_(torch.from_numpy(rows * share).round())
    statistic.counts.fill_(int(share))
    return statistic, torch.from_numpy(points).float()


def bench_background(count: int, dim: int, rounds: int) -> list[dict[str, Any]]:
    """Speed of a training (ResNet-8, batch 64) while an untrained network's σ is solved beside it, over its speed
    right before, by turns; once with a core left for the solve and once with none.

    Returns:
        Rows of `classes dim training_threads cores solve_s before during ratio peak_gib`: the solve's fastest wall
        time (null where none was over within 300 s), medians of steps a second and of their ratio, and the solving
        process's memory.
    """
    cores = len(os.sched_getaffinity(0))
    rows, points = rows_and_points(count, dim, "untrained")
    found: list[dict[str, Any]] = []
    for threads in sorted({max(1, cores - 1), cores}):
        torch.set_num_threads(threads)
        training = _Training(dim)
        training.run(_WARM_UP_S)
        pairs: list[tuple[float, float]] = []
        solves: list[float] = []
        peak = 0.0
        for _ in range(rounds):
            before = training.run(_WINDOW_S)
            began, solve = time.perf_counter(), BackgroundSolve(rows, points)
            try:
                during = training.run(_LONGEST_S, solve)
                peak = max(peak, training.peak_gib)
                if solve.ready():
                    solves.append(time.perf_counter() - began)
            finally:
                solve.close()
            pairs.append((before, during))
        found.append(
            {
                "classes": count,
                "dim": dim,
                "training_threads": threads,
                "cores": cores,
                "solve_s": min(solves, default=None),
                "before": statistics.median(before for before, _ in pairs),
                "during": statistics.median(during for _, during in pairs),
                "ratio": statistics.median(during / before for before, during in pairs),
                "peak_gib": peak,
            }
        )
    return found


class _Training:
    """A small network that learns random images, for its speed."""

    def __init__(self, dim: int) -> None:
        self._network = build_embedder("resnet8", dim)
        self._optimizer = torch.optim.SGD(self._network.parameters(), lr=0.01)
        self._images = torch.randn(64, 3, 32, 32)
        self._targets = F.normalize(torch.randn(64, dim), dim=1)
        self.peak_gib = 0.0

    def run(self, seconds: float, solve: BackgroundSolve | None = None) -> float:
        """Steps a second, for so long or until the solve is over."""
        began, steps = time.perf_counter(), 0
        while (passed := time.perf_counter() - began) < seconds:
            if solve is not None:
                self.peak_gib = max(self.peak_gib, _peak_gib(solve.pid))
                if solve.ready():
                    break
            cosines = (F.normalize(self._network(self._images), dim=1) * self._targets).sum(dim=1)
            (1.0 - cosines).square().mean().backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            steps += 1
        return steps / passed


def _peak_gib(pid: int) -> float:
    """Most memory a living process has had."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM")), 0.0)


def rows_and_points(count: int, dim: int, state: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit rows and prototypes: all rows near one direction, or each near a prototype of its own."""
    generator = np.random.default_rng(count)
    points = _unit(generator.standard_normal((count, dim)))
    noise = _unit(generator.standard_normal((count, dim)))
    if state == "untrained":
        return _unit(_unit(generator.standard_normal((1, dim))) + 0.1 * noise), points
    return _unit(points[generator.permutation(count)] + 0.5 * noise), points


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
