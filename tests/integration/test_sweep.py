"""A real sweep, stopped and continued by the same command, and what `dl2pa report` makes of it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from support.commands import run_here
from support.runs import IN_MEMORY, STOPPED, Program, config_with, read_status
from support.waiting import eventually

pytestmark = pytest.mark.xdist_group("runs")
FAILED = 1
SEEDS = (0, 1)
STEPS = 58
SMALL = {"train": {"epochs": 2, "eval_every_epochs": 2}, "optim": {"warmup_epochs": 0}, "data": IN_MEMORY}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def command(digits: Path, tmp_path: Path, place: Path) -> list[Any]:
    """Two seeds, one run at a time."""
    config = config_with(tmp_path / "config", digits, SMALL)
    return ["sweep", config, "--seeds", "0..1", "--parallel", "1", "--run-dir", place, "--json"]


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A published table whose cells are the sweep's runs."""
    row = {
        "top1": [33.25],
        "config": "config/small.yaml",
        "overrides": ["method.name=dl2pa"],
    }
    table = {"title": "Digits", "column": "d", "columns": [5], "num_validated": 359, "rows": {"dl2pa": row}}
    path = tmp_path / "published.yaml"
    path.write_text(yaml.safe_dump({"source": "made up", "tables": {"digits": table}}))
    return path


def processes_below(folder: Path) -> list[int]:
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "train" in words and any(word.startswith(str(folder)) for word in words):
            found.append(int(entry.name))
    return found


def test_stopped_sweep_resumes_by_the_same_command(
    command: list[Any], place: Path, tables: Path, program: Program, tmp_path: Path
) -> None:
    first = program.start(*command)

    def under_way() -> bool:
        assert first.running(), first.error
        return sum(read_status(run).get("step", 0) >= 3 for run in place.glob("*")) >= 1

    eventually(under_way, "a run is under way")
    os.kill(first.pid, signal.SIGTERM)
    stopped_sweep = first.completed()
    assert stopped_sweep.code == STOPPED, first.error
    assert processes_below(place) == []
    told = stopped_sweep.result
    assert told["outcome"] == "stopped"
    assert (told["failed"], told["stopped"], told["waiting"], told["finished"]) == (0, 1, 1, 0)
    assert "the same command resumes" in first.error
    stopped = {
        Path(run["run_dir"]): run["steps"]
        for run in told["runs"]
        if run["outcome"] == "stopped" and run["steps"] is not None  # else it had not begun
    }
    assert stopped
    for run, steps in stopped.items():
        assert read_status(run)["state"] == "stopped"
        assert (run / "checkpoints" / f"step-{steps:09d}" / "COMPLETE").exists(), "saved before it left"

    second = program.run(*command)
    assert second.code == 0, second.error
    again = second.result
    assert (again["outcome"], again["finished"], again["sweep"]) == ("finished", 2, told["sweep"])
    assert [run["run_dir"] for run in again["runs"]] == [run["run_dir"] for run in told["runs"]]
    swept = [f"train.seed={seed}" for seed in SEEDS]
    assert [" ".join(run["swept"]) for run in again["runs"]] == swept
    for run in again["runs"]:
        path = Path(run["run_dir"])
        assert read_status(path)["attempt"] == (2 if path in stopped else 1)
        assert (
            run["steps"] == STEPS
            and run["top1_last"] == json.loads((path / "result.json").read_text())["top1_last"]
        )
        config = yaml.safe_load((path / "config.yaml").read_text())
        assert config["tracking"]["tags"] == {"sweep": told["sweep"]}

    third = run_here(*command)
    assert third.code == 0 and third.result == again
    assert "starts" not in third.error
    for_people = run_here(*command[:-1])
    rows = [line.split() for line in for_people.output.splitlines()[1:]]
    assert [(row[0], row[1]) for row in rows] == [(name, "finished") for name in swept]

    _assert_reported(again, tables, place, tmp_path)


def _assert_reported(sweep: dict[str, Any], tables: Path, place: Path, out: Path) -> None:
    done = run_here(
        "report", "--all", place, "--published", "--tables", tables, "--out", out / "report", "--json"
    )
    assert done.code == 0, done.error
    lines = done.result["tables"]["digits"]
    markdown = (out / "report/report.md").read_text()
    page = (out / "report/report.html").read_text()
    values = np.array([run["top1_last"] for run in sweep["runs"]])
    (ours,) = lines[0]["ours"]
    assert (lines[0]["row"], lines[0]["published"], ours["length"]) == ("dl2pa", 33.25, "full")
    assert (ours["n"], ours["seeds"]) == (2, [0, 1])
    assert ours["top1_last"]["mean"] == pytest.approx(values.mean())
    assert ours["top1_last"]["std"] == pytest.approx(values.std(ddof=1))
    figure = f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
    assert figure in markdown and figure in page
    assert done.result["others"] == [] and done.result["unfinished"] == []
    assert len(list((out / "report/plots").iterdir())) == 1


@pytest.mark.thorough
def test_failed_run_of_a_sweep_is_named_and_stops_no_other(
    digits: Path, tmp_path: Path, place: Path, program: Program
) -> None:
    config = config_with(tmp_path / "config", digits, {**SMALL, "train": {"max_steps": 3}})
    grid = ["--grid", "optim.lr=1.0e+30,0.1"]
    done = program.run("sweep", config, *grid, "--run-dir", place, "--json")
    assert done.code == FAILED, done.error
    bad, good = done.result["runs"]
    assert (done.result["outcome"], bad["outcome"], good["outcome"]) == ("failed", "failed", "finished")
    assert "finite" in bad["error"]
    assert f"failed: optim.lr=1.0e+30: {bad['error']}; see {bad['log']}" in done.error
    assert "finite" in Path(bad["log"]).read_text()


def test_killed_sweep_leaves_no_running_process(command: list[Any], place: Path, program: Program) -> None:
    sweep = program.start(*command, "train.epochs=200", "--parallel", "2")

    def two_run() -> bool:
        assert sweep.running(), sweep.error
        return len(processes_below(place)) >= 2

    eventually(two_run, "two runs have begun")
    os.kill(sweep.pid, signal.SIGKILL)
    eventually(lambda: not processes_below(place), "the runs are gone", 30)
