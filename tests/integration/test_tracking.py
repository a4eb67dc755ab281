"""Tracking with a real MLflow server that is killed, restarted, loses responses or gets duplicates."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dl2pa.config import Config
from dl2pa.rundir import RunDirectory
from dl2pa.search.journal import State, Trial
from dl2pa.search.tracking import SearchTracker
from dl2pa.tracking import Tracker, local_uri, sync
from dl2pa.tracking.server import COPIED_TAG, RUN_TAG
from dl2pa.tracking.spool import read_events
from dl2pa.tracking.sync_state import load_sync_state, save_sync_state
from support.paths import REPOSITORY
from support.servers import MlflowServer
from support.waiting import eventually

pytestmark = pytest.mark.xdist_group("servers")
mlflow = pytest.importorskip("mlflow")


@pytest.fixture
def lossy(mlflow_server: MlflowServer) -> Iterator[str]:
    """A proxy that drops the first response to every change, after the server has applied it."""
    changes: set[tuple[str, str, bytes]] = set()

    class Forwarder(BaseHTTPRequestHandler):
        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            onward = HTTPConnection("127.0.0.1", mlflow_server.port, timeout=30)
            headers = {
                k: v for k, v in self.headers.items() if k.lower() not in ("host", "transfer-encoding")
            }
            onward.request(self.command, self.path, body, headers)
            answer = onward.getresponse()
            content = answer.read()
            if self.command != "GET" and not self.path.endswith("/search"):
                change = (self.command, self.path, body)
                if change not in changes:
                    changes.add(change)
                    self.close_connection = True
                    return
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_PATCH = _forward

        def log_message(self, format: str, *args: Any) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Forwarder)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_address[1]}"
    proxy.shutdown()
    proxy.server_close()
    assert len(changes) > 10


def spooled_points(run: Path) -> dict[str, list[tuple[int, int, Any]]]:
    """All points of the spool as (step, time, value); NaN and infinities as texts."""
    result: dict[str, list[tuple[int, int, Any]]] = {}
    for event, _ in read_events(RunDirectory(run).spool):
        for name, value in ((event or {}).get("v") or {}).items():
            assert event is not None
            result.setdefault(name, []).append((event["step"], event["t"], value))
    return {name: sorted(points) for name, points in result.items()}


def recorded_points(client: Any, run_id: str) -> dict[str, list[tuple[int, int, Any]]]:
    def readable(value: float) -> Any:
        if math.isnan(value):
            return "nan"
        # SQL has no infinity; MLflow stores the largest float instead.
        return ("inf" if value > 0 else "-inf") if abs(value) == sys.float_info.max else value

    return {
        name: sorted(
            (p.step, p.timestamp, readable(p.value)) for p in client.get_metric_history(run_id, name)
        )
        for name in client.get_run(run_id).data.metrics
    }


def assert_same(client: Any, run_id: str, run: Path) -> None:
    assert recorded_points(client, run_id) == spooled_points(run)


def runs_with(client: Any, experiment: str, uuid: str | None) -> list[Any]:
    info = client.get_experiment_by_name(experiment)
    return list(client.search_runs([info.experiment_id], f"tags.`{RUN_TAG}` = '{uuid}'"))


def test_sqlite_store_direct(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    uri = local_uri(tmp_path)
    shutil.copy(
        mlflow_server.database, tmp_path / "mlflow.db"
    )  # saves the seconds of making an empty database
    run = tmp_path / "run"
    tracker = Tracker(run, enabled=True, uri=uri, experiment="local", run_name="a run", attempt=1)
    tracker.start({"method": {"name": "dl2pa"}, "lr": 0.1}, {"data": "cifar"})
    for step in range(100):
        tracker.metrics(step, {"loss": step / 7, "val/top-1 (%)": step / 3})
    (run / "plots").mkdir()
    (run / "plots" / "curve.txt").write_text("curve")
    tracker.artifact(run / "plots" / "curve.txt", "pictures")
    tracker.artifact(run / "plots")
    tracker.metrics(100, {"nan": float("nan"), "up": float("inf"), "down": float("-inf")})
    tracker.finish("finished")

    client = mlflow.MlflowClient(uri)
    assert tracker.mlflow_run_id is not None
    stored = client.get_run(tracker.mlflow_run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "a run"
    assert stored.data.params == {"method.name": "dl2pa", "lr": "0.1"}
    assert stored.data.tags["data"] == "cifar"
    assert stored.data.tags["dl2pa.run_uuid"] == tracker.run_uuid
    assert_same(client, tracker.mlflow_run_id, run)
    artifacts = tmp_path / "mlartifacts" / tracker.mlflow_run_id / "artifacts"
    assert (artifacts / "pictures" / "curve.txt").read_text() == "curve"
    assert (artifacts / "plots" / "curve.txt").read_text() == "curve"
    report = sync(run, alive=False)
    assert (report.events_sent, report.left, report.run_id) == (0, 0, tracker.mlflow_run_id)
    assert report.already_there == 105


DAMAGE = {
    "experiment": (
        "UPDATE experiments SET lifecycle_stage = 'deleted' WHERE name = 'exp'",
        "experiments restore",
    ),
    "older schema": ("UPDATE alembic_version SET version_num = '0c779009ac13'", "mlflow db upgrade"),
    "newer schema": (
        "UPDATE alembic_version SET version_num = 'ffffffffffff'",
        "MLflow version of the database",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_store_that_refuses_the_run_is_reported_with_a_remedy(
    kind: str, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    statement, remedy = DAMAGE[kind]
    shutil.copy(mlflow_server.database, tmp_path / "mlflow.db")
    mlflow.MlflowClient(local_uri(tmp_path)).create_experiment("exp")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute(statement)
    run = tmp_path / "runs" / "run"
    tracker = Tracker(run, enabled=True, uri=None, experiment="exp", run_name="a run", attempt=1)
    tracker.start({}, {})
    tracker.finish("finished")
    copied = tmp_path / "store"
    copied.mkdir()
    shutil.copy(tmp_path / "mlflow.db", copied / "mlflow.db")  # MLflow caches stores by address
    report = sync(run, local_uri(copied))
    assert report.error is not None and remedy in report.error
    assert (report.events_sent, report.left) == (0, 2)


def attempt(run: Path, number: int, uri: str) -> Tracker:
    tracker = Tracker(run, enabled=True, uri=uri, experiment="copies", run_name="a run", attempt=number)
    tracker.start({"lr": 0.1}, {})
    tracker.metrics(number, {"loss": float(number)})
    tracker.finish("stopped")
    return tracker


def test_a_copied_run_directory_becomes_a_run_of_its_own(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    original, copy, uri = tmp_path / "original", tmp_path / "copy", mlflow_server.uri
    first = attempt(original, 1, uri)
    shutil.copytree(original, copy)
    second, third = attempt(copy, 2, uri), attempt(original, 2, uri)
    fourth = attempt(copy, 3, uri)
    assert first.mlflow_run_id == third.mlflow_run_id
    assert second.mlflow_run_id == fourth.mlflow_run_id != first.mlflow_run_id
    client = mlflow.MlflowClient(uri)
    assert second.mlflow_run_id is not None and first.mlflow_run_id is not None
    tags = client.get_run(second.mlflow_run_id).data.tags
    assert (tags[RUN_TAG], tags[COPIED_TAG]) == (second.run_uuid, first.run_uuid)
    assert_same(client, second.mlflow_run_id, copy)
    assert_same(client, first.mlflow_run_id, original)


def test_lost_responses_and_resending_create_no_duplicates(
    mlflow_server: MlflowServer, lossy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dl2pa.tracking.sender._MAX_BACKOFF_AT_END", 0.05)
    monkeypatch.setattr("dl2pa.tracking.delivery._MIN_METRICS", 500)
    tracker = Tracker(tmp_path, enabled=True, uri=lossy, experiment="lossy", run_name="lossy", attempt=1)
    params = {f"p{i:03}": i for i in range(150)} | {"long": "x" * 9000}
    tracker.start(params, {f"t{i:03}": str(i) for i in range(120)})
    for step in range(250):
        tracker.metrics(step, {"loss": 1 / (step + 1), "lr": 0.1 * step, "nan": float("nan")})
    tracker.metrics(250, {f"class/{i:04}": i / 3 for i in range(1050)})
    (tmp_path / "note.txt").write_text("kept once")
    tracker.artifact(Path("note.txt"), "notes")
    tracker.tags({"late": "tag"})
    tracker.finish("stopped", drain_seconds=60)

    client = mlflow.MlflowClient(mlflow_server.uri)
    (stored,) = runs_with(client, "lossy", tracker.run_uuid)

    def check() -> None:
        run = client.get_run(stored.info.run_id)
        assert (run.info.status, run.data.tags["dl2pa.state"]) == ("KILLED", "stopped")
        assert len(run.data.params) == 151
        assert len(run.data.params["long"]) == 6000
        assert (run.data.tags["t119"], run.data.tags["late"]) == ("119", "tag")
        assert [f.path for f in client.list_artifacts(run.info.run_id, "notes")] == ["notes/note.txt"]
        names = ["loss", "lr", "nan", "class/0000", "class/1049"]
        spooled, sent = spooled_points(tmp_path), {}
        for name in names:
            history = client.get_metric_history(run.info.run_id, name)
            sent[name] = sorted(
                (p.step, p.timestamp, "nan" if math.isnan(p.value) else p.value) for p in history
            )
        assert sent == {name: spooled[name] for name in names}
        assert set(run.data.metrics) == set(spooled)

    check()
    again = sync(tmp_path, lossy)
    assert (again.events_sent, again.left, again.already_there) == (0, 0, 255)
    # Under another name the same server counts as new: all is sent again, to the same run.
    replay = sync(tmp_path, mlflow_server.uri)
    assert (replay.events_sent, replay.points_sent, replay.left) == (255, 1800, 0)
    assert (replay.run_id, replay.error) == (stored.info.run_id, None)
    # A spool shorter than the cursor is another spool; it is sent from the beginning.
    state = load_sync_state(tmp_path, mlflow_server.uri)
    save_sync_state(tmp_path, mlflow_server.uri, dataclasses.replace(state, cursor=state.cursor + 1))
    assert sync(tmp_path, mlflow_server.uri).events_sent == 255
    assert len(runs_with(client, "lossy", tracker.run_uuid)) == 1
    check()


ATTEMPT = """
import sys
from pathlib import Path
from dl2pa.tracking import Tracker
tracker = Tracker(Path(sys.argv[1]), enabled=True, uri=sys.argv[2], experiment="killed",
                  run_name="r", attempt=1)
