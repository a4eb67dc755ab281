"""A webhook receiver on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Receiver:
    """What a webhook has received.

    Attributes:
        codes: status codes of the next answers; 200 when there are none. None never answers.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.codes: list[int | None] = []
        self.url = ""
        self.closing = threading.Event()

    def events(self) -> list[str]:
        return [message["event"] for message in self.messages]


@contextmanager
def receiver(path: str = "/services/hook") -> Generator[Receiver]:
    """Serve a webhook at `Receiver.url`."""
    received = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.messages.append(json.loads(body))
            received.headers.append({key.lower(): value for key, value in self.headers.items()})
            received.paths.append(self.path)
            code = received.codes.pop(0) if received.codes else 200
            if code is None:
                received.closing.wait(60)
                return
            self.send_response(code)
            if code in (301, 302, 307):
                self.send_header("Location", f"{received.url}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    received.url = f"http://127.0.0.1:{server.server_address[1]}{path}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield received
    finally:
        received.closing.set()
        server.shutdown()
        server.server_close()
