"""MLflow's own server as a child process: for `dl2pa ui`, benchmarks and whoever wants one on this machine."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from dl2pa import envvars
from dl2pa.osutil import set_parent_death_signal
from dl2pa.redaction import redact

_START_SECONDS = 120
_STOP_SECONDS = 10


class ServerFailed(RuntimeError):
    """The server ended before it answered; the message holds the last of what it said."""


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens at now."""
    with socket.create_server((host, 0)) as free:
        return int(free.getsockname()[1])


class LocalServer:
    """``mlflow server`` on a store of this machine; it ends with this process, however that ends.

    Args:
        store: the backend store, for example ``sqlite:///runs/mlflow.db``; handed over in the environment, because
            a password in it would show in the list of processes.
        log: where it says what it says.
        artifacts: where artifacts of new experiments go that come through the server.
        names: by which others than this machine's programs reach it. Requests to any other name are refused: a page
            of the internet whose name resolves to this machine could else read everything.
    """

    def __init__(
        self, store: str, log: Path, artifacts: Path, host: str, port: int, names: Sequence[str] = ()
    ) -> None:
        self.uri = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        own = (f"{name}:{port}" for name in ("localhost", "127.0.0.1", host))
        allowed = dict.fromkeys([*own, *(form for name in names for form in (name, f"{name}:*"))])
        self._log = log
        self._command = [
            *(sys.executable, "-m", "mlflow", "server"),
            *("--host", host, "--port", str(port), "--workers", "1"),
            *("--artifacts-destination", str(artifacts)),
            *("--allowed-hosts", ",".join(allowed)),
            *("--cors-allowed-origins", ",".join(f"http://{name}" for name in allowed)),
        ]
        self._environment = {
            **os.environ,
            "MLFLOW_BACKEND_STORE_URI": store,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self._environment.pop(envvars.TRACKING_URI, None)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            ServerFailed: it does not.
        """
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
                preexec_fn=functools.partial(set_parent_death_signal, signal.SIGTERM),
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise ServerFailed(self._last_words())
            time.sleep(0.1)

    def wait(self) -> int:
        """Wait until it ends by itself; its exit code."""
        assert self.process is not None, "not started"
        return self.process.wait()

    def stop(self) -> None:
        """End it and its workers."""
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        except ProcessLookupError:
            self.process.wait()
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        return redact(" ".join(said[-3:]))[-500:] or "it said nothing"
