"""The tracking server of docker/compose.yaml, started as there on a real PostgreSQL, and a run that records there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("mlflow")
psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'dl2pa[server]'")


@pytest.mark.parametrize(
    ("host", "signed_in", "status"),
    [
        (None, True, 200),
        (None, False, 401),
        ("tracking:5000", True, 200),
        ("172.18.0.3:5000", True, 200),
        ("mlflow.example", True, 200),
        ("172.32.0.3:5000", True, 403),
        ("stranger.example", True, 403),
    ],
)
def test_who_is_let_in(tracking_server: Any, host: str | None, signed_in: bool, status: int) -> None:
    assert (
        tracking_server.get("/api/2.0/mlflow/experiments/search?max_results=1", host, signed_in)[0] == status
    )


def test_a_training_records_itself_in_postgresql(
    tracking_server: Any, database: Any, train: Callable[..., Any], helpers: Any
) -> None:
    training = train(changes={"tracking": {"uri": tracking_server.address, "experiment": "postgres"}})
    signed_in = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": tracking_server.password}
    started = training.program.run(*training.command(), env=signed_in)
    assert started.process.returncode == 0, started.error

    _, answer = tracking_server.get(f"/api/2.0/mlflow/runs/get?run_id={started.result['mlflow_run_id']}")
    assert answer["run"]["info"]["status"] == "FINISHED"
    last = {metric["key"]: metric["value"] for metric in answer["run"]["data"]["metrics"]}
    assert last["val/top1"] == started.result["top1_last"]

    names = {
        "host": "PGHOST",
        "port": "PGPORT",
        "user": "PGUSER",
        "password": "PGPASSWORD",
        "dbname": "PGDATABASE",
    }
    with psycopg.connect(
        **{ours: database.variables[theirs] for ours, theirs in names.items()}
    ) as connection:
        rows = connection.execute(
            "select key, step, value from metrics where run_uuid = %s", [answer["run"]["info"]["run_id"]]
        ).fetchall()
    stored = {
        (key, step): value for key, step, value in rows if not key.startswith(("time/", "memory/", "system/"))
    }
    assert stored == pytest.approx(helpers.outcome_of(training.run).points)
    assert list(tracking_server.artifacts.rglob("model.safetensors"))
