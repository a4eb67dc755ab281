"""Data, runs and servers shared by the integration tests."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from dl2pa.tracking import Tracker
from support.runs import SIDE, Program, Training, config_with
from support.servers import Database, MlflowServer, TrackingServer, free_port


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The handwritten digits as JPEG folders, 1,438 training and 359 validation images; not to be changed."""
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
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Training]:
    """The uninterrupted run of a changed small configuration, trained once: ``undisturbed(nproc, changes)``."""
    trained: dict[str, Training] = {}

    def get(nproc: int = 1, changes: Mapping[str, Any] | None = None) -> Training:
        key = f"{nproc} {changes}"
        if key not in trained:
            folder = tmp_path_factory.mktemp("undisturbed")
            program = Program(folder)
            training = Training(program, config_with(folder, digits, changes), folder / "run", nproc)
            try:
                training.finish()
            finally:
                program.close()
            trained[key] = training
        return trained[key]

    return get


@pytest.fixture(scope="session")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned the digits, with its figures, tracked to a server that was down the whole time."""
    folder = tmp_path_factory.mktemp("trained")
    changes = {
        "train": {"epochs": 8, "log_every_steps": 10},
        "checkpoint": {"every_steps": 0},
        "tracking": {"uri": f"http://127.0.0.1:{free_port()}", "experiment": "down", "figures": True},
    }
    training = Training(Program(folder), config_with(folder, digits, changes), folder / "run", 1)
    with pytest.MonkeyPatch.context() as patch:
        finish = Tracker.finish
        patch.setattr(Tracker, "finish", lambda self, status: finish(self, status, drain_seconds=1))
        done = training.finish()
    assert "dl2pa sync" in done.error, "the end of the log says that something is left to send"
    return training.run


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One MLflow server for all tests of the group "servers"; a test that kills it starts it again."""
    pytest.importorskip("mlflow")
    server = MlflowServer(tmp_path_factory.mktemp("a server; with 'quotes'"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    pytest.importorskip(
        "psycopg", reason="psycopg is not installed: pip install -c constraints.txt -e '.[server]'"
    )
    running = Database(tmp_path_factory.mktemp("a database"))
    yield running
    running.remove()


@pytest.fixture(scope="session")
def tracking_server(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    pytest.importorskip("mlflow")
    server = TrackingServer(tmp_path_factory.mktemp("a server"), database)
    try:
        server.start()
        yield server
    finally:
        server.kill(signal.SIGTERM)
