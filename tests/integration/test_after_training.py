"""Commands on a finished run: evaluate, export, predict and sync; exact validation counts of real runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.commands import run_here
from support.runs import Training, copy_as_another_run, outcome_of
from support.servers import MlflowServer

pytestmark = pytest.mark.xdist_group("servers")


def test_evaluate_gives_the_accuracy_of_the_run(trained: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    evaluated = run_here("evaluate", trained, "--json")
    assert evaluated.code == 0, evaluated.error
    values = evaluated.result
    assert values.pop("top1_low") < result["top1_last"] < values.pop("top1_high")
    assert values.pop("nll") == pytest.approx(result["nll"], abs=1e-6)
    assert values.pop("temperature") == result["temperature"]
    # The run cross-fits its figures on the halves of the validation split; `evaluate` uses the one temperature.
    for name, tolerance in (("ece_calibrated", 3.0), ("nll_calibrated", 0.05)):
        assert values.pop(name) == pytest.approx(result[name], abs=tolerance)
    assert values == {
        "top1": result["top1_last"],
        "top5": result["top5_last"],
        "ece": result["ece_last"],
        "num_validated": 359,
        "num_correct": round(359 * result["top1_last"] / 100),
    }
    best = run_here("evaluate", trained, "--checkpoint", "best", "--json")
    assert best.result["top1"] == result["top1_best"]


def test_evaluate_the_embedding_on_two_data_sets(trained: Path, digits: Path, tmp_path: Path) -> None:
    same = run_here("evaluate", trained, "--embedding", "--json")
    assert same.code == 0, same.error
    top1 = json.loads((trained / "result.json").read_text())["top1_last"]
    assert abs(same.result["knn_top1"] - top1) < 10
    assert (same.result["num_reference"], same.result["num_validated"]) == (1438, 359)
    for split in ("train", "val"):  # another data set: three of the classes with other names
        for digit in "147":
            shutil.copytree(digits / split / digit, tmp_path / split / f"new{digit}")
    other = run_here(
        "evaluate", trained, "--embedding", f"data.root={tmp_path}", "data.num_classes=3", "--json"
    )
    assert other.code == 0, other.error
    assert other.result["knn_top1"] > 90
    assert other.result["num_validated"] == sum(1 for file in tmp_path.glob("val/*/*") if file.is_file())


def test_evaluate_another_folder(trained: Path, digits: Path) -> None:
    evaluated = run_here("evaluate", trained, f"data.val_root={digits / 'train'}", "--json")
    assert evaluated.result["num_validated"] == 1438


def test_evaluations_are_added_to_the_run_on_the_server_once(
    trained: Path, digits: Path, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    import mlflow

    run = copy_as_another_run(trained, tmp_path / "copy", "evaluated")
    sent = run_here("sync", run, "--uri", mlflow_server.uri, "--json").result
    for name in "147":
        shutil.copytree(digits / "val" / name, tmp_path / "three" / name)
    command = ("evaluate", run, "--set", f"three={tmp_path / 'three'}", "--only-present-classes", "--json")
    evaluated = [run_here(*command) for _ in range(2)]
    assert [each.code for each in evaluated] == [0, 0], evaluated[0].error
    synced = [run_here("sync", run, "--uri", mlflow_server.uri, "--json").result for _ in range(2)]
    assert [(each["left"], each["run_id"]) for each in synced] == [(0, sent["run_id"])] * 2
    assert [each["events_sent"] for each in synced] == [5, 0]
    result = evaluated[0].result["sets"]["three"]
    client = mlflow.MlflowClient(mlflow_server.uri)
    record = client.get_run(sent["run_id"])
    assert record.info.status == "FINISHED"
    points = client.get_metric_history(sent["run_id"], "eval/three/num_correct")
    assert [point.value for point in points] == [result["num_correct"]]
    assert record.inputs is not None
    assert result["data_fingerprint"] in [each.dataset.digest for each in record.inputs.dataset_inputs]
    artifacts = {each.path for each in client.list_artifacts(sent["run_id"], "evaluations")}
    assert artifacts == {"evaluations/three.json", "evaluations/three"}


def test_export_predicts_elsewhere(trained: Path, digits: Path, tmp_path: Path) -> None:
    exported = run_here("export", trained, "--out", tmp_path / "export", "--json")
    assert exported.code == 0, exported.error
    assert exported.result["classes"] == 10
    elsewhere = tmp_path / "else where"
    shutil.copytree(tmp_path / "export", elsewhere)
    shutil.rmtree(tmp_path / "export")
    images = [file for folder in sorted((digits / "val").iterdir()) for file in sorted(folder.iterdir())[:10]]
    predicted = run_here("predict", elsewhere, *images, "--top", "3", "--json")
    assert predicted.code == 0, predicted.error
    rows = predicted.result["predictions"]
    assert [row["image"] for row in rows] == [str(i) for i in images]
    assert all(len(row["top"]) == 3 for row in rows)
    right = sum(row["top"][0]["class"] == Path(row["image"]).parent.name for row in rows)
    accuracy = json.loads((trained / "result.json").read_text())["top1_last"]
    assert accuracy > 80
    assert right >= 75


def test_embed_and_predict_use_a_checkpoint(trained: Path, digits: Path, tmp_path: Path) -> None:
    best = json.loads((trained / "result.json").read_text())["top1_best"]
    out = tmp_path / "p.jsonl"
    done = run_here("predict", trained, digits / "val", "--out", out, "--checkpoint", "best", "--json")
    assert done.code == 0, done.error
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    right = sum(row["top"][0]["class"] == Path(row["image"]).parent.name for row in rows)
    assert (len(rows), 100 * right / len(rows)) == (
        359,
        pytest.approx(best, abs=1.0),
    )  # DALI trained and evaluated
    embedded = run_here(
        "embed", trained, digits / "val", "--out", tmp_path / "e.npz", "--checkpoint", "latest", "--json"
    )
    assert embedded.code == 0, embedded.error
    with np.load(tmp_path / "e.npz") as stored:
        assert [Path(path).parent.name for path in stored["path"]] == stored["class"].tolist()
        assert stored["label"].tolist() == [int(name) for name in stored["class"]]


def test_sync_sends_a_run_to_a_server(trained: Path, mlflow_server: MlflowServer, tmp_path: Path) -> None:
    import mlflow

    run = copy_as_another_run(trained, tmp_path / "copy", "synced alone")
    assert json.loads((run / "result.json").read_text())["mlflow_run_id"] is None
    first = run_here("sync", run, "--uri", mlflow_server.uri, "--json")
    assert first.code == 0, first.error
    assert (first.result["left"], first.result["error"]) == (0, None)
    second = run_here("sync", run, "--uri", mlflow_server.uri, "--json")
    assert (second.result["events_sent"], second.result["run_id"]) == (0, first.result["run_id"])

    client = mlflow.MlflowClient(mlflow_server.uri)
    stored = client.get_run(first.result["run_id"])
    assert stored.info.status == "FINISHED"
    spooled = outcome_of(run).points
    recorded = {
        (name, point.step): point.value
        for name in stored.data.metrics
        if not name.startswith(("time/", "memory/", "system/"))
        for point in client.get_metric_history(stored.info.run_id, name)
    }
    assert recorded == spooled
    history = client.get_metric_history(stored.info.run_id, "train/loss")
    assert len(history) == len({point.step for point in history}) >= 23, "no point is duplicated"
    files = {f.path for f in client.list_artifacts(stored.info.run_id)}
    pages = {"summary.html", "confusion.html", "per_class.html", "nearest.html"}
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
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)', page)), (
        "no other file is loaded"
    )
    assert "<link" not in page and "@import" not in page
    moved = [json.loads(line)["moved"] for line in (run / "matchings.jsonl").read_text().splitlines()]
    assert moved == json.loads((run / "result.json").read_text())["labels_moved"]


def test_sync_all_sends_every_run_and_marks_killed_runs(
    trained: Path, mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    import mlflow

    copy_as_another_run(trained, tmp_path / "runs/whole", "synced with all")
    killed = copy_as_another_run(trained, tmp_path / "runs/deeper/killed", "killed")
    spool = killed / "events/events.jsonl"
    *kept, end = spool.read_text().splitlines(keepends=True)
    assert json.loads(end)["e"] == "end"
    spool.write_text("".join(kept))
    (tmp_path / "runs/submitted/slurm").mkdir(parents=True)
    (tmp_path / "runs/submitted/slurm/job.json").write_text("{}")

    done = run_here("sync", "--all", tmp_path / "runs", "--uri", mlflow_server.uri, "--json")
    assert done.code == 0, done.error
    sent = {Path(run["run_dir"]).name: run for run in done.result["runs"]}
    assert set(sent) == {"whole", "killed"}
    assert {run["left"] for run in sent.values()} == {0}
    client = mlflow.MlflowClient(mlflow_server.uri)
    states = {name: client.get_run(run["run_id"]).info.status for name, run in sent.items()}
    assert states == {"whole": "FINISHED", "killed": "KILLED"}
    again = run_here("sync", "--all", tmp_path / "runs", "--uri", mlflow_server.uri, "--json")
    assert [run["events_sent"] for run in again.result["runs"]] == [0, 0]


@pytest.mark.thorough
@pytest.mark.parametrize(("nproc", "count"), [(3, 103), (2, 7), (3, 1)])
def test_validation_counts_exactly(
    nproc: int, count: int, train: Callable[..., Training], digits: Path, tmp_path: Path
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
    finished = training.finish()
    assert finished.result["num_validated"] == count
    totals = json.loads((training.run / "validation.json").read_text())["class_total"]
    assert totals == [len(range(c, count, 10)) for c in range(10)]
    if count == 103:
        alone = run_here("evaluate", training.run, "--json")
        assert alone.result["num_validated"] == count
        assert alone.result["top1"] == finished.result["top1_last"]
