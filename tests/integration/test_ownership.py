"""A run directory has at most one owner, also without file locks and after the owner was suspended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from dl2pa import ownership
from support.paths import REPOSITORY
from support.runs import IN_MEMORY, LONG, STOPPED, Training, assert_identical, processes_of
from support.waiting import eventually

pytestmark = pytest.mark.xdist_group("runs")

FAILURE = 1


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


NO_LOCKS = """
import errno, fcntl

def flock(file, operation):
    raise OSError(errno.ENOLCK, "No locks available")

fcntl.flock = flock
"""


def flock(file: object, operation: int) -> NoReturn:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_without_locks_a_run_trains_refuses_a_second_start_and_resumes(
    nproc: int,
    train: Callable[..., Training],
    undisturbed: Callable[..., Training],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file system without locks, staged in the processes of the run and in this one."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(NO_LOCKS)
    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(ownership, "_SETTLE_S", 0.0)
    training = train(nproc, "run", LONG)
    first = training.program.start(
        *training.command(), env={"PYTHONPATH": f"{tmp_path / 'site'}:{REPOSITORY}"}
    )
    training.wait_for_step(first, 3, 0)
    owner = json.loads((training.run / "owner.json").read_text())
    os.kill(owner["pid"], signal.SIGSTOP)  # it does not finish before the second start
    second = training.program.run(*training.command())
    assert second.code == 2, second.error
    assert f"in use by process {owner['pid']} on {socket.gethostname()}" in second.error
    first.signal_group(signal.SIGKILL)
    first.wait()
    training.assert_gone()
    assert first.error.count("does not support locks") == 1
    done = training.finish()
    assert nproc > 1 or done.error.count("does not support locks") == 1
    assert_identical(training.run, undisturbed(nproc, LONG).run)


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_suspended_owner_that_was_replaced_writes_nothing_more(
    nproc: int,
    train: Callable[..., Training],
    undisturbed: Callable[..., Training],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stop the owner, let another machine take over and finish, continue the owner."""
    training = train(nproc, "run", LONG)
    first = training.start()
    training.wait_for_step(first, 3, 0)
    suspended = [p.pid for p in processes_of(training.run)]
    for pid in suspended:
        os.kill(pid, signal.SIGSTOP)
    for pid in suspended:
        eventually(lambda pid=pid: _state(pid) == "T", f"process {pid} is suspended")
    os.utime(training.run / "owner.json", (0, 0))  # suspended for long
    # The other machine does not see the lock, and has another boot id.
    monkeypatch.setattr(fcntl, "flock", lambda file, operation: None)
    monkeypatch.setattr(ownership, "_place", lambda: {"machine": "another", "processes": "1"})
    in_this_process = Training(training.program, training.config, training.run, 1)
    done = in_this_process.finish()
    assert done.result["epochs"] == 8
    before = _content(training.run)
    for pid in suspended:
        os.kill(pid, signal.SIGCONT)
    ended = first.completed()
    assert ended.code == FAILURE, ended.error
    assert "was taken over by" in ended.result["error"]["message"]
    training.assert_gone()
    assert f"was taken over by process {os.getpid()} on {socket.gethostname()}" in first.error
    assert "Traceback" not in first.error
    assert _content(training.run) == before
    if nproc == 1:
        assert_identical(training.run, undisturbed(1, LONG).run)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _content(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def _open_files(pid: int) -> list[str]:
    try:
        return [file.path for file in psutil.Process(pid).open_files()]
    except psutil.NoSuchProcess:
        return []
