import json
import logging
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from dl2pa.errors import UserError
from dl2pa.osutil import read_json, write_json
from dl2pa.rundir import RunDirectory
from dl2pa.tracking import Tracker, local_uri, sync
from dl2pa.tracking.delivery import Delivery
from dl2pa.tracking.filelock import Busy, exclusive_lock
from dl2pa.tracking.imports import importing
from dl2pa.tracking.sender import Sender
from dl2pa.tracking.sync import close_killed, recorded_server, resolve_uri
from dl2pa.tracking.sync_state import SyncState, last_server, load_sync_state, save_sync_state


def tracker(run: Path, **changes: Any) -> Tracker:
    options: dict[str, Any] = {
        "enabled": True,
        "uri": None,
        "experiment": "exp",
        "run_name": "name",
        "attempt": 1,
        "drain_seconds": 0.5,
    }
    return Tracker(run, **{**options, **changes})


def kinds(run: Path) -> list[str]:
    return [json.loads(line)["e"] for line in RunDirectory(run).spool.read_text().splitlines()]


def test_import_loads_neither_mlflow_nor_torch() -> None:
    code = "import dl2pa.tracking, sys; assert not {'mlflow', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    )


def test_disabled_tracker_writes_nothing(tmp_path: Path) -> None:
    off = tracker(tmp_path / "run", enabled=False, uri="http://nowhere")
    off.start({"lr": 1}, {})
    off.metrics(1, {"loss": 1.0})
    off.artifact(tmp_path / "x")
    off.tags({"a": "b"})
    off.finish("finished")
    assert (off.run_uuid, off.mlflow_run_id) == (None, None)
    assert not (tmp_path / "run").exists()


def test_a_spool_only_run_logs_how_to_send_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    on = tracker(tmp_path)
    on.start({"lr": 0.1}, {"method": "dl2pa"})
    on.metrics(1, {"loss": 1.0})
    on.artifact(tmp_path / "curves.png", "plots")
    on.finish("stopped")
    assert kinds(tmp_path) == ["start", "metrics", "artifact", "end"]
    assert on.run_uuid == read_json(tmp_path / "events" / "run.json")["run_uuid"]
    assert on.mlflow_run_id is None
    assert f"dl2pa sync {tmp_path}" in caplog.text


def test_no_method_raises_on_invalid_arguments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nonsense: Any = object()
    on = tracker(tmp_path)
    for _ in range(2):
        on.start(nonsense, nonsense)
        on.metrics(nonsense, nonsense)
        on.artifact(Path("/etc/hostname"))
        on.tags(nonsense)
    on.finish("finished")
    on.metrics(1, {"after": 1.0})
    assert kinds(tmp_path) == ["end"]
    assert len([r for r in caplog.records if "tracking failed in" in r.message]) == 4


