"""A real S3 server (moto) on loopback, in a process of its own, and a way to interrupt the connection to it."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.servers import free_port, is_healthy
from support.waiting import eventually

BUCKET = "bucket"


class ObjectServer:
    """The server and its variables of the environment."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        return self.variables(self.port)

    @staticmethod
    def variables(port: int) -> dict[str, str]:
        """Variables of the environment for a server at a port of loopback."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "AKIAEXAMPLEOFDL2PA12",
            "AWS_SECRET_ACCESS_KEY": "the/secret+of+dl2pa+tests",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nonexistent/config",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent/credentials",
        }

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        eventually(lambda: is_healthy(f"http://127.0.0.1:{self.port}/moto-api/"), "the server answers", 60)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @contextlib.contextmanager
    def suspended(self) -> Generator[None]:
        """The server accepts connections and does not answer."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    @functools.cache  # noqa: B019  # a client takes long to create
    def client(self) -> Any:
        import boto3

        env = self.environment
        return boto3.client(
            "s3",
            endpoint_url=env["AWS_ENDPOINT_URL"],
            aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        )

    def upload(self, folder: Path, prefix: str, leave_out: tuple[str, ...] = ()) -> str:
        """Copy the files of a folder to the bucket; return their address."""
        client = self.client()
        client.create_bucket(Bucket=BUCKET)
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            if file.name not in leave_out:
                client.upload_file(str(file), BUCKET, f"{prefix}/{file.relative_to(folder)}")
        return f"s3://{BUCKET}/{prefix}"


def object_server() -> Iterator[ObjectServer]:
    """For a fixture: the server, or a skip without its package."""
    pytest.importorskip("moto", reason="moto is not installed: pip install -c constraints.txt -e '.[dev]'")
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -c constraints.txt -e '.[s3]'")
    server = ObjectServer()
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    yield server
    server.close()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


class FaultyConnection:
    """A proxy in front of the server, whose connections can fail.

    Attributes:
        fault: `busy` answers 503, `cut` ends an answer in its middle, `refused` closes; None passes everything.
        remaining: number of connections that the fault still affects.
    """

    def __init__(self, server: ObjectServer) -> None:
        self._target = server.port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.fault: str | None = None
        self.remaining = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def fail(self, fault: str, count: int) -> None:
        self.fault, self.remaining = fault, count

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                fault = self.fault if self.remaining > 0 else None
                self.remaining -= 1
                threading.Thread(target=self._serve, args=(client, fault), daemon=True).start()

    def _serve(self, client: socket.socket, fault: str | None) -> None:
        with client, contextlib.suppress(OSError):
            if fault == "refused":
                return
            request = client.recv(1 << 16)
            if fault == "busy":
                body = b"<Error><Code>SlowDown</Code></Error>"
                client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                return
            with socket.create_connection(("127.0.0.1", self._target)) as target:
                target.sendall(request)
                passed = 0
                while data := target.recv(1 << 16):
                    if fault == "cut" and passed + len(data) > 2000:
                        client.sendall(data[: 2000 - passed])
                        return
                    client.sendall(data)
                    passed += len(data)
