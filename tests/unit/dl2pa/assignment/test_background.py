"""The solve in a process of its own: the same σ, whatever happens to the process, and no process left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from dl2pa.assignment import ClassStatistic, PendingMatching, match, solve_assignment
from dl2pa.assignment.background import BackgroundSolve
from dl2pa.errors import TrainingFailure

ROOT = Path(__file__).resolve().parents[4]
Floats = NDArray[np.float64]


def unit_rows(count: int, dim: int, seed: int) -> Floats:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rows_and_points(count: int, dim: int, state: str) -> tuple[Floats, Floats]:
    points, noise = unit_rows(count, dim, 0), unit_rows(count, dim, 1)
    if state == "trained":
        return points[np.random.default_rng(2).permutation(count)] + 0.5 * noise, points
    if state == "in two minds":  # every class is as near to one prototype as to another
        return points.repeat(2, axis=0)[:count] - points, points
    return unit_rows(1, dim, 3) + 0.1 * noise, points


@pytest.fixture
def start() -> Iterator[Callable[[Floats, Floats], BackgroundSolve]]:
    made: list[BackgroundSolve] = []

    def begin(rows: Floats, points: Floats) -> BackgroundSolve:
        made.append(BackgroundSolve(rows, points))
        return made[-1]

    yield begin
    for solve in made:
        solve.close()


def is_running(pid: int) -> bool:
    """Whether there is such a process, and not only its remains."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


@pytest.mark.parametrize("state", ["untrained", "trained", "in two minds"])
def test_the_same_assignment_as_in_place(
    state: str, start: Callable[[Floats, Floats], BackgroundSolve]
) -> None:
    rows, points = rows_and_points(300, 40, state)
    solve = start(rows, points)
    expected = solve_assignment(rows, points)
    assert np.array_equal(solve.result(), expected)
    assert sorted(expected) == list(range(300))


def test_it_is_polite_and_deaf_to_stop_signals(start: Callable[[Floats, Floats], BackgroundSolve]) -> None:
    rows, points = rows_and_points(2500, 40, "untrained")
    solve = start(rows, points)
    deadline = time.monotonic() + 60
    while os.getpriority(os.PRIO_PROCESS, solve.pid) == os.getpriority(os.PRIO_PROCESS, 0):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        os.kill(solve.pid, number)
    first = solve.pid
    assert sorted(solve.result()) == list(range(2500))
    assert solve.pid == first
    assert os.getpgid(0) != first


def test_a_process_that_dies_is_replaced_once(
    start: Callable[[Floats, Floats], BackgroundSolve], caplog: pytest.LogCaptureFixture
) -> None:
    rows, points = rows_and_points(300, 40, "untrained")
    solve = start(rows, points)
    first = solve.pid
    os.kill(first, signal.SIGKILL)
    assert np.array_equal(solve.result(), solve_assignment(rows, points))
    assert solve.pid != first
    assert "killed by signal 9 (out of memory?): started again" in caplog.text


def test_dead_processes_are_replaced_before_anybody_waits(
    start: Callable[[Floats, Floats], BackgroundSolve],
) -> None:
    solve = start(*rows_and_points(50, 5, "trained"))
    solve.tend()
    first = solve.pid
    os.kill(first, signal.SIGKILL)
    wait_until_gone(first)
    solve.tend()
    assert solve.pid != first


def test_a_second_death_is_told_with_what_to_do(start: Callable[[Floats, Floats], BackgroundSolve]) -> None:
    solve = start(*rows_and_points(300, 40, "untrained"))
    os.kill(solve.pid, signal.SIGKILL)
    while not solve.ready(60):
        os.kill(solve.pid, signal.SIGKILL)
        with pytest.raises(
            TrainingFailure, match=r"300 classes.*killed by signal 9.*GiB.*resume with more memory"
        ):
            solve.ready(60)
        return


def test_an_error_of_its_own_is_told(
    start: Callable[[Floats, Floats], BackgroundSolve], caplog: pytest.LogCaptureFixture
) -> None:
    rows, points = rows_and_points(20, 5, "trained")
    rows[3, 2] = np.nan
    with pytest.raises(TrainingFailure, match="ValueError"):
        start(rows, points).result()


def test_closing_ends_the_process(start: Callable[[Floats, Floats], BackgroundSolve]) -> None:
    solve = start(*rows_and_points(1500, 40, "untrained"))
    os.kill(solve.pid, signal.SIGSTOP)
    solve.close()
    assert not is_running(solve.pid)


PARENT = """
import sys, time, numpy as np
from dl2pa.assignment.background import BackgroundSolve
rows = np.random.default_rng(0).standard_normal((3000, 60))
solve = BackgroundSolve(rows + 9.0, rows[::-1].copy())
print(solve.pid, flush=True)
time.sleep(600)
"""


def test_it_dies_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    try:
        child = int(parent.stdout.readline())
        assert is_running(child)
    finally:
        parent.kill()
        parent.wait()
    wait_until_gone(child)


def test_a_matching_under_way_does_what_one_in_place_does() -> None:
    """Also from what a checkpoint holds of it, and with a margin and all else that a matching tells."""
    points = F.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 12, (200,), generator=torch.Generator().manual_seed(2))
    sigmas, statistics = [torch.arange(12) for _ in range(3)], [ClassStatistic(12, 4) for _ in range(3)]
    for statistic in statistics[:2]:
        statistic.add(features, labels)
    in_place = match(statistics[0], points, sigmas[0])
    pending = PendingMatching.begin(statistics[1], points, sigmas[1], step=7, lag=5)
    assert (pending.began, pending.due) == (7, 12)
    assert statistics[1].counts.sum() == 0, "the next period has begun"
    statistics[2].load_state_dict(statistics[1].state_dict())
    resumed = PendingMatching.resume(pending.state(), statistics[2], points, sigmas[2])
    statistics[1].add(features.flip(0), labels)  # goes into the next matching
    assert torch.equal(sigmas[1], torch.arange(12)), "nothing changes before it is applied"
    for one in (pending.finish(12), resumed.finish(12)):
        assert one.lag == 5
        assert one.moves == in_place.moves
        assert one.moved > 0
        assert one.metrics() == in_place.metrics()
        assert one.insight is not None
        assert one.insight.margin is not None
    assert all(torch.equal(sigma, sigmas[0]) for sigma in sigmas)
    assert torch.equal(statistics[1].rows, statistics[0].rows)
    assert statistics[1].counts.sum() > 0
