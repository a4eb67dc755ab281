"""Hints for misspelled commands and options, and for options that are configuration keys."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dl2pa.cli import main

ROOT = Path(__file__).resolve().parents[4]
OVERRIDABLE = ("train", "submit", "resume", "sweep", "estimate", "evaluate", "config")


def errors_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    assert main([*words, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    problems = error.get("problems", [error])
    assert {problem["field"] for problem in problems} == {"command line"}
    return problems


@pytest.mark.parametrize("command", OVERRIDABLE)
@pytest.mark.parametrize(
    ("option", "use"),
    [
        (["--lr", "0.1"], "optim.lr=0.1"),
        (["--lr=0.1"], "optim.lr=0.1"),
        (["--epochs", "3"], "train.epochs=3"),
        (["--batch-size", "64"], "train.batch_size=64"),
        (["--optim.lr", "0.1"], "optim.lr=0.1"),
        (["--weigth-decay", "1"], "optim.weight_decay=1"),
        (["--sync-bn"], "train.sync_bn=true"),
        (["--bf16"], "train.precision=bf16"),
        (["--no-figures"], "tracking.figures=false"),
        (["--seed"], "train.seed=VALUE"),
        (["--root", "a b"], "'data.root=a b'"),
    ],
)
def test_an_option_that_is_a_key_is_translated(
    command: str, option: list[str], use: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (error,) = errors_of([command, "a.yaml", *option], capsys)
    assert (error["value"], error["message"]) == (option[0].partition("=")[0], "unknown option")
    assert error["remedy"] == f"Use {use}. See `dl2pa {command} --help`."


@pytest.mark.parametrize(
    ("command", "use"),
    [
        ("train", "--nproc 4"),
        ("submit", "--gpus-per-node 4"),
        ("resume", "--gpus-per-node 4"),
        ("estimate", "--devices 4"),
        ("sweep", "launch.nproc=4, or --slurm --gpus-per-node 4"),
        ("config", "launch.nproc=4"),
    ],
)
def test_the_number_of_gpus_is_translated(command: str, use: str, capsys: pytest.CaptureFixture[str]) -> None:
    (error,) = errors_of([command, "a.yaml", "--gpus", "4"], capsys)
    assert error["remedy"].startswith(f"Use {use}. ")


@pytest.mark.parametrize("command", ["train", "submit", "sweep", "estimate", "config"])
@pytest.mark.parametrize("option", [["--config", "a.yaml"], ["--config=a.yaml"], ["-c", "a.yaml"]])
def test_the_configuration_needs_no_option(
    command: str, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (error,) = errors_of([command, *option], capsys)
    assert f"dl2pa {command} a.yaml" in error["remedy"]


@pytest.mark.parametrize(
    ("word", "meant"), [("trian", "train"), ("sumbit", "submit"), ("eval", "evaluate"), ("status", "jobs")]
)
def test_a_misspelled_command_is_corrected(word: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    (error,) = errors_of([word, "a.yaml", "--lr", "3"], capsys)
    assert (error["value"], error["message"]) == (word, "unknown command")
    assert error["remedy"] == f"Did you mean {meant}? See `dl2pa --help`."


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["train", "a.yaml", "--run-dr", "x"], "--run-dir"),
        (["jobs", "--jsn"], "--json"),
        (["data", "indx", "."], "index"),
        (["evaluate", "run", "--checkpoint", "bset"], "best"),
        (["a.yaml"], "train a.yaml"),
    ],
)
def test_a_misspelled_option_or_choice_is_corrected(
    words: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (error,) = errors_of(words, capsys)
    assert error["remedy"].startswith(f"Did you mean {meant}? ")


def test_all_unknown_options_are_reported_together(capsys: pytest.CaptureFixture[str]) -> None:
    errors = errors_of(["train", "--lr", "0.1", "a.yaml", "--epochs=3", "optim.name=sgd", "--zzzz"], capsys)
    assert [error["value"] for error in errors] == ["--lr", "--epochs", "--zzzz"]
    assert errors[2]["remedy"] == "See `dl2pa train --help`."


def test_hints_load_no_torch() -> None:
    code = "import sys; from dl2pa.cli import main; c = main(sys.argv[1:]); sys.exit(c + ('torch' in sys.modules))"
    for words in (["train", "a.yaml", "--lr", "0.1"], ["trian"]):
        command = [sys.executable, "-c", code, *words]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 2
