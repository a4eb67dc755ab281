"""Real servers: MLflow on SQLite, PostgreSQL, and the container's tracking server."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from support.paths import REPOSITORY
from support.waiting import eventually


def free_port() -> int:
    """A port on which nobody listens, nor on the next one, outside the range that the kernel gives to connections."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    high = low if low > 12_000 else 65_000
    while True:
        port = 10_000 + secrets.randbelow(high - 10_001)
        with contextlib.suppress(OSError):
            for each in (port, port + 1):
                socket.create_server(("127.0.0.1", each)).close()
            return port


def is_healthy(address: str) -> bool:
    """Whether an HTTP server answers with status 200."""
    try:
        with urllib.request.urlopen(address, timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def serving(folder: Path, health: str, command: list[str], **environment: str) -> Generator[None]:
    """Run a server in `folder` during the context, which starts when `health` answers."""
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
        return is_healthy(health)

    try:
        eventually(healthy, f"{health} answers")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class MlflowServer:
    """``mlflow server`` on SQLite; it can be killed and started again on the same port and data."""

    def __init__(self, folder: Path) -> None:
        self.database = folder / "server.db"
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server"),
            *("--backend-store-uri", f"sqlite:///{self.database}"),
            *("--artifacts-destination", str(self._folder / "artifacts")),
            *("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"),
        ]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self._folder,
                start_new_session=True,
                env={**os.environ, **quiet},
            )

        def healthy() -> bool:
            assert process.poll() is None, (self._folder / "server.log").read_text()
            return is_healthy(f"{self.uri}/health")

        eventually(healthy, f"{self.uri} answers")

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


class Database:
    """A PostgreSQL server for the tests; `variables` are libpq's environment variables."""

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


class TrackingServer:
    """docker/tracking-server on a PostgreSQL database, with authentication, run by this interpreter's MLflow."""

    password = "a password; with 'quotes' & a % sign"

    def __init__(self, folder: Path, database: Database) -> None:
        (folder / "bin").mkdir()
        (folder / "bin/mlflow").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlflow "$@"\n')
        (folder / "bin/mlflow").chmod(0o755)
        port = str(free_port())
        self.address = f"http://127.0.0.1:{port}"
        self.artifacts = folder / "artifacts"
        self._log = folder / "log"
        self._command = [str(REPOSITORY / "docker/tracking-server"), "--host", "127.0.0.1", "--port", port]
        self._command += ["--workers", "1"]
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
        """Send a request with the credentials of the administrator."""
        credentials = base64.b64encode(f"admin:{self.password}".encode()).decode()
        headers = {"Authorization": f"Basic {credentials}", "Content-Type": "application/json"}
        return urllib.request.Request(f"{self.address}{path}", headers=headers, **options)

    def get(self, path: str, host: str | None = None, signed_in: bool = True) -> tuple[int, Any]:
        """Return status and JSON of a response; 0 and None without a response."""
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
