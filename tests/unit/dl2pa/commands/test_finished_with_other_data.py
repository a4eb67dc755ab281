"""A finished run is finished only with the data that it was trained on."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from dl2pa.errors import UserError
from dl2pa.finished import FinishedRuns
from dl2pa.rundir import RunDirectory
from dl2pa.runplan import RunPlan, RunSpec, plan_runs
from support.commands import Completed, run_here

CONFIG: dict[str, Any] = {
    "data": {"dataset": "imagefolder", "image_size": 8},
    "model": {"backbone": "resnet8", "embedding_dim": 3, "widths": [4, 4, 4]},
    "train": {"epochs": 1, "batch_size": 4},
    "tracking": {"enabled": False},
    "launch": {"device": "cpu", "threads": 1},
}
ROOT = "data.root=images"


def make_images(root: Path, size: int = 10, classes: tuple[str, ...] = ("cat", "dog")) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                color = (50 * number, 90, 20 * size)
                Image.new("RGB", (size, size), color).save(root / split / name / f"{number}.bmp")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    make_images(folder / "images")
    done = run_here("train", "tiny.yaml", ROOT, "--run-dir", "run", folder=folder)
    assert done.code == 0, done.error
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return RunDirectory(tmp_path / "run")


def train(*overrides: str) -> Completed:
    return run_here("train", "tiny.yaml", *overrides, "--run-dir", "run", "--json")


def submit(*overrides: str) -> Completed:
    return run_here("submit", "tiny.yaml", *overrides, "--run-dir", "run", "--json", "--gpus-per-node", "0")


def plan(*overrides: str) -> RunPlan:
    (planned,) = plan_runs([RunSpec(Path("tiny.yaml"), overrides)], Path("run"))
    return planned


@pytest.mark.parametrize("command", [train, submit])
@pytest.mark.parametrize("change", ["root", "in place", "classes", "named classes", "gone"])
def test_other_data_is_refused_and_changes_nothing(
    change: str, command: Callable[..., Completed], run: RunDirectory
) -> None:
    field, overrides = "data.root", ["data.root=other"]
    if change == "root":
        make_images(Path("other"), size=11)
    elif change == "in place":
        shutil.rmtree("images")
        make_images(Path("images"), size=11)
        overrides = [ROOT]
    elif change == "classes":
        make_images(Path("other"), classes=("cat", "cow"))
    elif change == "named classes":
        field, overrides = "data.classes", [ROOT, "data.classes=[cat, dog, elk]"]
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    done = command(*overrides)
    assert done.code == 2, done.output
    assert done.result["error"]["field"] == field
    if change != "gone":
        attempt = run.last_attempt()
        known = (
            attempt["data_classes"] if change in ("classes", "named classes") else attempt["data_fingerprint"]
        )
        assert known in done.result["error"]["message"]
    assert {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", [train, submit])
@pytest.mark.parametrize("how", ["same", "moved", "index", "named classes"])
def test_equal_data_is_finished(how: str, command: Callable[..., Completed], run: RunDirectory) -> None:
    overrides = [ROOT]
    if how == "moved":
        Path("images").rename("elsewhere")
        overrides = ["data.root=elsewhere"]
    elif how == "index":
        assert run_here("data", "index", "images", "--out", "x.index").code == 0
        overrides = [ROOT, "data.index=x.index"]
    elif how == "named classes":
        overrides = [ROOT, "data.classes=[cat, dog]"]
    done = command(*overrides)
    assert done.code == 0, done.error
    assert "is finished" in done.error and "the data was not" not in done.error


@pytest.mark.parametrize("command", [train, submit])
def test_finished_run_whose_data_is_gone_stays_finished_with_a_note(
    command: Callable[..., Completed], run: RunDirectory
) -> None:
    shutil.rmtree("images")
    done = command(ROOT)
    assert done.code == 0, done.error
    assert "is finished" in done.error
    assert "the data was not checked (data.root='images': " in done.error


def test_run_of_an_older_version_is_not_compared(run: RunDirectory) -> None:
    content = json.loads(run.environment.read_text(encoding="utf-8"))
    for key in ("data_fingerprint", "data_classes"):
        del content["attempts"][-1][key]
    run.environment.write_text(json.dumps(content), encoding="utf-8")
    make_images(Path("other"), size=11)
    done = train("data.root=other")
    assert done.code == 0, done.error
    assert "the data was not compared, because the run did not record it" in done.error


def test_resume_refuses_other_data(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("squeue", "sbatch"):
        Path(name).write_text("#!/bin/sh\n", encoding="utf-8")
        Path(name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path.cwd()}{os.pathsep}{os.environ['PATH']}")
    run.submission.mkdir()
    shutil.copy(run.config, run.submitted_config)
    job = {"job_id": "7", "log": "x", "name": "tiny", "cwd": str(Path.cwd()), "request": {"gpus_per_node": 0}}
    run.job.write_text(json.dumps(job), encoding="utf-8")
    make_images(Path("other"), size=11)
    messages = {}
    for root in ("images", "other"):
        done = run_here("resume", "run", f"data.root={root}", "--json")
        assert done.code == 2
        messages[root] = done.result["error"]["message"]
    assert messages["images"] == "is finished"
    assert "was trained on other images" in messages["other"]


def test_data_of_several_runs_is_opened_once(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dl2pa.training import data

    opened: list[str] = []
    open_split = data.open_split

    def counted(config: Any, split: Any) -> Any:
        opened.append(split)
        return open_split(config, split)

    monkeypatch.setattr(data, "open_split", counted)
    finished = FinishedRuns()
    with caplog.at_level(logging.WARNING):
        assert finished.among([plan(ROOT)] * 3) == [plan(ROOT)] * 3
    assert opened == ["train", "val"]
    assert not caplog.records
    make_images(Path("other"), size=11)
    for _ in range(2):
        with pytest.raises(UserError):
            finished.contains(plan("data.root=other"))
    assert opened == ["train", "val"] * 2


def test_run_with_another_configuration_opens_no_data(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dl2pa.training.data.open_split", None)
    assert not FinishedRuns().contains(plan(ROOT, "train.epochs=2"))
    run.write_status(state="stopped")
    assert not FinishedRuns().contains(plan(ROOT))
