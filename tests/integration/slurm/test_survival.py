"""What clusters do to jobs: each run here is struck, requeues by itself, and ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SAVED_EVERY = 7
# Long enough to be struck in the middle by an observer who polls.
LONG = {"train": {"epochs": 6}, "checkpoint": {"every_steps": SAVED_EVERY}}


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory, helpers: Any) -> Path:
    """The same training by `dl2pa train --nproc 4` on this machine, left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    program = helpers.Program(folder)
    training = helpers.Training(program, helpers.config_with(folder, digits, LONG), folder / "run", 4)
    started = training.start()
    try:
        assert started.wait() == 0, started.error
    finally:
        program.close()
    return training.run


def assert_survived(job: Any, undisturbed: Path, helpers: Any, *, saved: int) -> None:
    """The run completed by itself, lost nothing that was saved, and is bit for bit the undisturbed one."""
    state = job.finish()
    assert state == "COMPLETED", job.log
    assert job.status["state"] == "finished"
    assert job.status["attempt"] == 2
    resumed = [line for line in job.log.splitlines() if "from step" in line]
    assert len(resumed) == 2, job.log
    assert int(resumed[1].rpartition("from step ")[2]) >= saved, "steps that were saved were lost"
    helpers.assert_identical(job.run, undisturbed)
    job.cluster.assert_tidy(job.job)


def processes(job: Any, kind: str, helpers: Any) -> list[Any]:
    return [p for p in helpers.processes_of(job.run) if p.kind == kind]


def test_two_nodes_of_two_processes_compute_what_four_local_processes_do(
    submit: Any, undisturbed: Path, helpers: Any
) -> None:
    job = submit(LONG)
    assert job.finish() == "COMPLETED", job.log
    assert job.starts() == 1
    helpers.assert_identical(job.run, undisturbed)
    job.cluster.assert_tidy(job.job)


def test_a_preempted_job_saves_within_its_grace_and_goes_on(
    submit: Any, undisturbed: Path, helpers: Any, tmp_path: Path
) -> None:
    job = submit(LONG)
    job.wait_for_step(40)
    script = tmp_path / "urgent.sh"
    script.write_text("#!/bin/bash\ntrue\n")
    urgent = [
        "sbatch",
        "--parsable",
        "--partition=hi",
        "--nodes=2",
        "--exclusive",
        f"--output={tmp_path}/hi.log",
    ]
    done = subprocess.run([*urgent, str(script)], capture_output=True, text=True, check=True)
    assert job.cluster.finish(done.stdout.strip()) == "COMPLETED"
    assert_survived(job, undisturbed, helpers, saved=40)
    assert "saving at the next step" in job.log


def test_a_job_at_its_time_limit_saves_and_goes_on(submit: Any, undisturbed: Path, helpers: Any) -> None:
    job = submit(LONG, "--time=5")
    job.wait_for_step(40)
    job.reach_time_limit()
    assert_survived(job, undisturbed, helpers, saved=40)


@pytest.mark.thorough
def test_a_signal_to_the_job_s_processes_is_a_request_to_save(
    submit: Any, undisturbed: Path, helpers: Any
) -> None:
    job = submit(LONG)
    job.wait_for_step(40)
    subprocess.run(["scancel", "--signal=USR2", job.job], check=True)
    assert_survived(job, undisturbed, helpers, saved=40)


@pytest.mark.parametrize("kind", ["rank", pytest.param("torchrun", marks=pytest.mark.thorough), "launcher"])
def test_a_killed_process_costs_the_steps_since_the_last_save(
    kind: str, submit: Any, undisturbed: Path, helpers: Any
) -> None:
    job = submit(LONG)
    job.wait_for_step(40)
    victim = processes(job, kind, helpers)[-1]
    os.kill(victim.pid, signal.SIGKILL)
    assert_survived(job, undisturbed, helpers, saved=40 - 2 * SAVED_EVERY)


@pytest.fixture
def broken_node(cluster: Any) -> Iterator[Callable[[str], None]]:
    """Let a node fail; it comes back with the test's end at the latest."""
    failed: list[str] = []
    tool = Path(__file__).resolve().parents[3] / "slurm/testcluster"

    def fail(node: str) -> None:
        failed.append(node)
        subprocess.run([tool, "stop-node", cluster.folder, node], check=True, capture_output=True)

    yield fail
    for node in failed:
        subprocess.run([tool, "start-node", cluster.folder, node], check=True, capture_output=True)


@pytest.mark.parametrize(
    "node",
    [
        pytest.param("node1", id="the node of the batch script"),
        pytest.param("node2", id="the other node", marks=pytest.mark.thorough),
    ],
)
def test_a_failed_node_costs_the_steps_since_the_last_save(
    node: str, submit: Any, undisturbed: Path, helpers: Any, broken_node: Any, cluster: Any
) -> None:
    """The next attempt finds one node only, and is not the same training bit for bit until both are back."""
    job = submit(LONG)
    job.wait_for_step(40)
    broken_node(node)
    cluster.wait(lambda: cluster.state(job.job) == "PENDING", f"requeued:\n{job.log}")
    cluster.wait(lambda: not cluster.processes(job.job), f"left behind: {cluster.processes(job.job)}")
    tool = Path(__file__).resolve().parents[3] / "slurm/testcluster"
    subprocess.run([tool, "start-node", cluster.folder, node], check=True, capture_output=True)
    assert_survived(job, undisturbed, helpers, saved=40 - 2 * SAVED_EVERY)
