"""Real runs of the program: started as people start it, watched from outside, killed, compared."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
DEADLINE_S = 480.0
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextlib.contextmanager
def serving(folder: Path, health: str, command: list[str], **environment: str) -> Iterator[None]:
    """A server that runs in `folder` while the block does, from the moment it answers at `health`."""
    log = folder / f"{command[2]}-{command[3]}.log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=file,
            cwd=folder,
            start_new_session=True,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", **environment},
        )

    def healthy() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(health, timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    try:
        eventually(healthy, f"{health} answers")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def sqlite_server(folder: Path) -> Iterator[str]:
    """A real MLflow server on SQLite; its address."""
    uri = f"http://127.0.0.1:{free_port()}"
    command = [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", f"sqlite:///{folder / 'server.db'}"),
        *("--artifacts-destination", str(folder / "artifacts")),
        *("--host", "127.0.0.1", "--port", uri.rpartition(":")[2], "--workers", "1"),
    ]
    with serving(folder, f"{uri}/health", command, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"):
        yield uri


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
            if not name.startswith(("time/", "memory/", "system/")):
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


class Database:
    """A PostgreSQL of the tests' own; `variables` are libpq's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._call("up")
        words = shlex.split((folder / "env").read_text().removeprefix("export "))
        self.variables = dict(word.split("=", 1) for word in words)

    def kill(self) -> None:
        self._call("kill")

    def start(self) -> None:
        self._call("start")

    def remove(self) -> None:
        self._call("down")

    def _call(self, verb: str) -> None:
        command = [str(REPOSITORY / "docker/testpostgres"), verb, str(self._folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 3:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'dl2pa[server]'")
    made = Database(tmp_path_factory.mktemp("a database"))
    yield made
    made.remove()


class TrackingServer:
    """docker/tracking-server on that database, everyone signing in, with this interpreter's MLflow."""

    password = "a password; with 'quotes' & a % sign"

    def __init__(self, folder: Path, database: Database) -> None:
        (folder / "bin").mkdir()
        (folder / "bin/mlflow").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlflow "$@"\n')
        (folder / "bin/mlflow").chmod(0o755)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        self.address = f"http://127.0.0.1:{port}"
        self.artifacts = folder / "artifacts"
        self._log = folder / "log"
        self._command = [str(REPOSITORY / "docker/tracking-server"), "--host", "127.0.0.1", "--port", port]
        self._environment = {
            **os.environ,
            **database.variables,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "ARTIFACTS": str(self.artifacts),
            "TRACKING_HOSTS": "mlflow.example",
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
            "MLFLOW_AUTH_CONFIG_PATH": str(REPOSITORY / "docker/basic-auth.ini"),
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )

        def healthy() -> bool:
            assert process.poll() is None, self._log.read_text()[-3000:]
            return self.get("/health")[0] == 200

        eventually(healthy, "the tracking server is healthy", 400)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, number)
            self._process.wait(60)
            self._process = None

    def request(self, path: str, **options: Any) -> urllib.request.Request:
        """A request of the administrator."""
        credentials = base64.b64encode(f"admin:{self.password}".encode()).decode()
        headers = {"Authorization": f"Basic {credentials}", "Content-Type": "application/json"}
        return urllib.request.Request(f"{self.address}{path}", headers=headers, **options)

    def get(self, path: str, host: str | None = None, signed_in: bool = True) -> tuple[int, Any]:
        """Status and JSON of an answer; 0 where there is none."""
        request = self.request(path)
        if not signed_in:
            request.remove_header("Authorization")
        if host:
            request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                body = answer.read()
                return answer.status, json.loads(body) if body.startswith(b"{") else body
        except urllib.error.HTTPError as error:
            return error.code, None
        except OSError:
            return 0, None


@pytest.fixture(scope="session")
def tracking_server(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    pytest.importorskip("mlflow")
    server = TrackingServer(tmp_path_factory.mktemp("a server"), database)
    try:
        server.start()
        yield server
    finally:
        server.kill(signal.SIGTERM)


@pytest.fixture(scope="session")
def helpers() -> Any:
    """The functions and classes of this file, for test modules that cannot import it."""
    return SimpleNamespace(**globals())