def test_a_full_disk_raises_nothing(tmp_path: Path) -> None:
    on = tracker(tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        on.start({"lr": 0.1}, {})
        on.metrics(1, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    on.finish("finished")
    first, _, last = (
        json.loads(line) for line in RunDirectory(tmp_path / "run").spool.read_text().splitlines()
    )
    assert (first["e"], first["run"]["run_uuid"]) == ("start", on.run_uuid)
    assert (last["e"], last["dropped"]) == ("end", 0)


def test_a_hanging_server_delays_finish_by_the_drain_time_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        on = tracker(tmp_path, uri=f"http://me:s3cret@127.0.0.1:{port}", drain_seconds=1)
        on.start({"lr": 0.1}, {})
        connection, _ = silent.accept()
        began = time.monotonic()
        on.metrics(1, {"loss": 1.0})
        on.finish("finished")
        assert time.monotonic() - began < 60, "MLflow waits for minutes"
        connection.close()
    assert on.mlflow_run_id is None
    assert f"3 events were not sent to MLflow; `dl2pa sync {tmp_path}` sends them" in caplog.text
    for file in (tmp_path / "events").iterdir():
        # The sender may be removing the lock.
        assert file.suffix == ".lock" or "s3cret" not in file.read_text()


def test_refused_connections_are_reported_once_without_secrets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    on = tracker(tmp_path, uri=f"http://me:s3cret@127.0.0.1:{port}", drain_seconds=3)
    on.start({}, {})
    on.finish("failed")
    assert len([r for r in caplog.records if "cannot be reached" in r.message]) == 1
    assert "s3cret" not in caplog.text
    report = sync(tmp_path, f"http://me:s3cret@127.0.0.1:{port}", tries=1)
    assert (report.run_id, report.events_sent, report.left) == (None, 0, 2)
    assert report.error is not None and "s3cret" not in f"{report}"


class FlakyDelivery:
    """Fails `failures` times, then succeeds."""

    uri = "http://server"
    run_id = "id"
    run_dir = Path("run")

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls = 0

    def send(self, *, with_pending: bool, halt: Callable[[], bool]) -> None:
        self.calls += 1
        if self.calls <= self.failures:
            raise ConnectionError("down")

    def is_done(self, *, with_pending: bool) -> bool:
        return self.calls > self.failures


def test_the_sender_backs_off_to_a_minute_and_resets(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    delivery: Any = FlakyDelivery(failures=8)
    sender = Sender(delivery)
    pauses: list[float] = []

    class Impatient(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout or 0)
            if len(pauses) == 10:
                self.set()
            return self.is_set()

    monkeypatch.setattr(sender, "_finishing", Impatient())
    sender.start()
    sender.join(5)
    assert not sender.is_alive()
    for failures, pause in enumerate(pauses[:8]):
        longest = min(60, 2**failures)
        assert 0.8 * longest <= pause <= longest
    assert pauses[8:] == [1.0, 1.0]
    assert [r.message.split()[3:5] for r in caplog.records] == [["cannot", "be"], ["answers", "again"]]


def test_the_lock_is_exclusive_and_not_kept_by_a_forked_child(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    ready, done = os.pipe(), os.pipe()
    with exclusive_lock(path):
        with pytest.raises(Busy), exclusive_lock(path):
            pass
        child = os.fork()
        if child == 0:
            os.write(ready[1], b".")
            os.read(done[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    assert not path.exists()
    with exclusive_lock(path):
        pass
    os.write(done[1], b".")
    assert os.waitpid(child, 0)[1] == 0


def test_fork_waits_for_the_import_of_mlflow() -> None:
    started, forked = threading.Event(), threading.Event()

    def slow_import() -> None:
        with importing():
            started.set()
            assert not forked.wait(0.2)

    thread = threading.Thread(target=slow_import)
    thread.start()
    started.wait()
    child = os.fork()
    if child == 0:
        with importing():
            os._exit(0)
    forked.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_delivery_waits_for_the_process_that_is_sending(tmp_path: Path) -> None:
    on = tracker(tmp_path)
    on.start({}, {})
    on.finish("finished")
    with exclusive_lock(tmp_path / "events" / "mlflow.json.lock"):
        with pytest.raises(Busy):
            Delivery(tmp_path, "http://127.0.0.1:1").send(with_pending=True)
        report = sync(tmp_path, "http://127.0.0.1:1", tries=1)
    assert report.error == "another process is sending this run"
    assert report.left == 2


def test_the_sync_state_is_kept_per_server_without_credentials(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    save_sync_state(tmp_path, "http://me:pw@one", SyncState("id1", 5))
    save_sync_state(tmp_path, "http://two", SyncState("id2", 7, pending_artifacts=[3]))
    save_sync_state(tmp_path, "http://me:pw@one", SyncState("id1", 9))
    assert load_sync_state(tmp_path, "http://me:other@one") == SyncState("id1", 9)
    assert load_sync_state(tmp_path, "http://two") == SyncState("id2", 7, pending_artifacts=[3])
    assert load_sync_state(tmp_path, "http://three") == SyncState()
    assert last_server(tmp_path) == "http://***@one"
    (tmp_path / "events" / "mlflow.json").write_text("{torn")
    assert load_sync_state(tmp_path, "http://two") == SyncState()


def test_write_json_leaves_the_old_file_when_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"a": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, before[1]))
    try:
        with pytest.raises(OSError):
            write_json(path, {"a": "much more"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_run_gets_one_end_event(tmp_path: Path) -> None:
    tracker(tmp_path).start({}, {})
    with RunDirectory(tmp_path).spool.open("ab") as file:
        file.write(b'{"e":"metrics","t":123,"a":1,"step":0,"v":{"loss":1.0}}\n{"e":"met')
    assert close_killed(tmp_path)
    assert not close_killed(tmp_path)
    last = json.loads(RunDirectory(tmp_path).spool.read_text().splitlines()[-1])
    assert (last["e"], last["status"], last["t"], last["a"]) == ("end", "killed", 123, 1)


def test_sync_errors_name_the_missing_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="no tracking events"):
        sync(tmp_path)
    tracker(tmp_path).start({}, {})
    with pytest.raises(UserError, match="--uri"):
        sync(tmp_path)
    save_sync_state(tmp_path, "http://me:pw@host", SyncState("id"))
    with pytest.raises(UserError, match="credentials"):
        sync(tmp_path)


def test_a_run_belongs_to_the_server_that_it_was_sent_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration lacks the server if MLFLOW_TRACKING_URI named it in training."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DL2PA_SUPERVISED", raising=False)
    run = tmp_path / "run"
    run.mkdir()
    tracker(run).start({}, {})
    assert recorded_server(run, None) == local_uri(tmp_path)
    save_sync_state(run, "sqlite:////elsewhere/mlflow.db", SyncState("id"))
    assert recorded_server(run, None) == local_uri(tmp_path), "the store moves with the folder"
    save_sync_state(run, "http://host:5000", SyncState("id"))
    assert resolve_uri(run, None, recorded_server(run, None)) == "http://host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other:5000")
    assert resolve_uri(run, None, recorded_server(run, None)) == "http://host:5000"
    assert recorded_server(run, "http://configured:5000") == "http://configured:5000"
    assert resolve_uri(run, "http://named:5000", recorded_server(run, None)) == "http://named:5000"


def test_local_uri_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_uri(Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_a_sender_that_cannot_start_leaves_the_events_to_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(sender: Sender) -> NoReturn:
        raise RuntimeError("can't start new thread")

    caplog.set_level("INFO")
    monkeypatch.setattr(Sender, "start", start)
    monkeypatch.setattr(
        Sender, "finish", lambda sender, seconds: pytest.fail("waits for a thread that never ran")
    )
    on = tracker(tmp_path, uri="http://127.0.0.1:9")
    on.start({}, {})
    on.metrics(1, {"loss": 1.0})
    on.finish("finished")
    assert "can't start new thread" in caplog.text
    assert f"`dl2pa sync {tmp_path}` sends them" in caplog.text
    assert kinds(tmp_path) == ["start", "metrics", "end"]
