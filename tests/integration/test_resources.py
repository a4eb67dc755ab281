"""Runs that run out of disk or memory end with a reason, and the same command continues them."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from support.disks import full, small_disk
from support.runs import LONG, Training, assert_identical, read_status

pytestmark = pytest.mark.xdist_group("runs")

FAILURE = 1


def test_a_full_disk_ends_a_run_with_the_space_needed_and_the_same_command_continues(
    train: Callable[..., Training], undisturbed: Callable[..., Training], tmp_path: Path
) -> None:
    training = train(1, "run", LONG)
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk", "12m") as disk:
        run = disk / "run"
        on_disk = Training(training.program, training.config, run, 1)
        with full(disk, 400_000):
            failed = training.program.run(*on_disk.command())
        assert failed.code == FAILURE
        assert "Traceback" not in failed.error
        message = failed.result["error"]["message"]
        assert message.startswith(f"No space left on device: {run}/checkpoints has ")
        assert message.endswith("bytes are needed. Free some space there, then the same command continues")
        status = read_status(run)
        assert (status["state"], status["error"]) == ("failed", message)
        assert not list(run.glob("checkpoints/.aside-*"))
        on_disk.finish()
        assert_identical(run, undisturbed(1, LONG).run)


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_exhausted_memory_ends_a_run_with_a_reason_and_the_same_command_continues(
    nproc: int, train: Callable[..., Training], undisturbed: Callable[..., Training]
) -> None:
    """After a few steps rank 0 gets no more memory: no thread can start, and the validation has no room."""
    training = train(nproc, "run", LONG)
    started = training.start()
    training.wait_for_step(started, 3, 0)
    pid = training.status["pid"]
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
    assert started.wait() == FAILURE, started.error
    training.assert_gone()
    report = json.loads((training.run / "logs/rank-0.error.json").read_text())
    assert (training.status["state"], training.status["error"]) == ("failed", report["message"])
    assert report["message"]
    training.finish()
    assert_identical(training.run, undisturbed(nproc, LONG).run)
