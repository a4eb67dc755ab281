"""A record made under outages equals an undisturbed one value for value.

The server and its PostgreSQL are killed and restarted at random, the disk of the spool is full for a while, the
training is killed and resumed, and the password changes before the end. Real processes, fixed seeds.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.disks import full
from support.runs import Program, Training
from support.servers import Database, TrackingServer
from support.waiting import eventually

pytestmark = pytest.mark.xdist_group("servers")
pytest.importorskip("mlflow")

EPOCHS = 20
STEPS = EPOCHS * 29


@pytest.fixture
def spool_disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system for the spool, which can be filled. MLflow resolves paths, so it needs a real mount."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Disturber(threading.Thread):
    """Kill server and database in turn, at random times, until stopped; leaves both running."""

    def __init__(self, server: Any, database: Database, seed: int) -> None:
        super().__init__()
        self._draw = random.Random(seed)
        self._server, self._database = server, database
        self._stop_now = threading.Event()
        self.kills = {"server": 0, "database": 0}
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            while True:
                victim = "database" if self.kills["server"] > self.kills["database"] else "server"
                getattr(self, victim)()
                self.kills[victim] += 1
                if self._stop_now.wait(self._draw.uniform(0.5, 3)):
                    return
        except Exception as error:
            self.failure = error

    def server(self) -> None:
        self._server.kill()
        self._stop_now.wait(self._draw.uniform(0, 2))
        self._server.start()

    def database(self) -> None:
        self._database.kill()
        self._stop_now.wait(self._draw.uniform(0, 2))
        self._database.start()

    def finish(self) -> None:
        self._stop_now.set()
        self.join(180)
        assert not self.is_alive() and self.failure is None, self.failure


def set_password(server: Any, user: str, password: str, *, new: bool) -> None:
    path = "/api/2.0/mlflow/users/create" if new else "/api/2.0/mlflow/users/update-password"
    body = json.dumps({"username": user, "password": password}).encode()
    request = server.request(path, method="POST" if new else "PATCH", data=body)
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.status == 200


def record_of(client: Any, experiment: str, artifacts: Path) -> dict[str, Any]:
    """The record of the only run of the experiment: values by (name, step), params, tags, files by hash."""
    info = client.get_experiment_by_name(experiment)
    (run,) = client.search_runs([info.experiment_id])
    points: dict[tuple[str, int], float] = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            assert (name, point.step) not in points, f"{name} has two values at step {point.step}"
            points[name, point.step] = point.value
    folder = artifacts / info.experiment_id / run.info.run_id / "artifacts"
    files = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (model,) = client.search_logged_models([info.experiment_id])
    assert str(model.status) == "READY"
    weights = folder.parents[1] / "models" / model.model_id / "artifacts/artifacts/model.safetensors"
    return {
        "status": run.info.status,
        "model": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "points": points,
        "params": run.data.params,
        "tags": run.data.tags,
        "files": files,
    }


@pytest.mark.thorough
@pytest.mark.timeout(2400)
def test_mlflow_record_is_equal_after_disturbances(
    tracking_server: TrackingServer,
    database: Database,
    train: Callable[..., Training],
    program: Program,
    spool_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlflow

    server = tracking_server
    set_password(server, "trainer", "the first password", new=True)
    common = {"train": {"epochs": EPOCHS}, "method": {"match": {"early_steps": 3, "early_epochs": 2}}}

    def named(name: str, uri: str) -> Any:
        return train(1, name, {**common, "tracking": {"uri": uri, "experiment": name}})

    def signed_in(password: str) -> dict[str, str]:
        return {"MLFLOW_TRACKING_USERNAME": "trainer", "MLFLOW_TRACKING_PASSWORD": password}

    disturbed = named("disturbed", server.address)
    disturbed.run.mkdir(parents=True)
    (disturbed.run / "owner.lock").touch()  # else a folder of other files would be refused
    (disturbed.run / "events").symlink_to(spool_disk)
    first = program.start(*disturbed.command(), env=signed_in("the first password"))
    disturbed.wait_for(first, (spool_disk / "mlflow.json").exists, "the server answers")
    disturber = Disturber(server, database, seed=20)
    disturber.start()
    try:
        disturbed.wait_for_step(first, STEPS // 6, 0)
        with full(spool_disk):
            size = (spool_disk / "events.jsonl").stat().st_size
            at = disturbed.status["step"]
            disturbed.wait_for_step(first, at + STEPS // 6, 0)
            grown = (spool_disk / "events.jsonl").stat().st_size - size
            assert grown < os.sysconf("SC_PAGE_SIZE"), "the disk was not full"
        # A kill loses what waits in memory: the next steps bring that to the disk, which takes it again.
        disturbed.wait_for_step(first, max(STEPS // 2, disturbed.status["step"] + 10), 0)
        first.signal_group(signal.SIGKILL)
        first.wait()
        second = program.start(*disturbed.command(), env=signed_in("the first password"))
        disturbed.wait_for_step(second, STEPS * 3 // 4, 1)
    finally:
        disturber.finish()
    database.kill()
    database.start()
    set_password(server, "trainer", "the second password", new=False)
    assert second.wait(900) == 0, second.error
    assert "cannot write tracking events" in first.error
    assert "password" not in first.error + second.error
    synced = program.run(
        "sync", disturbed.run, "--uri", server.address, "--json", env=signed_in("the second password")
    )
    assert (synced.code, synced.result["left"], synced.result["refused"]) == (0, 0, 0), synced.error

    peaceful = named("peaceful", "none")
    peaceful.finish()
    sent = program.run("sync", peaceful.run, "--uri", server.address, env=signed_in("the second password"))
    assert sent.code == 0, sent.error

    for name, value in signed_in("the second password").items():
        monkeypatch.setenv(name, value)
    client = mlflow.MlflowClient(server.address)
    disturbed_record, reference = (
        record_of(client, name, server.artifacts) for name in ("disturbed", "peaceful")
    )
    assert disturbed_record["status"] == reference["status"] == "FINISHED"

    def without(record: dict[str, Any], *prefixes: str) -> dict[tuple[str, int], float]:
        return {key: value for key, value in record["points"].items() if not key[0].startswith(prefixes)}

    # System metrics differ between runs; their steps are seconds since the start of the run.
    assert without(disturbed_record, "system/").keys() == without(reference, "system/").keys()
    measured = "system/", "time/", "memory/"
    assert without(disturbed_record, *measured) == without(reference, *measured)
    assert len([1 for name, _ in disturbed_record["points"] if name == "train/loss"]) == STEPS
    differing = {
        k for k in disturbed_record["params"] if disturbed_record["params"][k] != reference["params"].get(k)
    }
    assert differing == {"tracking.uri", "tracking.experiment"}
    assert disturbed_record["params"].keys() == reference["params"].keys()
    assert disturbed_record["tags"]["dl2pa.state"] == reference["tags"]["dl2pa.state"] == "finished"
    assert disturbed_record["tags"]["dl2pa.attempt"] == "2"
    assert "dl2pa.dropped_events" not in disturbed_record["tags"]
    named_alike = [
        {name for name in record["files"] if not name.startswith("code/attempt-")}
        for record in (disturbed_record, reference)
    ]
    assert named_alike[0] == named_alike[1]
    assert disturbed_record["model"] == reference["model"]
    for name in ("validation.json", "matchings.jsonl"):
        assert disturbed_record["files"][name] == reference["files"][name], name


def test_sync_sends_with_new_credentials_after_they_expire(
    tracking_server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    from dl2pa.rundir import RunDirectory
    from dl2pa.tracking import Tracker, sync
    from dl2pa.tracking.delivery import Delivery
    from dl2pa.tracking.spool import read_events

    set_password(tracking_server, "guest", "valid for a while", new=True)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "guest")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "valid for a while")
    uri = tracking_server.address
    tracker = Tracker(tmp_path, enabled=True, uri=uri, experiment="expiring", run_name="r", attempt=1)
    tracker.start({"lr": 0.1}, {})
    tracker.metrics(0, {"loss": 0.0})
    eventually(lambda: Delivery(tmp_path, uri).is_done(with_pending=False), "the first points are sent")
    set_password(tracking_server, "guest", "valid from now on", new=False)
    for step in range(1, 50):
        tracker.metrics(step, {"loss": step / 7})
    tracker.finish("finished", drain_seconds=3)
    assert "error code 401" in caplog.text
    # The tracker's thread may still be in its last request.
    eventually(lambda: "401" in str(sync(tmp_path, uri, tries=1).error), "refused as well")
    assert sync(tmp_path, uri, tries=1).left == 50
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "valid from now on")
    eventually(lambda: sync(tmp_path, uri).left == 0, "the rest is there")
    assert sync(tmp_path, uri).events_sent == 0
    _, answer = tracking_server.get(f"/api/2.0/mlflow/runs/get?run_id={tracker.mlflow_run_id}")
    assert answer["run"]["info"]["status"] == "FINISHED"
    _, answer = tracking_server.get(
        f"/api/2.0/mlflow/metrics/get-history?run_id={tracker.mlflow_run_id}&metric_key=loss"
    )
    stored = sorted((p["step"], p["timestamp"], p["value"]) for p in answer["metrics"])
    events = [
        event for event, _ in read_events(RunDirectory(tmp_path).spool) if event and event["e"] == "metrics"
    ]
    assert stored == [(event["step"], event["t"], event["v"]["loss"]) for event in events]
    assert "valid" not in caplog.text
