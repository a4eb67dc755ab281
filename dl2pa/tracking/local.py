"""MLflow server as a child process, for `dl2pa ui`, benchmarks and tests."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
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
    """The server ended before it answered; the message contains the end of its log."""


class LocalServer:
    """``mlflow server`` on a local store; it ends when this process ends, also if this process is killed.

    Args:
        store: the backend store, for example ``sqlite:///runs/mlflow.db``; passed in the environment, because the
            process list would show a password in it.
        log: log file of the server.
        artifacts: folder for artifacts that are uploaded through the server.
        names: host names under which other machines reach the server. Requests to other names are rejected, which
            prevents DNS rebinding by web pages.
    """

    def __init__(
        self, store: str, log: Path, artifacts: Path, host: str, port: int, names: Sequence[str] = ()
    ) -> None:
        self.uri = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        local = (f"{name}:{port}" for name in ("localhost", "127.0.0.1", host))
        allowed = dict.fromkeys([*local, *(form for name in names for form in (name, f"{name}:*"))])
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
            "PYTHONSAFEPATH": "1",  # do not import from the working directory
            "MLFLOW_BACKEND_STORE_URI": store,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self._environment.pop(envvars.TRACKING_URI, None)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            ServerFailed: it ends or does not answer in time.
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
                raise ServerFailed(self._end_of_log())
            time.sleep(0.1)

    def wait(self) -> int:
        """Wait until the server ends; return its exit code."""
        assert self.process is not None, "not started"
        return self.process.wait()

    def stop(self) -> None:
        """End the server and its workers."""
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

    def _end_of_log(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        texts = [line.strip() for line in lines if line.strip()]
        return redact(" ".join(texts[-3:]))[-500:] or "its log is empty"
