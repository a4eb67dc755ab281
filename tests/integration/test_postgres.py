"""The tracking server of docker/compose.yaml, started as there on a real PostgreSQL, and a run that records there."""

from __future__ import annotations

import base64
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow")
psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'dl2pa[server]'")

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
PASSWORD = "a password; with 'quotes' & a % sign"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """libpq's variables for a PostgreSQL of this test's own."""
    folder = tmp_path_factory.mktemp("a database")
    tool = str(REPOSITORY / "docker/testpostgres")
    done = subprocess.run([tool, "up", str(folder)], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    try:
        words = shlex.split((folder / "env").read_text().removeprefix("export "))
        yield dict(word.split("=", 1) for word in words)
    finally:
        subprocess.run([tool, "down", str(folder)], check=True)


@dataclass(frozen=True)
class Server:
    """docker/tracking-server, with this interpreter's MLflow."""

    address: str
    artifacts: Path

    def get(self, path: str, host: str | None = None, signed_in: bool = True) -> tuple[int, Any]:
        """Status and JSON of an answer; 0 where there is none."""
        request = urllib.request.Request(f"{self.address}{path}", headers={"Host": host} if host else {})
        if signed_in:
            credentials = base64.b64encode(f"admin:{PASSWORD}".encode()).decode()
            request.add_header("Authorization", f"Basic {credentials}")
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                body = answer.read()
                return answer.status, json.loads(body) if body.startswith(b"{") else body
        except urllib.error.HTTPError as error:
            return error.code, None
        except OSError:
            return 0, None


@pytest.fixture(scope="module")
def server(
    database: dict[str, str], tmp_path_factory: pytest.TempPathFactory, helpers: Any
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("a server")
    programs = folder / "bin"
    programs.mkdir()
    (programs / "mlflow").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlflow "$@"\n')
    (programs / "mlflow").chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = Server(f"http://127.0.0.1:{port}", folder / "artifacts")
    command = [str(REPOSITORY / "docker/tracking-server"), "--host", "127.0.0.1", "--port", str(port)]
    environment = {
        **os.environ,
        **database,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "ARTIFACTS": str(started.artifacts),
        "TRACKING_HOSTS": "mlflow.example",
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_AUTH_CONFIG_PATH": str(REPOSITORY / "docker/basic-auth.ini"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:

        def healthy() -> bool:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            return started.get("/health")[0] == 200

        helpers.eventually(healthy, "the tracking server is healthy")
        yield started
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.mark.parametrize(
    ("host", "signed_in", "status"),
    [
        (None, True, 200),
        (None, False, 401),
        ("tracking:5000", True, 200),
        ("172.18.0.3:5000", True, 200),
        ("mlflow.example", True, 200),
        ("172.32.0.3:5000", True, 403),
        ("stranger.example", True, 403),
    ],
)
def test_who_is_let_in(server: Server, host: str | None, signed_in: bool, status: int) -> None:
    assert server.get("/api/2.0/mlflow/experiments/search?max_results=1", host, signed_in)[0] == status


def test_a_training_records_itself_in_postgresql(
    server: Server, database: dict[str, str], train: Callable[..., Any], helpers: Any
) -> None:
    training = train(changes={"tracking": {"uri": server.address, "experiment": "postgres"}})
    signed_in = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    started = training.program.run(*training.command(), env=signed_in)
    assert started.process.returncode == 0, started.error

    _, answer = server.get(f"/api/2.0/mlflow/runs/get?run_id={started.result['mlflow_run_id']}")
    assert answer["run"]["info"]["status"] == "FINISHED"
    last = {metric["key"]: metric["value"] for metric in answer["run"]["data"]["metrics"]}
    assert last["val/top1"] == started.result["top1_last"]

    names = {
        "host": "PGHOST",
        "port": "PGPORT",
        "user": "PGUSER",
        "password": "PGPASSWORD",
        "dbname": "PGDATABASE",
    }
    with psycopg.connect(**{ours: database[theirs] for ours, theirs in names.items()}) as connection:
        rows = connection.execute(
            "select key, step, value from metrics where run_uuid = %s", [answer["run"]["info"]["run_id"]]
        ).fetchall()
    stored = {(key, step): value for key, step, value in rows if not key.startswith("time/")}
    assert stored == pytest.approx(helpers.outcome_of(training.run).points)
    assert list(server.artifacts.rglob("model.safetensors"))
