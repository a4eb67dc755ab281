"""All ranks stop at the same step, one poll after the first rank was asked to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dl2pa.training.distributed import World
from dl2pa.training.stop import StopMonitor

# Forks a gloo group; in round 3 of 8 only the last rank gets a signal. Each rank prints the results of poll.
RANKS = """
import json, os, signal, sys
from pathlib import Path
import torch
from torch import distributed as dist
from dl2pa.training.distributed import World
from dl2pa.training.stop import StopMonitor

place, size = Path(sys.argv[1]), int(sys.argv[2])
rank = 0
for other in range(1, size):
    if os.fork() == 0:
        rank = other
        break
dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=size)
world = World(rank, size, rank, size, torch.device("cpu"), 1, dist.new_group(backend="gloo"))
monitor = StopMonitor(world, place / f"stop-{rank}")
monitor.install()
answers = []
for step in range(1, 9):
    if step == 3 and rank == size - 1:
        os.kill(os.getpid(), signal.SIGUSR2)
    answers.append(monitor.poll())
monitor.close()
(place / f"{rank}.json").write_text(json.dumps(answers))
dist.destroy_process_group()
if rank == 0:
    for _ in range(1, size):
        os.wait()
"""


@pytest.mark.parametrize("size", [2, 4])
def test_a_signal_to_one_rank_stops_every_rank_one_step_later(size: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANKS, str(tmp_path), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for rank in range(size):
        answers = json.loads((tmp_path / f"{rank}.json").read_text())
        assert answers == [False] * 3 + [True] * 5, f"rank {rank}"
        assert (tmp_path / f"stop-{rank}").exists() == (rank == size - 1)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[StopMonitor]:
    monitor = StopMonitor(World(0, 1, 0, 1, torch.device("cpu"), 1), tmp_path / "stop")
    monitor.install()
    yield monitor
    monitor.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_single_process_stops_at_its_next_poll(alone: StopMonitor, tmp_path: Path, number: int) -> None:
    assert not alone.poll()
    os.kill(os.getpid(), number)
    assert alone.poll()
    assert (tmp_path / "stop").exists(), "whoever starts next sees that this run is leaving"


def test_signal_handlers_are_restored(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monitor = StopMonitor(World(0, 1, 0, 1, torch.device("cpu"), 1), tmp_path / "stop")
    monitor.install()
    assert signal.getsignal(signal.SIGTERM) != before
    monitor.close()
    assert signal.getsignal(signal.SIGTERM) == before
