"""The test cluster, started once, and jobs submitted to it with `dl2pa submit`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from support.commands import Completed
from support.paths import TESTCLUSTER
from support.runs import Program, config_with
from support.slurm import Cluster, Job, command

CANNOT_BE_HAD = 3


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster of this session; DL2PA_TEST_CLUSTER is the folder of a running one to use instead."""
    given = os.environ.get("DL2PA_TEST_CLUSTER")
    folder = Path(given or tempfile.mkdtemp(prefix="dl2pa-slurm-"))
    folder.chmod(0o755)
    done = subprocess.run([TESTCLUSTER, "up", folder], capture_output=True, text=True, check=False)
    if done.returncode == CANNOT_BE_HAD:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"no test cluster here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    variables = {"SLURM_CONF": str(folder / "slurm.conf"), "XDG_STATE_HOME": str(folder / "state")}
    old = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    yield Cluster(folder)
    for name, value in old.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    if given is None:
        command(TESTCLUSTER, "down", folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def dl2pa(cluster: Cluster, program: Program) -> Callable[..., Completed]:
    """Run a command of the program in this process, with environment variables as keywords."""

    def run(*arguments: object, **env: str) -> Completed:
        return program.run(*arguments, env=env)

    return run


@pytest.fixture
def cancelled_afterward(cluster: Cluster) -> Iterator[list[str]]:
    """Jobs appended here are cancelled after the test, so that the following tests find the nodes free."""
    jobs: list[str] = []
    yield jobs
    for job in jobs:
        command("scancel", job, check=False)
    for job in jobs:
        cluster.wait(lambda job=job: cluster.is_over(job), f"job {job} has ended")


@pytest.fixture
def submit(
    cluster: Cluster,
    dl2pa: Callable[..., Completed],
    digits: Path,
    tmp_path: Path,
    cancelled_afterward: list[str],
) -> Callable[..., Job]:
    """Submit the small configuration: ``submit({section: {key: value}}, "--time=5")``; two nodes, one process each."""

    def make(
        changes: Mapping[str, object] | None = None, *options: str, name: str = "run", nodes: int = 2
    ) -> Job:
        config = config_with(tmp_path / f"config-{name}", digits, changes)
        places = [f"--nodes={nodes}", "--gpus-per-node=1", "--run-dir", tmp_path / "runs" / name, "--json"]
        done = dl2pa("submit", config, *places, *options)
        assert done.code == 0, done.error
        cancelled_afterward.append(done.result["job_id"])
        return Job(cluster, done.result["job_id"], Path(done.result["run_dir"]), Path(done.result["log"]))

    return make
