"""Training runs: start, watch, interrupt and compare them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from support.commands import Completed, run_here
from support.paths import REPOSITORY
from support.waiting import DEADLINE_S, eventually

SIDE = 16
STOPPED = 75

# A step takes milliseconds, and every part that a resume must carry is used: momentum, a class statistic, early and
# frequent assignment updates, and a metrics window that spans several checkpoints.
BASE: dict[str, Any] = {
    "data": {
        "dataset": "imagefolder",
        "image_size": SIDE,
        "eval_resize": SIDE,
        "crop_scale": [0.6, 1.0],
        "flip": 0.0,
        "mean": [0.305, 0.305, 0.305],
        "std": [0.37, 0.37, 0.37],
    },
    "model": {"backbone": "resnet8", "embedding_dim": 5, "widths": [8, 16, 32]},
    "method": {"name": "dl2pa", "match": {"early_steps": 3, "early_epochs": 2}},
    "optim": {"lr": 0.2, "weight_decay": 1e-4, "warmup_epochs": 0.5},
    "train": {"epochs": 3, "batch_size": 48, "log_every_steps": 1},
    "checkpoint": {"every_steps": 7},
    "tracking": {"enabled": True, "uri": "none", "figures": False},
    "launch": {"device": "cpu", "threads": 1},
}

IN_MEMORY: dict[str, Any] = {"loader": "resident", "crop": "pad", "pad": 2}
"""`data` section of a run whose images are kept in memory, for tests that are not about DALI."""


LONG: dict[str, Any] = {
    "train": {"epochs": 8, "eval_every_epochs": 8, "eval_batch_size": 359},
    "data": IN_MEMORY,
}
"""232 steps and one validation, which needs more memory than a step."""


def config_with(folder: Path, root: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write a configuration based on the small one; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base.yaml"
    base.write_text(yaml.safe_dump({**BASE, "data": {**BASE["data"], "root": str(root)}}))
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump({"base": "base.yaml", **(changes or {})}))
    return file


def read_status(run: Path) -> dict[str, Any]:
    """The content of status.json; empty if it does not exist."""
    try:
        return json.loads((run / "status.json").read_text())
    except FileNotFoundError:
        return {}


@dataclass(frozen=True)
class Process:
    """One process of a run, identified by the run directory on its command line."""

    pid: int
    kind: str
    rank: int | None


def processes_of(run: Path) -> list[Process]:
    """All live processes with the run directory on their command line."""
    processes: list[Process] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if str(run).encode() not in words or int(folder.name) == os.getpid():
                continue
            name = (folder / "comm").read_text().strip()
        except (OSError, ValueError):
            continue
        rank = int(name.removeprefix("dl2pa:rank ")) if name.startswith("dl2pa:rank ") else None
        kind = "rank" if rank is not None else "torchrun" if b"launcher.agent" in words else "launcher"
        processes.append(Process(int(folder.name), kind, rank))
    return processes


class Started:
    """A running dl2pa command that leads its own process group."""

    def __init__(self, arguments: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.out")))
        self._out, self._err = folder / f"{number:02}.out", folder / f"{number:02}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dl2pa", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        return self._out.read_text()

    @property
    def error(self) -> str:
        return self._err.read_text()

    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float = DEADLINE_S) -> int:
        return self.process.wait(seconds)

    def completed(self, seconds: float = DEADLINE_S) -> Completed:
        """Wait for the end."""
        return Completed(self.wait(seconds), self.output, self.error)

    def signal_group(self, number: int) -> None:
        os.killpg(self.pid, number)


class Program:
    """Start dl2pa commands, and end those still running after the test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "commands"
        self._started: list[Started] = []

    def start(self, *arguments: object, env: Mapping[str, str] | None = None) -> Started:
        """Start the command in a new process, for tests of signals, kills and exit codes under torchrun."""
        started = Started([str(a) for a in arguments], self._folder, env or {})
        self._started.append(started)
        return started

    def run(self, *arguments: object, env: Mapping[str, str] | None = None) -> Completed:
        """Run the command in this process."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return run_here(*arguments, env=env, folder=self._folder)

    def close(self) -> None:
        for started in self._started:
            if started.running():
                started.signal_group(signal.SIGKILL)
                started.wait()


@dataclass(frozen=True)
class Training:
    """A run directory and the command that starts and resumes it."""

    program: Program
    config: Path
    run: Path
    nproc: int

    def command(self, *overrides: str) -> list[str]:
        options = ["--nproc", str(self.nproc), "--run-dir", str(self.run), "--json"]
        return ["train", str(self.config), *overrides, *options]

    def start(self, *overrides: str) -> Started:
        return self.program.start(*self.command(*overrides))

    @property
    def status(self) -> dict[str, Any]:
        return read_status(self.run)

    def wait_for(self, started: Started, condition: Callable[[], Any], what: str) -> None:
        """Wait until the condition is true; fail if the attempt `started` ends before."""

        def reached() -> bool:
            result = bool(condition())
            assert result or started.running(), f"ended before {what}:\n{started.error}"
            return result

        eventually(reached, what)

    def wait_for_step(self, started: Started, step: int, after_attempt: int) -> None:
        """Wait until an attempt later than `after_attempt` has reached `step`."""

        def reached() -> bool:
            status = self.status
            return status.get("attempt", 0) > after_attempt and status.get("step", 0) >= step

        self.wait_for(started, reached, f"step {step}")

    def finish(self, *overrides: str) -> Completed:
        """Run the command to its end, in this process if the run has one process; fail unless it succeeds."""
        command = self.command(*overrides)
        alone = self.nproc == 1
        done = self.program.run(*command) if alone else self.program.start(*command).completed()
        assert done.code == 0, done.error
        return done

    def assert_gone(self) -> None:
        """Assert that no process of the run is left."""
        eventually(lambda: not processes_of(self.run), f"processes left: {processes_of(self.run)}", 30)


@dataclass(frozen=True)
class Outcome:
    """Outputs of a finished run that are equal in bit-identical runs."""

    model: bytes
    assignment: list[int]
    result: dict[str, Any]
    points: dict[tuple[str, int], Any]
    matchings: str


def outcome_of(run: Path) -> Outcome:
    """Read the outputs of a finished run; fail if a point is recorded twice."""
    from safetensors import safe_open

    with safe_open(run / "model.safetensors", framework="pt") as stored:
        names = list(stored.keys())
        assignment = stored.get_tensor("assignment").tolist() if "assignment" in names else []
    result = json.loads((run / "result.json").read_text())
    for key in ("images_per_second", "run_dir", "mlflow_run_id"):
        del result[key]
    points: dict[tuple[str, int], Any] = {}
    for line in (run / "events" / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        for name, value in event.get("v", {}).items():
            if not name.startswith(("time/", "memory/", "system/")):
                assert (name, event["step"]) not in points, "a point was recorded twice"
                points[name, event["step"]] = value
    log = run / "matchings.jsonl"
    matchings = log.read_text() if log.exists() else ""
    return Outcome((run / "model.safetensors").read_bytes(), assignment, result, points, matchings)


def assert_identical(run: Path, reference: Path) -> None:
    """Assert that two finished runs are bit-identical."""
    outcome, expected = outcome_of(run), outcome_of(reference)
    assert outcome.result == expected.result
    assert outcome.assignment == expected.assignment
    assert outcome.matchings == expected.matchings
    different = sorted(
        k
        for k in outcome.points.keys() | expected.points.keys()
        if outcome.points.get(k) != expected.points.get(k)
    )
    assert not different, f"{len(different)} points differ, for example {different[:5]}"
    assert outcome.model == expected.model


def copy_as_another_run(run: Path, target: Path, experiment: str) -> Path:
    """Copy a run directory with a new identity and experiment, so that the copy is another MLflow run."""
    shutil.copytree(run, target)
    identity = json.loads((target / "events/run.json").read_text())
    changed = {identity["run_uuid"]: uuid.uuid4().hex, f'"{identity["experiment"]}"': f'"{experiment}"'}
    for name in ("run.json", "events.jsonl"):
        text = (target / "events" / name).read_text()
        for old, new in changed.items():
            text = text.replace(old, new)
        (target / "events" / name).write_text(text)
    return target
