"""Real runs of the program: started as people start it, watched from outside, killed, compared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE_S = 120.0
SIDE = 16

# Small enough for a step in milliseconds, with every part that a resume has to carry: a momentum, a statistic,
# matchings early and often, a window of metrics that spans several steps' checkpoints.
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
    "train": {"epochs": 3, "batch_size": 48, "log_every": 1},
    "checkpoint": {"every_steps": 7},
    "tracking": {"enabled": True, "uri": "none"},
    "launch": {"device": "cpu", "threads": 1},
}


def eventually(condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> Any:
    """The first truthy value of `condition`; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.002)
    return value


def read_status(run: Path) -> dict[str, Any]:
    try:
        return json.loads((run / "status.json").read_text())
    except FileNotFoundError:
        return {}


@dataclass(frozen=True)
class Process:
    """One process of a run, found by the run directory on its command line."""

    pid: int
    kind: str
    rank: int | None


def processes_of(run: Path) -> list[Process]:
    """Every living process whose command line names the run directory."""
    found: list[Process] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if str(run).encode() not in words or int(folder.name) == os.getpid():
                continue
            variables = dict(
                pair.split(b"=", 1) for pair in (folder / "environ").read_bytes().split(b"\0") if b"=" in pair
            )
        except (OSError, ValueError):
            continue
        rank = int(variables[b"RANK"]) if b"RANK" in variables else None
        kind = "torchrun" if b"launcher.agent" in words else "launcher" if rank is None else "rank"
        found.append(Process(int(folder.name), kind, rank))
    return found


class Started:
    """A command of the program under way, leading a process group of its own."""

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

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object on the last line of standard output."""
        return json.loads(self.output.splitlines()[-1])

    def running(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float = DEADLINE_S) -> int:
        return self.process.wait(seconds)

    def signal_group(self, number: int) -> None:
        os.killpg(self.pid, number)


class Program:
    """Starts commands, remembers them, and leaves none behind."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._started: list[Started] = []

    def start(self, *arguments: object, env: Mapping[str, str] | None = None) -> Started:
        started = Started([str(a) for a in arguments], self.scratch / "commands", env or {})
        self._started.append(started)
        return started

    def run(self, *arguments: object, env: Mapping[str, str] | None = None) -> Started:
        """Start and wait for the end."""
        started = self.start(*arguments, env=env)
        started.wait()
        return started

    def close(self) -> None:
        for started in self._started:
            if started.running():
                started.signal_group(signal.SIGKILL)
                started.wait()


@dataclass(frozen=True)
class Training:
    """One run directory, and the command that starts and resumes it."""

    program: Program
    config: Path
    run: Path
    nproc: int

    def start(self, *overrides: str) -> Started:
        return self.program.start(*self.command(*overrides))

    def command(self, *overrides: str) -> list[str]:
        places = ["--nproc", str(self.nproc), "--run-dir", str(self.run), "--json"]
        return ["train", str(self.config), *overrides, *places]

    @property
    def status(self) -> dict[str, Any]:
        return read_status(self.run)

    def wait_for(self, started: Started, condition: Callable[[], Any], what: str) -> None:
        """Wait until the attempt `started` fulfils a condition; fails if it ends before."""

        def reached() -> bool:
            met = bool(condition())
            assert met or started.running(), f"ended before {what}:\n{started.error}"
            return met

        eventually(reached, what)

    def wait_for_step(self, started: Started, step: int, after_attempt: int) -> None:
        """Wait until an attempt later than `after_attempt` has done `step` steps."""

        def reached() -> bool:
            status = self.status
            return status.get("attempt", 0) > after_attempt and status.get("step", 0) >= step

        self.wait_for(started, reached, f"step {step}")

    def finish(self, *overrides: str, limit: int = 3) -> Started:
        """Repeat the command until it has finished."""
        for _ in range(limit):
            started = self.start(*overrides)
            code = started.wait()
            if code == 0:
                return started
            assert code in (1, 75), started.error
        raise AssertionError(f"not finished after {limit} attempts:\n{started.error}")

    def assert_gone(self) -> None:
        """Nothing of the run is left running."""
        eventually(lambda: not processes_of(self.run), f"processes left: {processes_of(self.run)}", 30)


@dataclass(frozen=True)
class Outcome:
    """Everything that two runs must have in common to be the same run bit for bit."""

    model: bytes
    assignment: list[int]
    result: dict[str, Any]
    points: dict[tuple[str, int], Any]
    matchings: str


def outcome_of(run: Path) -> Outcome:
    """What a finished run left; fails if it recorded a point twice."""
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
            if not name.startswith("time/"):
                assert (name, event["step"]) not in points, "a point recorded twice"
                points[name, event["step"]] = value
    log = run / "matchings.jsonl"
    matchings = log.read_text() if log.exists() else ""
    return Outcome((run / "model.safetensors").read_bytes(), assignment, result, points, matchings)


def assert_identical(run: Path, reference: Path) -> None:
    """Two finished runs agree bit for bit."""
    ours, theirs = outcome_of(run), outcome_of(reference)
    assert ours.result == theirs.result
    assert ours.assignment == theirs.assignment
    assert ours.matchings == theirs.matchings
    different = sorted(
        k for k in ours.points.keys() | theirs.points.keys() if ours.points.get(k) != theirs.points.get(k)
    )
    assert not different, f"{len(different)} points differ, for example {different[:5]}"
    assert ours.model == theirs.model


def config_with(folder: Path, root: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """A configuration file that builds on the small one."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base.yaml"
    base.write_text(yaml.safe_dump({**BASE, "data": {**BASE["data"], "root": str(root)}}))
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump({"base": "base.yaml", **(changes or {})}))
    return file


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The handwritten digits as JPEG folders, 1,438 and 359 images; not to be changed."""
    from pipelines.datasets.digits import write_digits

    return write_digits(tmp_path_factory.mktemp("data") / "digits", size=SIDE)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    running = Program(tmp_path)
    yield running
    running.close()


@pytest.fixture
def train(program: Program, digits: Path, tmp_path: Path) -> Callable[..., Training]:
    """Make a run directory below the test's folder: ``train(nproc, name, {section: {key: value}})``."""

    def make(nproc: int = 1, name: str = "run", changes: Mapping[str, Any] | None = None) -> Training:
        config = config_with(tmp_path / f"config-{name}", digits, changes)
        return Training(program, config, tmp_path / "runs" / name, nproc)

    return make


@pytest.fixture(scope="session")
def reference(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The run directory of an uninterrupted run of the small configuration with so many processes."""
    made: dict[int, Path] = {}

    def get(nproc: int) -> Path:
        if nproc not in made:
            folder = tmp_path_factory.mktemp(f"reference-{nproc}")
            program = Program(folder)
            training = Training(program, config_with(folder, digits), folder / "run", nproc)
            started = training.start()
            try:
                assert started.wait() == 0, started.error
            finally:
                program.close()
            made[nproc] = training.run
        return made[nproc]

    return get


@pytest.fixture(scope="session")
def helpers() -> Any:
    """The functions and classes of this file, for test modules that cannot import it."""
    return SimpleNamespace(**globals())
