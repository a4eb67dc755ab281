"""Seconds of one matching: reduce, solve, broadcast, on statistics as an untrained and a trained network leave them."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed as dist

from dl2pa.assignment.insight import look_into
from dl2pa.assignment.solve import centred_cost, solve_cost


def bench_matching(class_counts: list[int], dim: int, rounds: int) -> list[dict[str, Any]]:
    """One row a class count and state; the fastest of `rounds`, rounds interleaved over the rows.

    Returns:
        Rows of `classes dim state reduce_s solve_s broadcast_s insight_s peak_gib`; reduce and broadcast are those of
        this process group, null where there is none. Insight comes after the broadcast, on rank 0.
    """
    cases = [(count, state) for count in class_counts for state in ("untrained", "trained")]
    best: dict[tuple[int, str], dict[str, Any]] = {}
    for _ in range(rounds):
        for count, state in cases:
            row = _measure(count, dim, state)
            old = best.setdefault((count, state), row)
            for key in ("reduce_s", "solve_s", "broadcast_s", "insight_s"):
                if row[key] is not None:
                    old[key] = min(old[key], row[key])
            old["peak_gib"] = row["peak_gib"]
    return list(best.values())


def _measure(count: int, dim: int, state: str) -> dict[str, Any]:
    rows, points = _statistic(count, dim, state)
    sums = torch.zeros(count, dim, dtype=torch.int64)
    sigma = torch.zeros(count, dtype=torch.int64)
    grouped = dist.is_initialized()
    began = time.perf_counter()
    cost = centred_cost(rows, points)
    found = solve_cost(cost)
    solve_s = time.perf_counter() - began
    return {
        "classes": count,
        "dim": dim,
        "state": state,
        "reduce_s": _seconds(lambda: dist.all_reduce(sums)) if grouped else None,
        "solve_s": solve_s,
        "broadcast_s": _seconds(lambda: dist.broadcast(sigma, 0)) if grouped else None,
        "insight_s": look_into(cost, found, rows, np.ones(count)).seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _statistic(count: int, dim: int, state: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Unit rows and prototypes: all rows near one direction, or each near a prototype of its own."""
    generator = np.random.default_rng(count)
    points = _unit(generator.standard_normal((count, dim)))
    noise = _unit(generator.standard_normal((count, dim)))
    if state == "untrained":
        return _unit(_unit(generator.standard_normal((1, dim))) + 0.1 * noise), points
    return _unit(points[generator.permutation(count)] + 0.5 * noise), points


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
