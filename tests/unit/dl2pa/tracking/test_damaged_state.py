"""Damaged `events/run.json` and `events/mlflow.json`: named, and replaced by what the spool and the server know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dl2pa.rundir import RunDirectory
from dl2pa.tracking.spool import Identity, Spool, ensure_identity, load_identity
from dl2pa.tracking.sync_state import SyncState, last_server, load_sync_state, save_sync_state

UUID = "0123456789abcdef" * 2
DAMAGES = ("", "{", "[]", "3", "[" * 100_000, "{}")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setattr("dl2pa.rundir._warned", set())
    identity = ensure_identity(tmp_path, "an experiment", "a run")
    spool = Spool(tmp_path, 1)
    spool.start(identity, {}, {})
    spool.close()
    return RunDirectory(tmp_path)


def identity_text(**changes: object) -> str:
    fields = {"run_uuid": UUID, "experiment": "e", "run_name": "n", "created": 1, "copied_from": None}
    return json.dumps({**fields, **changes})


@pytest.mark.parametrize(
    "content",
    [
        *DAMAGES,
        identity_text(run_uuid="x' OR '1'='1"),
        identity_text(experiment=[]),
        identity_text(created="now"),
        identity_text(run_name=None),
        identity_text(later=1),
    ],
)
def test_damaged_identity_is_named_and_read_from_the_spool(
    content: str, run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    before = load_identity(run.root)
    run.identity.write_text(content, encoding="utf-8")
    assert load_identity(run.root) == before is not None
    assert "run.json is damaged" in caplog.text
    assert ensure_identity(run.root, "another", "name") == before
    assert json.loads(run.identity.read_text(encoding="utf-8"))["run_uuid"] == before.run_uuid


def test_valid_identity_is_read(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    run.identity.write_text(identity_text(), encoding="utf-8")
    assert load_identity(run.root) == Identity(UUID, "e", "n", 1)
    assert not caplog.records


@pytest.mark.parametrize(
    "entry",
    [
        3,
        [],
        {"cursor": "7"},
        {"cursor": -1},
        {"cursor": 10**30},
        {"run_id": ["x"]},
        {"pending_artifacts": {"a": 1}},
        {"pending_artifacts": [[7]]},
    ],
)
def test_damaged_sync_state_is_named_and_sends_again(
    entry: object, run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    content = {"servers": {"http://first": {"run_id": "r", "cursor": 5}, "http://second": entry}}
    run.sync_state.write_text(json.dumps(content), encoding="utf-8")
    assert load_sync_state(run.root, "http://second") == SyncState()
    assert "mlflow.json is damaged" in caplog.text
    assert load_sync_state(run.root, "http://first") == SyncState("r", 5)
    save_sync_state(run.root, "http://second", SyncState("s", 9))
    assert load_sync_state(run.root, "http://second") == SyncState("s", 9)


@pytest.mark.parametrize("content", [*DAMAGES[:-1], '{"servers": 3}', "\\udcff"])
def test_damaged_sync_file_is_named(
    content: str, run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    run.sync_state.write_text(content, encoding="utf-8")
    assert load_sync_state(run.root, "http://first") == SyncState()
    assert last_server(run.root) is None
    assert "mlflow.json is damaged" in caplog.text
