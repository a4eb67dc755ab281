"""What comes after training: evaluate, export, predict, sync; and exact counts in real runs."""

from __future__ import annotations

import json
import re
import shutil
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
        "tracking": {"uri": f"http://127.0.0.1:{helpers.free_port()}", "experiment": "down"},
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


def test_the_embedding_alone_on_its_own_and_on_another_data_set(
    trained: Path, digits: Path, program: Any, tmp_path: Path
) -> None:
    own = program.run("evaluate", trained, "--embedding", "--json")
    assert own.process.returncode == 0, own.error
    top1 = json.loads((trained / "result.json").read_text())["top1_last"]
    assert abs(own.result["knn_top1"] - top1) < 10
    assert (own.result["num_reference"], own.result["num_validated"]) == (1438, 359)
    for half in ("train", "val"):  # another set: three of the classes, under other names
        for digit in "147":
            shutil.copytree(digits / half / digit, tmp_path / half / f"new{digit}")
    other = program.run(
        "evaluate", trained, "--embedding", f"data.root={tmp_path}", "data.num_classes=3", "--json"
    )
    assert other.process.returncode == 0, other.error
    assert other.result["knn_top1"] > 90
    assert other.result["num_validated"] == sum(1 for file in tmp_path.glob("val/*/*") if file.is_file())


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
    with helpers.sqlite_server(tmp_path) as uri:
        yield uri


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
        if not name.startswith(("time/", "memory/", "system/"))
        for point in client.get_metric_history(stored.info.run_id, name)
    }
    assert recorded == spooled
    history = client.get_metric_history(stored.info.run_id, "train/loss")
    assert len(history) == 29, "no point is doubled"
    files = {f.path for f in client.list_artifacts(stored.info.run_id)}
    pages = {"summary.html", "confusion.html", "per_class.html"}
    tables = {"confusion_pairs.csv", "per_class.csv", "per_class.json"}
    assert {"result.json", "matchings.jsonl"} | pages | tables <= files
    drawn = {Path(f.path).stem for f in client.list_artifacts(stored.info.run_id, "pictures")}
    numbers = {"curves", "reliability", "confusion", "prototype_cosines"}
    assert drawn == {"assignment_flow", "class_cosines"} | numbers
    code = {f.path for f in client.list_artifacts(stored.info.run_id, "code")}
    assert "code/requirements.txt" in code
    names = set(stored.data.metrics)
    assert {"time/step_ms_p50", "time/step_ms_p90", "time/step_ms_p99", "memory/host_gib"} <= names
    assert "system/node-0/cpu_utilization_percentage" in names
    assert {"recipe", "method", "backbone", "dataset", "dim", "seed", "loss", "assignment"} <= set(
        stored.data.tags
    )
    inputs = {i.tags[0].value: i.dataset for i in stored.inputs.dataset_inputs}
    assert set(inputs) == {"training", "validation"}
    fingerprints = (inputs["training"].digest, inputs["validation"].digest)
    assert "-".join(fingerprints) == stored.data.tags["dl2pa.data"]
    page = (run / "summary.html").read_text()
    assert len(page) < 5 * 2**20
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)', page)), "it stands alone"
    assert "<link" not in page and "@import" not in page
    moved = [json.loads(line)["moved"] for line in (run / "matchings.jsonl").read_text().splitlines()]
    assert moved == json.loads((run / "result.json").read_text())["labels_moved"]


def test_sync_all_sends_every_run_and_closes_the_killed(
    trained: Path, mlflow_server: str, program: Any, tmp_path: Path
) -> None:
    import mlflow

    for name in ("whole", "deeper/killed"):
        shutil.copytree(trained, tmp_path / "runs" / name)
    spool = tmp_path / "runs/deeper/killed/events/events.jsonl"
    *kept, end = spool.read_text().splitlines(keepends=True)
    assert json.loads(end)["e"] == "end"
    uuid = json.loads((spool.parent / "run.json").read_text())["run_uuid"]
    for file in (spool, spool.parent / "run.json"):
        text = "".join(kept) if file == spool else file.read_text()
        file.write_text(text.replace(uuid, f"{uuid[:-4]}dead"))
    (tmp_path / "runs/submitted/slurm").mkdir(parents=True)
    (tmp_path / "runs/submitted/slurm/job.json").write_text("{}")

    done = program.run("sync", "--all", tmp_path / "runs", "--uri", mlflow_server, "--json")
    assert done.process.returncode == 0, done.error
    sent = {Path(run["run_dir"]).name: run for run in done.result["runs"]}
    assert set(sent) == {"whole", "killed"}
    assert {run["left"] for run in sent.values()} == {0}
    client = mlflow.MlflowClient(mlflow_server)
    states = {name: client.get_run(run["run_id"]).info.status for name, run in sent.items()}
    assert states == {"whole": "FINISHED", "killed": "KILLED"}
    again = program.run("sync", "--all", tmp_path / "runs", "--uri", mlflow_server, "--json")
    assert [run["events_sent"] for run in again.result["runs"]] == [0, 0]


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
