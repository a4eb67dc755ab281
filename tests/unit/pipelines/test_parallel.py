"""Parallel map: results, errors, and no worker outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.parallel import in_parallel

ROOT = Path(__file__).resolve().parents[3]


def root_of(square: int) -> float:
    if square < 0:
        raise ValueError(f"{square} has no root")
    return square**0.5


def test_results_and_errors_are_returned() -> None:
    assert list(in_parallel(root_of, (4, 9, 16), 1)) == [2.0, 3.0, 4.0]
    with pytest.raises(ValueError, match="-1 has no root"):
        list(in_parallel(root_of, [4, -1], 1))


def survive(signal_number: int) -> int:
    os.kill(os.getpid(), signal_number)
    return signal_number


def test_workers_survive_the_stop_signals_of_a_scheduler() -> None:
    """A scheduler signals every process of a job; the parent decides when to stop."""
    requests = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    assert sorted(in_parallel(survive, requests, 2)) == sorted(requests)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(requests), "the parent's signals"


ENDLESS = """
import os, sys, time
from pathlib import Path
from pipelines.parallel import in_parallel
def endless(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)
if __name__ == "__main__":
    list(in_parallel(endless, [sys.argv[1]] * 2, 2))
"""


def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    script, folder = tmp_path / "endless.py", tmp_path / "pids"
    script.write_text(ENDLESS)
    folder.mkdir()
    parent = subprocess.Popen([sys.executable, script, folder], env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while not list(folder.iterdir()):
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    workers = [Path("/proc") / path.name for path in folder.iterdir()]
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(process: Path) -> bool:
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
