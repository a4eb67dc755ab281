"""Servers that refuse the events are told from servers that do not answer."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dl2pa.tracking import Tracker, sync

Serve = Callable[[int, str], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server that gives one answer to every request; returns its URI."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(status: int, text: str) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None: ...

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def spooled(run: Path) -> Path:
    tracker = Tracker(run, enabled=True, uri=None, experiment="exp", run_name="name", attempt=1)
    tracker.start({}, {})
    tracker.finish("finished")
    return run


@pytest.mark.parametrize(
    ("status", "text", "reason", "remedy"),
    [
        (404, "<html>not here</html>", "404", "Correct tracking.uri"),
        (200, "<html>welcome</html>", "valid JSON", "Correct tracking.uri"),
        (401, "who are you", "401", "MLFLOW_TRACKING_TOKEN"),
        (403, '{"error_code": "PERMISSION_DENIED", "message": "read only"}', "read only", "permission"),
        (400, '{"error_code": "INVALID_PARAMETER_VALUE", "message": "bad name"}', "bad name", "Change"),
    ],
)
def test_answers_that_refuse_are_reported_with_a_remedy(
    status: int, text: str, reason: str, remedy: str, serve: Serve, tmp_path: Path
) -> None:
    report = sync(spooled(tmp_path), serve(status, text))
    assert report.error is not None
    assert report.error.startswith("the server refuses the events")
    assert reason in report.error and remedy in report.error
    assert (report.events_sent, report.left) == (0, 2)


def test_an_overloaded_server_is_not_called_refusing(serve: Serve, tmp_path: Path) -> None:
    report = sync(spooled(tmp_path), serve(503, "busy"), tries=1)
    assert report.error is not None and "refuses" not in report.error and "503" in report.error


def test_training_warns_once_that_the_server_refuses(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = serve(401, "who are you")
    tracker = Tracker(
        tmp_path, enabled=True, uri=uri, experiment="exp", run_name="name", attempt=1, drain_seconds=2
    )
    tracker.start({}, {})
    tracker.finish("finished")
    messages = [
        record.getMessage() for record in caplog.records if "refuses the events" in record.getMessage()
    ]
    assert len(messages) == 1 and "MLFLOW_TRACKING_TOKEN" in messages[0]
    assert "cannot be reached" not in caplog.text


def test_a_file_that_is_not_a_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database at all" * 100)
    report = sync(spooled(tmp_path / "run"), f"sqlite:///{tmp_path}/mlflow.db")
    assert report.error is not None and "Name another file in tracking.uri" in report.error
