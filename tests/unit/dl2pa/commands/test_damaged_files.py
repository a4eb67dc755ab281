"""Empty, damaged and wrongly typed files of a run: each is named, none is read as a default, other runs go on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from dl2pa.rundir import RunDirectory
from support.commands import Completed, run_here

CONFIG: dict[str, Any] = {
    "data": {"dataset": "synthetic", "num_classes": 5, "synthetic_samples": [32, 8], "image_size": 8},
    "model": {"backbone": "resnet8", "embedding_dim": 3, "widths": [4, 4, 4]},
    "method": {"match": {"warmup_epochs": 0, "every_epochs": 1}},
    "train": {"epochs": 2, "batch_size": 8},
    "checkpoint": {"every_steps": 4},
    "tracking": {"uri": "none"},
    "launch": {"device": "cpu", "threads": 1},
}
DAMAGES = {
    "empty": "",
    "cut off": '{"step"',
    "a list": "[]",
    "a number": "3",
    "deep": "[" * 100_000,
    "nested": '{"step": ' + "[" * 20 + "]" * 20 + "}",
    "binary": b"\xff\xfe\x00",
}
FINISHED, STOPPED = "finished", "stopped"
TRAIN = ["train", "tiny.yaml", "--run-dir", "runs/a"]
ROWS: list[tuple[str, str, str | bytes, list[str], int]] = [
    *(
        row
        for damage in ("", "[]", "- a\n", "x: [", b"\xff\xfe\x00", "data: {}\n", "data: 3\nmodel: {}\n")
        for row in (
            (FINISHED, "config.yaml", damage, ["report", "--all", "runs"], 0),
            (FINISHED, "config.yaml", damage, ["evaluate", "runs/a"], 2),
            (FINISHED, "config.yaml", damage, ["register", "runs/a", "--name", "x"], 2),
            (FINISHED, "config.yaml", damage, ["sync", "--all", "runs"], 1),
            (STOPPED, "config.yaml", damage, TRAIN, 2),
            (STOPPED, "slurm/config.yaml", damage, ["resume", "runs/a"], 2),
        )
    ),
    *(
        row
        for damage in (*DAMAGES.values(), "{}", '{"top1_last": "9"}', '{"top1_last": 9, "steps": []}')
        for row in (
            (FINISHED, "result.json", damage, TRAIN, 2),
            (FINISHED, "result.json", damage, ["report", "--all", "runs"], 0),
            (FINISHED, "result.json", damage, ["register", "runs/a", "--name", "x"], 2),
        )
    ),
    *(
        row
        for damage in (*DAMAGES.values(), '{"state": 3}', '{"state": "finished", "step": [1]}')
        for row in (
            (FINISHED, "status.json", damage, ["report", "--all", "runs"], 0),
            (FINISHED, "status.json", damage, ["jobs"], 0),
        )
    ),
    *(
        (FINISHED, "environment.json", damage, command, 0)
        for damage in (
            *DAMAGES.values(),
            '{"attempts": {}}',
            '{"attempts": [3]}',
            '{"attempts": [{"dl2pa": []}]}',
        )
        for command in (["report", "--all", "runs"], TRAIN)
    ),
    *(
        row
        for damage in (*DAMAGES.values(), '{"job_id": 7}', '{"job_id": "7", "request": {"nodes": "2"}}')
        for row in (
            (STOPPED, "slurm/job.json", damage, ["jobs"], 0),
            (STOPPED, "slurm/job.json", damage, ["resume", "runs/a"], 2),
        )
    ),
    *(
        (STOPPED, "logs/rank-0.error.json", damage, ["logs", "runs/a"], 0)
        for damage in (*DAMAGES.values(), '{"message": 3}', '{"message": "x", "time": "now"}')
    ),
    *(
        (FINISHED, "checkpoints/best.json", damage, ["evaluate", "runs/a", "--checkpoint", "best"], 0)
        for damage in (*DAMAGES.values(), '{"step": "8"}', "{}")
    ),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the configuration and the finished runs `a` and `b`."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    for name, seed in (("a", 0), ("b", 1)):
        command = ["train", "tiny.yaml", f"train.seed={seed}", "--run-dir", f"runs/{name}"]
        done = run_here(*command, folder=folder)
        assert done.code == 0, done.error
    run = RunDirectory(folder / "runs/a")
    run.submission.mkdir()
    shutil.copy(run.config, run.submitted_config)
    job = {"job_id": "7", "log": str(run.submission / "log"), "cwd": str(folder), "name": "tiny"}
    run.job.write_text(json.dumps(job), encoding="utf-8")
    (run.submission / "log").write_text("the log\n", encoding="utf-8")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    (tmp_path / "bin").mkdir()
    for name in ("squeue", "sbatch"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n", encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dl2pa.rundir._warned", set())
    directory = RunDirectory(Path("runs/a").absolute())
    job = json.loads(directory.job.read_text(encoding="utf-8"))
    directory.job.write_text(json.dumps({**job, "cwd": str(tmp_path)}), encoding="utf-8")
    return directory


def damage(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def said(done: Completed) -> str:
    return done.output + done.error


@pytest.mark.parametrize(
    ("state", "file", "content", "command", "code"),
    ROWS,
    ids=[f"{file}-{content[:20]!r}-{command[0]}" for _, file, content, command, _ in ROWS],
)
def test_a_damaged_file_is_named(
    state: str, file: str, content: str | bytes, command: list[str], code: int, run: RunDirectory
) -> None:
    before = {path: path.read_bytes() for path in (run.config, run.result, run.model)}
    if state == STOPPED:
        run.write_status(state=STOPPED)
    damage(run.root / file, content)
    done = run_here(*command)
    assert done.code == code, said(done)
    assert f"{Path(file).name}" in said(done) and "damaged" in said(done)
    assert (run.root / file).read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert all(path.read_bytes() == text for path, text in before.items() if path != run.root / file)


@pytest.mark.parametrize("content", ["", "[]", '{"state": "running", "attempt": "one"}'])
def test_a_run_with_a_damaged_status_continues_from_its_checkpoints(content: str, run: RunDirectory) -> None:
    result = run.read_result()
    damage(run.status_file, content)
    assert run.status()["state"] == "damaged"
    done = run_here(*TRAIN, "--json")
    assert done.code == 0, done.error
    assert (run.status()["state"], run.status()["attempt"]) == ("finished", 2)
    assert (done.result["steps"], done.result["top1_last"]) == (result["steps"], result["top1_last"])


@pytest.mark.parametrize("file", ["result.json", "config.yaml"])
def test_training_writes_a_deleted_file_again(file: str, run: RunDirectory) -> None:
    """The remedy of the errors about these files."""
    before, model = (run.root / file).read_bytes(), run.model.read_bytes()
    (run.root / file).unlink()
    done = run_here(*TRAIN)
    assert done.code == 0, done.error
    assert run.model.read_bytes() == model
    if file == "config.yaml":
        assert (run.root / file).read_bytes() == before
    else:
        assert run.read_result()["top1_last"] == json.loads(before)["top1_last"]


def test_a_result_without_checkpoints_is_not_trained_again(run: RunDirectory) -> None:
    model = run.model.read_bytes()
    shutil.rmtree(run.checkpoints)
    damage(run.result, "")
    done = run_here(*TRAIN, "--json")
    assert done.code == 2
    assert "backup" in done.result["error"]["remedy"]
    assert run.model.read_bytes() == model


def test_damaged_environment_is_kept_when_the_run_continues(run: RunDirectory) -> None:
    run.write_status(state=STOPPED)
    damage(run.environment, '{"attempts": [{"attempt": 1, "command": ["x"]}]}')
    done = run_here(*TRAIN)
    assert done.code == 0 and "command is a list, not text" in done.error
    assert '["x"]' in (run.root / "environment.damaged.json").read_text(encoding="utf-8")
    assert [attempt["attempt"] for attempt in run.attempts()] == [2]


def test_damaged_lines_of_the_assignment_updates_are_named(run: RunDirectory) -> None:
    lines = run.matchings.read_text(encoding="utf-8").splitlines()
    assert lines, "the run updated its assignment"
    run.write_status(state=STOPPED)
    bad = ['{"step": "1"}', '{"step": 1, "moves": [[1]]}', "{", "[" * 100_000]
    damage(run.matchings, "\n".join([*bad, *lines]) + "\n")
    done = run_here(*TRAIN)
    assert done.code == 0
    assert all(f"line {number}: " in done.error for number in range(1, len(bad) + 1))
    assert run.matchings.read_text(encoding="utf-8").splitlines() == lines


def test_a_sweep_goes_on_with_the_other_runs(run: RunDirectory) -> None:
    from dl2pa.runplan import expand, plan_runs

    plans = plan_runs(expand(Path("tiny.yaml"), (), ["train.seed=0,1"]), Path("runs"), in_folder=True)
    for plan, name in zip(plans, ("a", "b"), strict=True):
        Path("runs", name).rename(plan.run_dir)
    damage(plans[0].directory.result, "")
    done = run_here("sweep", "tiny.yaml", "--seeds", "0..1", "--run-dir", "runs", "--json")
    assert done.code == 1
    assert [row["outcome"] for row in done.result["runs"]] == ["failed", "finished"]
    assert "result.json" in done.result["runs"][0]["error"]
    assert done.error.splitlines()[-2].startswith("failed: ")


def test_commands_for_all_runs_list_the_damaged_one_last_and_do_the_others(run: RunDirectory) -> None:
    damage(run.config, "")
    report = run_here("report", "--all", "runs")
    assert "runs/b" in said(run_here("report", "--all", "runs", "--json"))
    assert "not compared: runs/a: unreadable, config.yaml is damaged (it is empty)" in report.error
    synced = run_here("sync", "--all", "runs")
    listed = [line for line in synced.error.splitlines() if line.startswith("not completely sent: ")]
    assert [line.split(": ")[1] for line in listed] == ["runs/a", "runs/b"]
    assert "config.yaml" in listed[0] and "no tracking server" in listed[1]
