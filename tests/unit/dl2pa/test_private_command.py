"""Arguments that other users of the machine cannot read."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from dl2pa import cli, private_command
from dl2pa.commands.sweep import train_task
from dl2pa.config.sweep import load_sweep
from dl2pa.process import dl2pa_command
from dl2pa.runplan import RunSpec, plan_runs
from launcher.local import agent_command
from launcher.node import Node
from launcher.pool import Pool, Task
from support.secrets import SECRET

URL = f"https://hooks.example.org/{SECRET}"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text("data: {dataset: synthetic, num_classes: 5}\n", encoding="utf-8")
    return file


def test_overrides_of_a_sweep_file_are_not_on_a_command_line(config: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    tree = {"config": "tiny.yaml", "overrides": {"notify.url": URL, "notify.command": ["curl", SECRET]}}
    file.write_text(yaml.safe_dump({"sweep": tree}), encoding="utf-8")
    overrides = tuple(load_sweep(file).override_texts())
    (plan,) = plan_runs([RunSpec(config, overrides)], tmp_path / "runs", in_folder=True)
    task = train_task(plan, 2, ['tracking.tags.sweep="a"'])
    with task.opened() as (command, standard_input):
        shown = [
            "-P",
            "-m",
            "dl2pa.private_command",
            "train",
            str(config),
            "--run-dir",
            str(plan.run_dir),
            "--json",
        ]
        assert command == [sys.executable, *shown]
        assert json.loads(os.read(standard_input, 10_000)) == task.command[4:]
        assert [word for word in task.command if SECRET in word] == list(overrides)


def test_overrides_are_not_on_the_command_line_of_the_agent(tmp_path: Path) -> None:
    overrides = [f"notify.url={URL}", f" notify.url ={URL}", "tracking.tags.my-tag=x", "launch.nproc=2"]
    arguments = ["train", "c.yaml", *overrides, "--run-dir", "/runs/a=b"]
    words = agent_command(2, ["dl2pa.cli"], arguments, Node(0, 1, "localhost", 0, "local"), tmp_path)
    assert words[-4:] == ["train", "c.yaml", "--run-dir", "/runs/a=b"]


def test_a_task_of_the_pool_gets_its_arguments(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("queue", "yaml"):  # files of the user with the names of modules
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    log = tmp_path / "log"
    task = Task(
        dl2pa_command(["config", str(config), "optim.lr=0.3125", "tracking.run_name=it's; so"]), log, {}
    )
    assert Pool([{}]).run([task]) == [0], log.read_text()
    assert "lr: 0.3125" in log.read_text() and "run_name: it's; so" in log.read_text()


def test_the_recorded_command_has_all_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments, seen = ["train", "c.yaml", "optim.lr=1"], list[list[str]]()
    file = tmp_path / "input"
    file.write_text(json.dumps(arguments), encoding="utf-8")
    monkeypatch.setattr(cli, "main", lambda: seen.append(sys.argv[1:]) or 75)
    monkeypatch.setattr(sys, "argv", ["dl2pa", "train"])
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    with file.open(encoding="utf-8") as standard_input:
        monkeypatch.setattr(sys, "stdin", standard_input)
        assert private_command.main() == 75
    assert seen == [arguments]
