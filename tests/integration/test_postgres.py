"""The tracking server of docker/compose.yaml on a real PostgreSQL, and a run that is recorded there."""

from __future__ import annotations

import json
import urllib.parse
from pathlib import Path

import pytest

from support.commands import Completed
from support.runs import Program, Training, config_with, outcome_of
from support.servers import Database, TrackingServer
from support.waiting import eventually

pytestmark = pytest.mark.xdist_group("servers")
pytest.importorskip("mlflow")
psycopg = pytest.importorskip(
    "psycopg", reason="psycopg is not installed: pip install -c constraints.txt -e '.[server]'"
)


@pytest.mark.parametrize(
    ("host", "signed_in", "status"),
    [
        (None, True, 200),
        (None, False, 401),
        ("tracking:5000", True, 200),
        ("mlflow.example", True, 200),
        ("172.18.0.3:5000", True, 403),
        ("10.attacker.example", True, 403),
        ("192.168.attacker.example:5000", True, 403),
        ("stranger.example", True, 403),
    ],
)
def test_authentication(
    tracking_server: TrackingServer, host: str | None, signed_in: bool, status: int
) -> None:
    assert (
        tracking_server.get("/api/2.0/mlflow/experiments/search?max_results=1", host, signed_in)[0] == status
    )


@pytest.fixture(scope="module")
def recorded(
    tracking_server: TrackingServer, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Training, Completed]:
    """A run recorded by this server, with the credentials in the URI."""
    folder = tmp_path_factory.mktemp("recorded")
    password = urllib.parse.quote(tracking_server.password, "")
    address = tracking_server.address.replace("://", f"://admin:{password}@")
    changes = {"train": {"epochs": 1, "max_steps": 9}, "tracking": {"uri": address, "experiment": "postgres"}}
    training = Training(Program(folder), config_with(folder, digits, changes), folder / "run", 1)
    done = training.finish()
    # A slow server may leave some events to `sync`, once the tracker's thread has ended its last request.
    command = ("sync", training.run, "--uri", address, "--json")
    eventually(lambda: training.program.run(*command).code == 0, "the record is complete", poll_s=1)
    return training, done


def test_a_run_is_recorded_in_postgresql(
    tracking_server: TrackingServer, database: Database, recorded: tuple[Training, Completed]
) -> None:
    training, done = recorded
    _, answer = tracking_server.get(f"/api/2.0/mlflow/runs/get?run_id={done.result['mlflow_run_id']}")
    assert answer["run"]["info"]["status"] == "FINISHED"
    last = {metric["key"]: metric["value"] for metric in answer["run"]["data"]["metrics"]}
    assert last["val/top1"] == done.result["top1_last"]

    names = {
        "host": "PGHOST",
        "port": "PGPORT",
        "user": "PGUSER",
        "password": "PGPASSWORD",
        "dbname": "PGDATABASE",
    }
    with psycopg.connect(
        **{name: database.variables[variable] for name, variable in names.items()}
    ) as connection:
        rows = connection.execute(
            "select key, step, value from metrics where run_uuid = %s", [answer["run"]["info"]["run_id"]]
        ).fetchall()
    stored = {
        (key, step): value for key, step, value in rows if not key.startswith(("time/", "memory/", "system/"))
    }
    assert stored == pytest.approx(outcome_of(training.run).points)
    assert list(tracking_server.artifacts.rglob("model.safetensors"))


def test_secrets_are_in_neither_logs_nor_records(
    tracking_server: TrackingServer, recorded: tuple[Training, Completed]
) -> None:
    training, done = recorded
    secrets = [tracking_server.password, urllib.parse.quote(tracking_server.password, "")]
    texts = [done.output, done.error]
    texts += [p.read_text(errors="replace") for p in training.run.rglob("*") if p.is_file()]
    texts += [p.read_text(errors="replace") for p in tracking_server.artifacts.rglob("*") if p.is_file()]
    _, answer = tracking_server.get(f"/api/2.0/mlflow/runs/get?run_id={done.result['mlflow_run_id']}")
    texts.append(json.dumps(answer))
    assert not [text[:200] for text in texts if any(secret in text for secret in secrets)]
