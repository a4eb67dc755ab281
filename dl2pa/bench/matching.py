"""Time and memory of one assignment update on statistics as an untrained and a trained network leave them, next to
dense solvers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch import distributed as dist

from dl2pa.assignment import AssignmentSolver, ClassStatistic
from dl2pa.assignment.diagnostics import with_margin
from dl2pa.assignment.match import apply_assignment, is_main, reduce_statistics
from dl2pa.bench.group import in_a_group
from dl2pa.bench.memory import peak_gib, reset_peak, resident_gib

Floats = NDArray[np.float64]

STATES = ("untrained", "trained")
_SCIPY_CLASSES, _LAPX_CLASSES = 25_000, 10_000
"""Most classes that the dense solvers are run on: SciPy takes a minute there, lapx more than seven at 21,841."""
_ONE = 2.0**32
_DRIFT = 0.1
"""Length by which rows move between two updates of a trained network."""


def bench_matching(class_counts: list[int], dim: int, rounds: int, nproc: int) -> list[dict[str, Any]]:
    """One row per class count and state; the fastest of `rounds`, states and solvers by turns.

    Each class count has a group of `nproc` processes of its own, joined by gloo. Candidates are searched for on a GPU
    where there is one.

    Returns:
        Rows of `classes dim state`, seconds `reduce_s candidates_s solve_s certificate_s broadcast_s insight_s
        update_s` (all of an update but the insight), `again_s` (the solve after the rows moved a little, from what the
        first one left), `scipy_s lapx_s` (dense solve with its cost; null: not run or not installed), `rounds
        candidates gap` of the solve, `dense_gain` (what SciPy's objective is above ours, relative), and GiB
        `torch_gib peak_gib` of rank 0's process: before the inputs exist and at the most during the update.
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
            for key, value in row.items():
                if key.endswith("_s") and value is not None:
                    old[key] = min(old[key], value)
    return list(best.values())


def _measure(count: int, dim: int, state: str) -> dict[str, Any]:
    """One update as training does it, in its parts."""
    torch_gib = resident_gib()
    statistic, points = _share_of_statistic(count, dim, state)
    sigma, solver = torch.arange(count), AssignmentSolver()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reset_peak()
    dist.barrier()
    reduced = reduce_statistics(statistic, points, sigma)
    rows, places = statistic.rows.numpy(), points.double().numpy()
    began = time.perf_counter()
    solution = solver.solve(rows, places, sigma.numpy().copy(), device) if is_main() else None
    solve_s = time.perf_counter() - began
    dist.barrier()
    result = apply_assignment(statistic.rows, points, sigma, reduced, solution)
    found: dict[str, Any] = {
        "classes": count,
        "dim": dim,
        "state": state,
        "reduce_s": reduced.seconds,
        "broadcast_s": result.seconds,
        "update_s": reduced.seconds + solve_s + result.seconds,
        "torch_gib": torch_gib,
        "peak_gib": peak_gib(),
    }
    if solution is not None:
        found |= {**solution.work(), "gap": solution.gap}
        found["insight_s"] = with_margin(reduced.diagnostics(), rows, places, solution.assignment).seconds
        began = time.perf_counter()
        solver.solve(_moved(rows), places, solution.assignment, device)
        found["again_s"] = time.perf_counter() - began
        found |= _dense(rows, places, solution.assignment)
    return found


def _dense(rows: Floats, points: Floats, sigma: NDArray[np.int64]) -> dict[str, float | None]:
    """Time of SciPy's and lapx's dense solvers on the centered cost."""
    found: dict[str, float | None] = {"scipy_s": None, "lapx_s": None, "dense_gain": None}
    for name, solve, most in (("scipy_s", _scipy, _SCIPY_CLASSES), ("lapx_s", _lapx, _LAPX_CLASSES)):
        if len(rows) > most:
            continue
        began = time.perf_counter()
        cost = (rows.mean(axis=0) - rows) @ (points - points.mean(axis=0)).T
        columns = solve(cost)
        if columns is not None:
            found[name] = time.perf_counter() - began
            ours, theirs = (cost[np.arange(len(cost)), c].sum() for c in (sigma, columns))
            found["dense_gain"] = float((ours - theirs) / max(abs(theirs), 1e-300))
    return found


def _scipy(cost: Floats) -> NDArray[np.int64]:
    from scipy.optimize import linear_sum_assignment

    return np.asarray(linear_sum_assignment(cost)[1])


def _lapx(cost: Floats) -> NDArray[np.int64] | None:
    try:
        import lap
    except ImportError:
        return None
    solve: Callable[[Floats], Any] = lap.lapjv
    return np.asarray(solve(cost)[1], dtype=np.int64)


def _moved(rows: Floats) -> Floats:
    noise = np.random.default_rng(1).standard_normal(rows.shape)
    return _unit(rows + _DRIFT / math.sqrt(rows.shape[1]) * noise)


def _share_of_statistic(count: int, dim: int, state: str) -> tuple[ClassStatistic, Tensor]:
    """This rank's part of one sample per class, and the prototypes."""
    rows, points = rows_and_points(count, dim, state)
    statistic, share = ClassStatistic(count, dim), _ONE / dist.get_world_size()
    statistic.sums.copy_(torch.from_numpy(rows * share).round())
    statistic.counts.fill_(int(share))
    return statistic, torch.from_numpy(points).float()


def rows_and_points(count: int, dim: int, state: str) -> tuple[Floats, Floats]:
    """Unit rows and prototypes: all rows near one direction, or each near a prototype of its own."""
    generator = np.random.default_rng(count)
    points = _unit(generator.standard_normal((count, dim)))
    noise = _unit(generator.standard_normal((count, dim)))
    if state == "untrained":
        return _unit(_unit(generator.standard_normal((1, dim))) + 0.1 * noise), points
    return _unit(points[generator.permutation(count)] + 0.5 * noise), points


def _unit(rows: Floats) -> Floats:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
