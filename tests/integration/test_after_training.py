"""What comes after training: evaluate, export, predict, sync; and exact counts in real runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A run that has learned the digits, tracked for a server that was down all the time."""
    helpers = request.getfixturevalue("helpers")
    folder = tmp_path_factory.mktemp("trained")
    changes = {
        "train": {"epochs": 10, "log_every": 10},
        "checkpoint": {"every_steps": 0},
        "tracking": {"uri": f"http://127.0.0.1:{free_port()}", "experiment": "down"},
    }
    program = helpers.Program(folder)
    training = helpers.Training(program, helpers.config_with(folder, digits, changes), folder / "run", 1)
    started = training.start()
    try:
        assert started.wait() == 0, started.error
    finally:
        program.close()
    assert "dl2pa sync" in started.error, "the end says that something is left to send"
    return training.run


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_evaluate_gives_the_runs_own_accuracy(trained: Path, program: Any) -> None:
    result = json.loads((trained / "result.json").read_text())
    evaluated = program.run("evaluate", trained, "--json")
    assert evaluated.process.returncode == 0, evaluated.error
    assert evaluated.result == {
        "top1": result["top1_last"],
        "top5": result["top5_last"],
        "ece": result["ece_last"],
        "num_validated": 359,
    }
    best = program.run("evaluate", trained, "--checkpoint", "best", "--json")
    assert best.result["top1"] == result["top1_best"]


def test_evaluate_another_folder(trained: Path, digits: Path, program: Any) -> None:
    evaluated = program.run("evaluate", trained, f"data.val_root={digits / 'train'}", "--json")
    assert evaluated.result["num_validated"] == 1438


def test_export_predicts_elsewhere(trained: Path, digits: Path, program: Any, tmp_path: Path) -> None:
    exported = program.run("export", trained, "--out", tmp_path / "export", "--json")
    assert exported.process.returncode == 0, exported.error
    assert exported.result["classes"] == 10
    elsewhere = tmp_path / "else where"
    shutil.copytree(tmp_path / "export", elsewhere)
    shutil.rmtree(tmp_path / "export")
    images = [file for folder in sorted((digits / "val").iterdir()) for file in sorted(folder.iterdir())[:10]]
    predicted = program.run("predict", elsewhere, *images, "--top", "3", "--json")
    assert predicted.process.returncode == 0, predicted.error
    rows = predicted.result["predictions"]
    assert [row["image"] for row in rows] == [str(i) for i in images]
    assert all(len(row["top"]) == 3 for row in rows)
    right = sum(row["top"][0]["class"] == Path(row["image"]).parent.name for row in rows)
    accuracy = json.loads((trained / "result.json").read_text())["top1_last"]
    assert accuracy > 80
    assert right >= 75


@pytest.fixture
def mlflow_server(tmp_path: Path, helpers: Any) -> Iterator[str]:
    pytest.importorskip("mlflow")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}"),
        *("--artifacts-destination", str(tmp_path / "artifacts")),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (tmp_path / "server.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True, env={**os.environ, **quiet}
        )

    def healthy() -> bool:
        assert process.poll() is None, (tmp_path / "server.log").read_text()
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    helpers.eventually(healthy, "the MLflow server answers")
    yield uri
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_sync_sends_a_run_whose_server_was_down(
    trained: Path, mlflow_server: str, program: Any, helpers: Any, tmp_path: Path
) -> None:
    import mlflow

    run = tmp_path / "copy"
    shutil.copytree(trained, run)
    assert json.loads((run / "result.json").read_text())["mlflow_run_id"] is None
    first = program.run("sync", run, "--uri", mlflow_server, "--json")
    assert first.process.returncode == 0, first.error
    assert (first.result["left"], first.result["error"]) == (0, None)
    second = program.run("sync", run, "--uri", mlflow_server, "--json")
    assert (second.result["events_sent"], second.result["run_id"]) == (0, first.result["run_id"])

    client = mlflow.MlflowClient(mlflow_server)
    stored = client.get_run(first.result["run_id"])
    assert stored.info.status == "FINISHED"
    spooled = helpers.outcome_of(run).points
    recorded = {
        (name, point.step): point.value
        for name in stored.data.metrics
        if not name.startswith("time/")
        for point in client.get_metric_history(stored.info.run_id, name)
    }
    assert recorded == spooled
    history = client.get_metric_history(stored.info.run_id, "train/loss")
    assert len(history) == 29, "no point is doubled"
    files = {f.path for f in client.list_artifacts(stored.info.run_id)}
    assert {"model.safetensors", "matchings.jsonl"} <= files
    drawn = {f.path for f in client.list_artifacts(stored.info.run_id, "pictures")}
    assert drawn == {"pictures/assignment_flow.png", "pictures/class_cosines.png"}
    moved = [json.loads(line)["moved"] for line in (run / "matchings.jsonl").read_text().splitlines()]
    assert moved == json.loads((run / "result.json").read_text())["labels_moved"]


@pytest.mark.parametrize(("nproc", "count"), [(3, 103), (2, 7), (3, 1)])
def test_validation_counts_exactly(
    nproc: int, count: int, train: Callable[..., Any], digits: Path, tmp_path: Path, program: Any
) -> None:
    folders = sorted((digits / "val").iterdir())
    for i in range(count):
        file = sorted(folders[i % 10].iterdir())[i // 10]
        (tmp_path / "val" / folders[i % 10].name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / folders[i % 10].name / file.name).symlink_to(file)
    changes = {
        "data": {"val_root": str(tmp_path / "val")},
        "train": {"max_steps": 2, "eval_batch_size": 20},
    }
    training = train(nproc, "run", changes)
    finished = training.finish(limit=1)
    assert finished.result["num_validated"] == count
    totals = json.loads((training.run / "validation.json").read_text())["class_total"]
    assert totals == [len(range(c, count, 10)) for c in range(10)]
    if count == 103:
        alone = program.run("evaluate", training.run, "--json")
        assert alone.result["num_validated"] == count
        assert alone.result["top1"] == finished.result["top1_last"]
