"""Other launchers than dl2pa's own and SLURM: the pods of an indexed Job as processes, and torchrun by hand."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.paths import REPOSITORY
from support.runs import IN_MEMORY, STOPPED, Started, Training, assert_identical, config_with, read_status
from support.servers import free_port
from support.waiting import DEADLINE_S, eventually

pytestmark = pytest.mark.xdist_group("runs")
CHANGES = {
    "train": {"epochs": 4, "eval_every_epochs": 4},
    "checkpoint": {"every_steps": 7},
    "data": IN_MEMORY,
}
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


class Job:
    """What the Job controller does with the pods of docker/kubernetes/several-nodes.yaml, on this machine."""

    def __init__(self, training: Training) -> None:
        manifest = list(yaml.safe_load_all((REPOSITORY / "docker/kubernetes/several-nodes.yaml").read_text()))
        self._spec: dict[str, Any] = next(one["spec"] for one in manifest if one["kind"] == "Job")
        self._container: dict[str, Any] = self._spec["template"]["spec"]["containers"][0]
        self._training = training
        self._port = str(free_port())
        self.pods = [self._start(index) for index in range(self._spec["completions"])]
        self.codes: list[int] = []

    def _start(self, index: int) -> Started:
        """Start a pod with the arguments and variables of the manifest; the names of this machine replace others."""
        values = {("fieldPath", INDEX): str(index), ("key", "DL2PA_SECRET"): "0123456789abcdef"}

        def value(one: dict[str, Any]) -> str:
            sources = (
                [] if "value" in one else [item for s in one["valueFrom"].values() for item in s.items()]
            )
            return one["value"] if "value" in one else next(values[i] for i in sources if i in values)

        variables = {one["name"]: value(one) for one in self._container["env"]}
        variables |= {"DL2PA_HEAD": "127.0.0.1", "DL2PA_PORT": self._port}
        command, config, run_dir = self._container["args"]
        assert run_dir.startswith("--run-dir=") and config.endswith(".yaml")
        arguments = [command, str(self._training.config), f"--run-dir={self._training.run}"]
        return self._training.program.start(*arguments, env=variables)

    def _action(self, code: int) -> str:
        rules = self._spec["podFailurePolicy"]["rules"]
        codes = [(rule["action"], rule["onExitCodes"]["values"]) for rule in rules if "onExitCodes" in rule]
        return next((action for action, values in codes if code in values), "Count")

    def finish(self) -> None:
        """Start ended pods again, as the policy says, until each has ended with exit code 0."""
        failures = 0
        for _ in range(100):
            ended = [i for i, pod in enumerate(self.pods) if not pod.running()]
            for index in ended:
                code = self.pods[index].wait()
                if code == 0:
                    continue
                self.codes.append(code)
                assert self._action(code) != "FailJob", self.pods[index].error
                failures += self._action(code) == "Count"
                assert failures <= self._spec["backoffLimit"], self.pods[index].error
                self.pods[index] = self._start(index)
            if all(not pod.running() and pod.wait() == 0 for pod in self.pods):
                return
            self._wait([pod for pod in self.pods if pod.running()])
        raise AssertionError("the Job does not end")

    def _wait(self, pods: list[Started]) -> None:
        eventually(lambda: any(not pod.running() for pod in pods), "a pod ends", DEADLINE_S, 0.05)


@pytest.fixture(scope="module")
def by_torchrun(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that torchrun started, undisturbed."""
    folder = tmp_path_factory.mktemp("torchrun")
    config, run = config_with(folder, digits, CHANGES), folder / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "dl2pa", "train", str(config), f"--run-dir={run}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return run


def test_torchrun_by_hand_finishes_the_run(by_torchrun: Path) -> None:
    assert read_status(by_torchrun)["state"] == "finished"
    assert json.loads((by_torchrun / "result.json").read_text())["steps"] == 116


def test_pods_of_an_indexed_job_continue_after_one_is_killed(
    train: Callable[..., Training], by_torchrun: Path
) -> None:
    training = train(2, "pods", CHANGES)
    job = Job(training)
    training.wait_for(job.pods[1], lambda: (training.run / "latest").exists(), "a checkpoint")
    job.pods[1].signal_group(signal.SIGKILL)
    eventually(lambda: not job.pods[0].running(), "the other pod ends too")
    assert training.status["state"] == "failed"
    job.finish()
    assert -signal.SIGKILL in job.codes
    assert training.status["state"] == "finished"
    assert training.status["attempt"] == 2
    assert_identical(training.run, by_torchrun)


@pytest.mark.thorough
def test_stopped_pod_ends_all_with_exit_code_75(train: Callable[..., Training], by_torchrun: Path) -> None:
    training = train(2, "drained", CHANGES)
    job = Job(training)
    training.wait_for(job.pods[1], lambda: (training.run / "latest").exists(), "a checkpoint")
    job.pods[1].process.send_signal(signal.SIGTERM)
    assert [pod.wait() for pod in job.pods] == [STOPPED, STOPPED]
    assert training.status["state"] == "stopped"
    job.finish()
    assert_identical(training.run, by_torchrun)
