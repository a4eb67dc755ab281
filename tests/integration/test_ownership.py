"""A run directory has at most one owner."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from support.runs import IN_MEMORY, STOPPED, Training, processes_of
from support.waiting import eventually

pytestmark = pytest.mark.xdist_group("runs")


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_second_start_of_a_running_run_is_refused(nproc: int, train: Callable[..., Training]) -> None:
    training = train(nproc, "run", {"train": {"epochs": 200}, "data": IN_MEMORY})
    first = training.start()
    training.wait_for_step(first, 3, 0)
    second = training.program.run(*training.command())
    assert second.code == 2
    assert first.running()
    owner = json.loads((training.run / "owner.json").read_text())
    assert owner["pid"] in [p.pid for p in processes_of(training.run)]
    assert f"process {owner['pid']} on {socket.gethostname()}" in second.error
    assert second.result["error"]["field"] == "run-dir"
    assert "Traceback" not in second.error
    # The refused start changed nothing: the first one still stops normally.
    os.kill(first.pid, signal.SIGTERM)
    assert first.wait() == STOPPED, first.error
    assert training.status["attempt"] == 1
    training.assert_gone()


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_start_waits_for_a_stopping_owner(nproc: int, train: Callable[..., Training]) -> None:
    training = train(nproc, "run", {"train": {"max_steps": 4}, "data": IN_MEMORY})
    training.run.mkdir(parents=True)
    lock = (training.run / "owner.lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    host = socket.gethostname()
    (training.run / "owner.json").write_text(json.dumps({"host": host, "pid": os.getpid()}))
    (training.run / "status.json").write_text(json.dumps({"state": "stopping", "attempt": 1}))
    started = training.start()

    def has_opened_the_lock() -> bool:
        return any(str(training.run / "owner.lock") in _open_files(p.pid) for p in processes_of(training.run))

    training.wait_for(started, has_opened_the_lock, "the process tries the lock")
    assert started.running()
    assert not (training.run / "environment.json").exists()
    lock.close()
    assert started.wait() == 0, started.error
    assert training.status["attempt"] == 2


def test_a_start_right_after_a_stop_request_resumes(train: Callable[..., Training]) -> None:
    training = train(1, "run", {"train": {"epochs": 3}})
    first = training.start()
    training.wait_for_step(first, 20, 0)
    os.kill(first.pid, signal.SIGTERM)
    eventually(lambda: (training.run / "stop").exists() or not first.running(), "the stop file is written")
    second = training.start()
    done = second.completed()
    assert done.code == 0, done.error
    assert first.wait() == STOPPED, first.error
    assert "resuming" in done.error
    assert done.result["steps"] == 87


def _open_files(pid: int) -> list[str]:
    try:
        return [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return []
