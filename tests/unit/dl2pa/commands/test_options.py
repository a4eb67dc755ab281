"""Options that a command cannot use: each is named, with what it held."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dl2pa.cli import main

CONFIG = Path(__file__).resolve().parents[4] / "configs/quickstart.yaml"
PLACE = ["prototypes", "--num-classes", "5", "--dim", "6"]


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["sync", "RUN", "--uri", "foo://x"], "--uri"),
        (["sync", "RUN", "--uri", "none"], "--uri"),
        (["register", "RUN", "--name", "a", "--uri", "none"], "--uri"),
        (["report", "RUN", "--uri", "sqlite:///a.db"], "--uri"),
        (["ui", "--uri", "foo://x"], "--uri"),
        (["ui", "--uri", "sqlite:///TMP/none/x.db"], "--uri"),
        (["report", "--compare", "RUN", "RUN", "RUN"], "--compare"),
        (["sweep", "CONFIG", "--seeds", "4..0"], "--grid"),
        (["sweep", "CONFIG", "--variant", "none"], "--variant"),
        (["sweep", "CONFIG", "--run-dir", "/proc/runs", "--dry-run"], "run-dir"),
        (["evaluate", "RUN", "model.backbone=resnet20"], "model.backbone"),
        (["evaluate", "RUN", "optim.lr=0.1"], "optim.lr"),
        ([*PLACE, "--seed", "-1"], "--seed"),
        ([*PLACE, "--dim", "0"], "--dim"),
        ([*PLACE, "--construction", "polygon"], "--construction"),
        ([*PLACE, "--out", "TMP/p.txt"], "--out"),
        ([*PLACE, "--construction", "their.pth"], "--construction"),
        ([*PLACE, "--compare-with", "TMP/none.pth"], "--compare-with"),
        ([*PLACE, "--compare-with", "TMP"], "--compare-with"),
        (["data", "index", "TMP", "--out", "TMP"], "--out"),
    ],
)
def test_what_cannot_be_used_is_named(
    words: list[str], field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    stands = {"RUN": str(tmp_path / "run"), "TMP": str(tmp_path), "CONFIG": str(CONFIG)}
    asked = words
    for word, path in stands.items():
        asked = [text.replace(word, path) for text in asked]
    assert main([*asked, "--json"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["field"] == field
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "nothing was made"


def test_a_host_that_is_none_is_blamed_and_not_the_port(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.db").touch()
    assert main(["ui", "--runs", str(tmp_path), "--host", "no such host", "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["field"] == "--host"


def test_a_key_in_grid_and_variant_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"sweep: {{config: {CONFIG}, grid: {{optim.lr: [0.1, 0.2]}}, variants: {{slow: {{optim.lr: 0.01}}}}}}\n"
    )
    assert main(["sweep", str(file), "--dry-run", "--json"]) == 2
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert (error["field"], error["value"]) == ("sweep.variants.slow", "optim.lr")
    file.write_text(f"sweep: {{config: {CONFIG}, seeds: 0..1}}\n")
    assert main(["sweep", str(file), "--run-dir", str(tmp_path / "runs"), "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["commands"]) == 2


def test_a_home_folder_that_the_shell_did_not_expand_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bash does not expand `--run-dir=~/runs`, which would make a folder named ~."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(CONFIG), "--run-dir=~/run", "--json"]) == 2
    assert "./~/run" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "defaults"), [("submit", 4), ("resume", 0)])
def test_help_of_resume_names_no_defaults_because_it_keeps_the_last_job(
    command: str, defaults: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    job = capsys.readouterr().out.partition("SLURM job:")[2]
    assert job.count("(default: ") == defaults
    assert ("of the last job" in job) == (command == "resume")
