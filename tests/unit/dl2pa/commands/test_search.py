"""`dl2pa search`: refused input, planned trials, and a changed search file, without training."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dl2pa.cli import main
from dl2pa.commands import search as search_command
from dl2pa.search.journal import Header, Journal, Trial

TINY: dict[str, Any] = {
    "data": {"dataset": "synthetic", "num_classes": 5, "synthetic_samples": [64, 20], "image_size": 8},
    "model": {"backbone": "resnet8", "embedding_dim": 3, "widths": [4, 4, 4]},
    "train": {"epochs": 4, "batch_size": 8},
    "tracking": {"uri": "none"},
    "launch": {"device": "cpu"},
}
SEARCH: dict[str, Any] = {
    "config": "tiny.yaml",
    "parameters": {"optim.lr": {"log_uniform": [0.01, 1]}, "train.batch_size": {"choice": [8, 16]}},
    "trials": 3,
}
Command = Callable[..., tuple[int, dict[str, Any]]]
needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="optuna is not installed"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


@pytest.fixture
def search(capsys: pytest.CaptureFixture[str]) -> Command:
    """Call ``dl2pa search`` with changes to the search file; returns exit code and JSON output."""

    def call(*arguments: str, **changes: Any) -> tuple[int, dict[str, Any]]:
        Path("lr.yaml").write_text(yaml.safe_dump({"search": {**SEARCH, **changes}}))
        code = main(["search", "lr.yaml", "--json", *arguments])
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def parameters(**forms: Any) -> dict[str, Any]:
    return {"parameters": {key.replace("__", "."): form for key, form in forms.items()}}


@needs_optuna
@pytest.mark.parametrize(
    ("arguments", "changes", "field"),
    [
        ([], {"config": "gone.yaml"}, "config"),
        ([], parameters(optim__lrr={"uniform": [0.1, 1]}), "optim.lrr"),
        ([], parameters(optim__lr={"uniform": [-1, 1]}), "optim.lr"),
        ([], parameters(train__batch_size={"choice": [8, 128]}), "train.batch_size"),
        ([], parameters(train__batch_size={"choice": [8, 128, 16]}), "train.batch_size"),
        ([], parameters(optim__lr={"uniform": [1, 0.1]}), "search.parameters.optim.lr"),
        ([], parameters(launch__threads={"integer": [1, 2]}), "search.parameters"),
        ([], {"overrides": {"tracking.enabled": False}}, "tracking.enabled"),
        ([], {"prune": {"first_epoch": 4}}, "search.prune.first_epoch"),
        ([], {"metric": "top1_tail"}, "search.metric"),
        (["optim.lr=0.1"], {}, "override"),
        (["optim.name=sdg"], {}, "optim.name"),
        (["--trials", "0"], {}, "--trials"),
        (["--parallel", "0"], {}, "--parallel"),
        (["--here"], {}, "--here"),
        (["--controller", "partition=cpu"], {}, "--controller"),
        (["--nodes", "2"], {}, "--nodes"),
        (["--run-dir", "lr.yaml"], {}, "run-dir"),
    ],
)
def test_a_wrong_search_is_refused_before_anything_is_written(
    arguments: list[str], changes: dict[str, Any], field: str, search: Command, folder: Path
) -> None:
    code, output = search(*arguments, **changes)
    assert code == 2 and output["error"]["field"] == field, output
    assert output["error"]["remedy"] and "problems" not in output["error"]
    assert sorted(path.name for path in folder.iterdir()) == ["lr.yaml", "tiny.yaml"]


def test_a_missing_optuna_is_refused_with_the_name_of_the_extra(
    search: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name))
    code, output = search()
    assert code == 2 and (output["error"]["field"], output["error"]["value"]) == ("search", "optuna")
    assert ".[search]" in output["error"]["remedy"]


@needs_optuna
def test_warnings_about_settings_are_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("lr.yaml").write_text(yaml.safe_dump({"search": SEARCH}))
    assert main(["search", "lr.yaml", "--dry-run", "method.loss=squared_cosine", "method.scale=9"]) == 0
    assert capsys.readouterr().err.count("warning: method.scale is ignored: the loss is squared_cosine.") == 1


@needs_optuna
def test_a_dry_run_shows_the_command_of_the_first_trial(search: Command, folder: Path) -> None:
    code, output = search("--dry-run", "train.epochs=6")
    assert code == 0
    program, command, config, epochs, lr, batch_size = output["command"]
    assert (program, command, config, epochs) == ("dl2pa", "train", "tiny.yaml", "train.epochs=6")
    assert 0.01 <= float(lr.removeprefix("optim.lr=")) <= 1
    assert batch_size in ("train.batch_size=8", "train.batch_size=16")
    assert search("--dry-run", "train.epochs=6")[1] == output
    assert not (folder / "runs").exists()


@needs_optuna
@pytest.mark.parametrize(
    ("arguments", "changes", "field"),
    [
        ([], {"seed": 1}, "search.seed"),
        ([], {"metric": "top5"}, "search.metric"),
        ([], {"direction": "minimize"}, "search.direction"),
        ([], {"prune": {"first_epoch": 2}}, "search.prune"),
        ([], parameters(optim__lr={"uniform": [0.1, 1]}), "search.parameters"),
        (["train.epochs=5"], {}, "search.config"),
    ],
)
def test_a_changed_search_is_refused_and_a_larger_budget_is_not(
    arguments: list[str], changes: dict[str, Any], field: str, search: Command, folder: Path
) -> None:
    """The journal of a search of these keys, as its first command writes it."""
    from dl2pa.commands import search as command

    headers: list[Header] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            command, "print_dry_run", lambda plan, _: headers.append(plan.header()) or print("{}") or 0
        )
        search("--dry-run")
    journal = Journal(folder / "runs/lr")
    journal.begin(headers[0])
    journal.close()
    code, output = search("--dry-run", *arguments, **changes)
    assert code == 2 and output["error"]["field"] == field, output
    assert "--run-dir" in output["error"]["remedy"]
    code, output = search("--dry-run", "--trials", "9", "--parallel", "3", "tracking.experiment=other")
    assert code == 0 and output["command"]


@needs_optuna
def test_trials_use_the_store_of_a_folder_of_any_name(
    folder: Path, search: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris: list[str | None] = []

    def drive(plan: Any, executor: Any, uri: str, planner: Any, as_json: bool) -> int:
        trial = Trial(0, {"optim.lr": 0.1, "train.batch_size": "8"}, {})
        uris.extend([uri, planner(trial, {}).plan.config.tracking.uri])
        print("{}")
        return 7

    monkeypatch.setattr(search_command, "drive", drive)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    place = folder / "a $HOME ${X} b"
    code, _ = search("--run-dir", str(place / "lr"), overrides={"tracking.uri": None})
    assert (code, uris) == (7, [f"sqlite:///{place}/mlflow.db"] * 2)
