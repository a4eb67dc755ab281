"""`dl2pa report`: output, files and refused arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dl2pa.cli import main
from dl2pa.config import dump_config, load_config


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two finished seeds of a published result in `p.yaml`, and one unfinished run."""
    monkeypatch.chdir(tmp_path)
    tiny = {"data": {"dataset": "synthetic", "num_classes": 5}, "train": {"epochs": 2, "batch_size": 8}}
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny))
    row = {"top1": [40.5], "config": "tiny.yaml", "suspect": "made up"}
    table = {"title": "Small", "column": "d", "columns": [512], "rows": {"dl2pa": row}}
    Path("p.yaml").write_text(yaml.safe_dump({"source": "a paper", "tables": {"small": table}}))
    for seed in range(3):
        run = tmp_path / f"runs/{seed}"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(dump_config(load_config("tiny.yaml", [f"train.seed={seed}"])))
        state = "finished" if seed < 2 else "stopped"
        (run / "status.json").write_text(json.dumps({"state": state, "step": 9}))
        result = {"top1_last": 30.0 + seed, "top1_best": 41.0 + seed, "num_validated": 20, "num_classes": 5}
        (run / "result.json").write_text(json.dumps({**result, "epochs": 2, "steps": 16}))
    return tmp_path / "runs"


def test_the_output_is_a_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--all", "runs", "--published", "--tables", "p.yaml", "--out", "out"]) == 0
    output = capsys.readouterr()
    head, line = output.out.splitlines()
    assert head.split() == ["table", "method", "column", "published", "best", "last", "n", "length"]
    assert line.split() == [
        *("small", "dl2pa", "512", "40.5", "suspect"),
        *("41.50", "±", "0.71", "30.50", "±", "0.71", "2", "full"),
    ]
    assert "not compared: runs/2: stopped, at step 9" in output.err
    assert "out/report.html" in output.err
    assert Path("out/report.md").read_text(encoding="utf-8").startswith("# Comparison with published results")


def test_json_output(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "runs/0", "runs/1", "--tables", "p.yaml", "--json"]) == 0
    output: dict[str, Any] = json.loads(capsys.readouterr().out)
    (cell,) = output["tables"]["small"]
    assert (cell["suspect"], cell["ours"][0]["top1_best"]["mean"]) == ("made up", 41.5)
    assert (output["unfinished"], output["files"], output["mlflow_run_id"]) == ([], [], None)
    assert not Path("out").exists()


def test_runs_without_published_tables(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--all", "runs", "--json", "--out", "out"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert (output["tables"], [other["n"] for other in output["others"]]) == ({}, [2])
    assert [Path(name).name for name in output["files"][:3]] == ["report.md", "report.html", "report.json"]
    assert all(Path(name).is_file() for name in output["files"])


def test_the_shipped_tables_are_found_from_anywhere(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--all", "runs", "--published", "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert len(output["tables"]["cifar100"]) == 16
    assert [other["n"] for other in output["others"]] == [2]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ([], "run"),
        (["--published"], "run"),
        (["runs"], "run"),
        (["gone"], "run"),
        (["--all", "gone"], "--all"),
        (["--all", "tiny.yaml"], "--all"),
        (["runs/0", "--tables", "gone.yaml"], "config"),
        (["runs/0", "--tables", "tiny.yaml"], "published"),
        (["runs/0", "--out", "tiny.yaml"], "--out"),
        (["runs/0", "--mlflow", "x", "--uri", "none"], "--uri"),
        (["runs/0", "--mlflow", "x", "--uri", "sqlite:////proc/none/x.db"], "--uri"),
        (["runs/0", "train.epochs=3"], "run"),
        (["runs/0", "--mlflow", ""], "--mlflow"),
        (["runs/0", "--mlflow", " "], "--mlflow"),
        (["--compare", "runs/0", "runs/1", "--metric", "ece_last"], "--metric"),
        (["--compare", "runs/0", "runs/1", "--uri", "http://x"], "--uri"),
        (["runs/0", "--paired", "x", "--uri", "http://x"], "--uri"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_invalid_arguments_are_a_user_error(
    arguments: list[str], field: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *arguments, "--json"]) == 2
    output = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert output["field"] == field
    assert output["message"] and output["remedy"]


def test_a_repeated_report_replaces_the_files_of_its_mlflow_run(
    runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mlflow = pytest.importorskip("mlflow")
    command = ["report", "--all", "runs", "--tables", "p.yaml", "--mlflow", "compare", "--json"]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])["mlflow_run_id"]
    (runs / "2/status.json").write_text('{"state": "finished"}')
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["mlflow_run_id"] == first
    client = mlflow.MlflowClient(f"sqlite:///{runs}/mlflow.db")
    experiment = client.get_experiment_by_name("compare")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (first, "report", "FINISHED")
    files = {item.path for item in client.list_artifacts(first)}
    assert files == {"report.md", "report.html", "report.json", "plots"}
    assert "published figures have runs of full length" in run.data.tags["mlflow.note.content"]
    assert "| published |" in run.data.tags["mlflow.note.content"]
    gaps = {name: value for name, value in run.data.metrics.items() if name.startswith("gap/")}
    report = Path(client.download_artifacts(first, "report.json", str(tmp_path)))
    cells = json.loads(report.read_text())["tables"]["small"]
    full = next(cell for cell in cells if cell["ours"])
    expected = full["ours"][0]["top1_best"]["mean"] - full["published"]
    assert gaps == {f"gap/small/{full['row']}/{full['column']}": pytest.approx(expected)}
    assert sorted(run.data.metrics)[-1].startswith("last_std/")
    assert json.loads(report.read_text())["tables"]["small"][0]["ours"][0]["n"] == 3
