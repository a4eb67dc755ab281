"""The output of a finished run ends with its best epoch, its summary page and the next commands."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from dl2pa import envvars
from dl2pa.cli import build_parser
from dl2pa.commands.next_steps import next_steps
from dl2pa.rundir import RunDirectory

RESULT = {"top1_best": 61.5, "top1_last": 61.5, "epoch_best": 7, "mlflow_run_id": "abc"}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    folder = tmp_path / "my runs" / "digits"
    folder.mkdir(parents=True)
    return RunDirectory(folder)


def test_best_epoch_and_summary_page_are_named(run: RunDirectory) -> None:
    best, following, *_ = next_steps(run, RESULT).splitlines()
    assert best == "best:     epoch 7, top-1 61.50 %"
    assert following == "next:"
    run.summary_page.touch()
    best, summary, *_ = next_steps(run, {**RESULT, "top1_last": 60.0}).splitlines()
    assert best == "best:     epoch 7, top-1 61.50 % (last: 60.00 %)"
    assert summary == f"summary:  {run.root / 'summary.html'}"


def test_result_of_an_older_version_has_no_best_epoch(run: RunDirectory) -> None:
    old = {key: value for key, value in RESULT.items() if key != "epoch_best"}
    assert next_steps(run, old).startswith("best:     top-1 61.50 %\n")


@pytest.mark.parametrize("local_store", [False, True])
def test_next_commands_exist_and_name_the_run(run: RunDirectory, local_store: bool) -> None:
    if local_store:
        (run.root.parent / "mlflow.db").touch()
    lines = next_steps(run, RESULT).partition("next:\n")[2].splitlines()
    commands = [shlex.split(line.partition("#")[0])[1:] for line in lines]
    assert [command[0] for command in commands] == ["predict", "evaluate", "export", *["ui"] * local_store]
    for command in commands:
        args = build_parser(command[0]).parse_args(command)
        place = args.runs if command[0] == "ui" else args.model if command[0] == "predict" else args.run
        assert place == (run.root.parent if command[0] == "ui" else run.root)


def test_commands_in_a_container_start_a_container(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(envvars.IMAGE, "unknown")
    (run.root.parent / "mlflow.db").touch()
    text = next_steps(run, RESULT)
    assert "docker run … IMAGE evaluate" in text
    assert "docker run -p 5000:5000 … IMAGE ui" in text
    assert "--host 0.0.0.0" in text