tracker.start({"lr": 0.1, "epochs": 2}, {})
for step in range(50):
    tracker.metrics(step, {"loss": step / 7})
print("logged", flush=True)
sys.stdin.read()
"""


def test_sync_ends_a_killed_run_and_the_next_attempt_reopens_it(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    attempt = subprocess.Popen(
        [sys.executable, "-c", ATTEMPT, str(tmp_path), mlflow_server.uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    eventually(lambda: load_sync_state(tmp_path, mlflow_server.uri).cursor > 0, "the first points are sent")
    attempt.kill()
    attempt.wait()
    with RunDirectory(tmp_path).spool.open("ab") as file:
        file.write(b'{"e":"metrics","t":17')
    client = mlflow.MlflowClient(mlflow_server.uri)
    run_id = load_sync_state(tmp_path, mlflow_server.uri).run_id
    assert run_id is not None
    assert client.get_run(run_id).info.status == "RUNNING"

    assert sync(tmp_path, alive=True).left == 0
    assert client.get_run(run_id).info.status == "RUNNING"
    report = sync(tmp_path, alive=False)
    assert (report.run_id, report.events_sent) == (run_id, 1)
    assert sync(tmp_path, alive=False).events_sent == 0
    assert client.get_run(run_id).info.status == "KILLED"
    assert_same(client, run_id, tmp_path)

    second = Tracker(
        tmp_path, enabled=True, uri=mlflow_server.uri, experiment="other", run_name="other", attempt=2
    )
    assert second.mlflow_run_id == run_id
    second.start({"lr": 0.2, "epochs": 2, "new": 1}, {})
    for step in range(40, 60):
        second.metrics(step, {"loss": 1000.0 + step})
    eventually(lambda: client.get_run(run_id).info.status == "RUNNING", "the next attempt reopens the run")
    second.finish("finished")
    stored = client.get_run(run_id)
    assert (stored.info.status, stored.data.tags["dl2pa.attempt"]) == ("FINISHED", "2")
    assert stored.data.params == {"lr": "0.1", "epochs": "2", "new": "1"}
    assert stored.data.tags["dl2pa.changed.lr"] == "0.2"
    history = {p.step: p.value for p in client.get_metric_history(run_id, "loss")}
    assert history == {s: s / 7 if s < 50 else 1000.0 + s for s in range(60)}
    assert_same(client, run_id, tmp_path)


def test_a_run_created_before_a_crash_is_reused(
    mlflow_server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = mlflow.MlflowClient(mlflow_server.uri)
    tracker = Tracker(tmp_path, enabled=True, uri=None, experiment="crashed", run_name="r", attempt=1)
    tracker.start({"a": 1, "lr": 0.1, "z": 2}, {})
    tracker.metrics(0, {"loss": 1.0})
    experiment = client.create_experiment("crashed")
    made = client.create_run(experiment, tags={RUN_TAG: tracker.run_uuid})
    client.log_param(made.info.run_id, "lr", "someone else's")
    client.create_run(experiment, tags={RUN_TAG: tracker.run_uuid})

    report = sync(tmp_path, mlflow_server.uri)
    assert (report.run_id, report.left, report.refused) == (made.info.run_id, 0, 1)
    assert [run.info.run_id for run in runs_with(client, "crashed", tracker.run_uuid)] == [report.run_id]
    assert client.get_run(made.info.run_id).data.params == {"a": "1", "lr": "someone else's", "z": "2"}
    assert "lr" in caplog.text

    tracker.artifact(tmp_path / "never-written.png")
    tracker.metrics(1, {"loss": 2.0})
    report = sync(tmp_path, mlflow_server.uri)
    assert (report.points_sent, report.left, report.refused) == (1, 0, 2)
    client.delete_run(made.info.run_id)
    tracker.metrics(2, {"loss": 3.0})
    report = sync(tmp_path, mlflow_server.uri)
    assert report.left == 1
    assert "was deleted on the server" in str(report.error)


def test_a_failing_artifact_store_does_not_block_points(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    uri = local_uri(tmp_path)
    shutil.copy(mlflow_server.database, tmp_path / "mlflow.db")
    (tmp_path / "mlartifacts").write_text("a file where the folder should be")
    run = tmp_path / "run"
    tracker = Tracker(run, enabled=True, uri=None, experiment="e", run_name="r", attempt=1)
    tracker.start({}, {})
    (run / "a.txt").write_text("a")
    tracker.artifact(run / "a.txt")
    tracker.metrics(0, {"loss": 1.0})
    tracker.finish("finished")
    report = sync(run, uri, tries=1)
    assert (report.points_sent, report.left) == (1, 1)
    (tmp_path / "mlartifacts").unlink()
    report = sync(run, uri)
    assert (report.events_sent, report.left) == (1, 0)
    assert (tmp_path / "mlartifacts" / str(report.run_id) / "artifacts" / "a.txt").read_text() == "a"


def test_a_restarted_server_gets_all_events(
    mlflow_server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(
        tmp_path,
        enabled=True,
        uri=mlflow_server.uri,
        experiment="outage",
        run_name="r",
        attempt=1,
        drain_seconds=0.5,
    )
    slowest = 0.0
    step = 0

    def train(steps: int) -> None:
        nonlocal slowest, step
        for _ in range(steps):
            began = time.perf_counter()
            tracker.metrics(step, {"loss": 1 / (step + 1), "lr": 0.1})
            slowest = max(slowest, time.perf_counter() - began)
            step += 1

    tracker.start({"lr": 0.1}, {})
    train(300)
    eventually(lambda: load_sync_state(tmp_path, mlflow_server.uri).cursor > 0, "the first points are sent")
    before = load_sync_state(tmp_path, mlflow_server.uri).cursor
    train(1000)
    eventually(lambda: load_sync_state(tmp_path, mlflow_server.uri).cursor > before, "more points are sent")
    mlflow_server.kill()  # perhaps amid a batch
    train(600)
    (tmp_path / "result.json").write_text(json.dumps({"top1": 1.0}))
    tracker.artifact(tmp_path / "result.json")
    eventually(lambda: "cannot be reached" in caplog.text, "the outage is noticed")
    began = time.monotonic()
    tracker.finish("finished")
    assert time.monotonic() - began < 60, "MLflow itself would try for minutes"
    assert f"dl2pa sync {tmp_path}" in caplog.text
    assert slowest < 30, "no call waits for the server"

    mlflow_server.start()
    client = mlflow.MlflowClient(mlflow_server.uri)
    assert tracker.mlflow_run_id is not None
    assert client.get_run(tracker.mlflow_run_id).info.status == "RUNNING"
    report = sync(tmp_path)
    assert (report.run_id, report.left, report.error) == (tracker.mlflow_run_id, 0, None)
    assert report.events_sent + report.already_there == 1903
    assert report.points_sent >= 1200
    assert sync(tmp_path).events_sent == 0
    assert client.get_run(tracker.mlflow_run_id).info.status == "FINISHED"
    assert_same(client, tracker.mlflow_run_id, tmp_path)
    assert len(spooled_points(tmp_path)["loss"]) == 1900


def test_trials_are_nested_below_their_search_in_any_order_of_arrival(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    """A trial is sent before the search, as by `dl2pa sync`, and one after it."""
    config = Config.model_validate({"tracking": {"experiment": "a search"}})
    trials = {trial: Trial(trial, {}, {}, state="finished", value=90.0 + trial) for trial in range(2)}
    search = SearchTracker(tmp_path / "lr", "lr", config, None)
    search.start({"metric": "top1"})
    search.ended(State(None, [*trials.values()], [*trials.values()]), maximize=True)
    search.finish("Best: trial 1.", finished=True)

    def send_trial(number: int) -> str:
        run = tmp_path / "lr" / f"trial-{number:03d}"
        name = f"lr-{number:03d}"
        tracker = Tracker(run, enabled=True, uri=None, experiment="a search", run_name=name, attempt=1)
        tracker.start({}, search.tags(number))
        tracker.finish("finished")
        return str(sync(run, mlflow_server.uri).run_id)

    client = mlflow.MlflowClient(mlflow_server.uri)
    first = send_trial(0)
    parent = sync(tmp_path / "lr", mlflow_server.uri).run_id
    second = send_trial(1)
    assert [client.get_run(run).data.tags["mlflow.parentRunId"] for run in (first, second)] == [parent] * 2
    run = client.get_run(str(parent))
    assert (run.info.run_name, run.info.status, run.data.params["search.metric"]) == (
        "lr",
        "FINISHED",
        "top1",
    )
    assert run.data.tags["mlflow.note.content"] == "Best: trial 1."
    assert recorded_points(client, str(parent)) == spooled_points(tmp_path / "lr")
    assert run.data.metrics == {"search/value": 91.0, "search/best": 91.0}
