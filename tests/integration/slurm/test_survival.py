"""Runs on a real cluster requeue themselves and end bit-identical to an undisturbed local run."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.runs import Training, assert_identical, processes_of
from support.slurm import Cluster, Job

pytestmark = pytest.mark.xdist_group("slurm")
SAVED_EVERY = 7
LONG = {"train": {"epochs": 6}, "checkpoint": {"every_steps": SAVED_EVERY}}
"""174 steps: long enough to be interrupted several times by an observer that polls."""


@pytest.fixture
def fail_node(cluster: Cluster) -> Iterator[Callable[[str], None]]:
    """Make nodes fail; they are started again at the end of the test."""
    failed: list[str] = []

    def fail(node: str) -> None:
        failed.append(node)
        cluster.stop_node(node)

    yield fail
    for node in failed:
        cluster.start_node(node)


def preempt(job: Job, tmp_path: Path) -> None:
    """Run a job of higher priority that needs both nodes."""
    script = tmp_path / "urgent.sh"
    script.write_text("#!/bin/bash\ntrue\n")
    options = ["--partition=hi", "--nodes=2", "--exclusive", f"--output={tmp_path}/hi.log"]
    done = subprocess.run(
        ["sbatch", "--parsable", *options, str(script)], capture_output=True, text=True, check=True
    )
    assert job.cluster.finish(done.stdout.strip()) == "COMPLETED"
    job.wait_requeued()


def kill_process(job: Job, kind: str) -> None:
    victim = next(p for p in processes_of(job.run)[::-1] if p.kind == kind)
    os.kill(victim.pid, signal.SIGKILL)
    job.wait_requeued()


def assert_survived(job: Job, saved: list[int], undisturbed: Path) -> None:
    """Assert that the job completed, resumed from the saved steps, and is bit-identical to the undisturbed run."""
    assert job.finish() == "COMPLETED", job.log
    assert job.status["state"] == "finished"
    assert job.status["attempt"] == len(saved) + 1
    starts = [int(line.rpartition("from step ")[2]) for line in job.log.splitlines() if "from step" in line]
    assert len(starts) == len(saved) + 1, job.log
    for start, least in zip(starts[1:], saved, strict=True):
        assert start >= least, "steps that were saved were lost"
    assert_identical(job.run, undisturbed)
    job.cluster.assert_tidy(job.job)


def test_a_job_survives_preemption_time_limit_kill_and_node_failure(
    submit: Callable[..., Job],
    undisturbed: Callable[..., Training],
    fail_node: Callable[[str], None],
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    """One job is disturbed four times; two nodes give the result of two local processes."""
    job = submit(LONG, "--time=5")
    job.wait_for_step(15)
    preempt(job, tmp_path)
    assert "saving at the next step" in job.log
    job.wait_for_step(45, attempt=2)
    job.reach_time_limit()
    job.wait_for_step(75, attempt=3)
    kill_process(job, "rank")
    job.wait_for_step(110, attempt=4)
    fail_node("node1")  # the node of the batch script
    job.wait_requeued()
    cluster.start_node("node1")
    lost = 2 * SAVED_EVERY
    assert_survived(job, [15, 45, 75 - lost, 110 - lost], undisturbed(2, LONG).run)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["rank", "torchrun", "launcher"])
def test_a_killed_process_loses_the_steps_since_the_last_save(
    kind: str, submit: Callable[..., Job], undisturbed: Callable[..., Training]
) -> None:
    job = submit(LONG, "--gpus-per-node=2")
    job.wait_for_step(40)
    kill_process(job, kind)
    assert_survived(job, [40 - 2 * SAVED_EVERY], undisturbed(4, LONG).run)


@pytest.mark.thorough
def test_a_signal_to_the_job_steps_requests_a_save(
    submit: Callable[..., Job], undisturbed: Callable[..., Training]
) -> None:
    job = submit(LONG)
    job.wait_for_step(40)
    subprocess.run(["scancel", "--signal=USR2", job.job], check=True)
    assert_survived(job, [40], undisturbed(2, LONG).run)


@pytest.mark.thorough
@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_failed_node_loses_the_steps_since_the_last_save(
    node: str,
    submit: Callable[..., Job],
    undisturbed: Callable[..., Training],
    fail_node: Callable[[str], None],
    cluster: Cluster,
) -> None:
    job = submit(LONG, "--gpus-per-node=2")
    job.wait_for_step(40)
    fail_node(node)
    job.wait_requeued()
    cluster.start_node(node)
    assert_survived(job, [40 - 2 * SAVED_EVERY], undisturbed(4, LONG).run)
