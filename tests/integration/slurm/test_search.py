"""A search as a job that submits its trials as jobs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("optuna", reason="optuna is not installed")

from support.commands import Completed
from support.runs import IN_MEMORY, config_with, read_status
from support.slurm import Cluster, command

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.thorough]
SMALL = {
    "model": {"widths": [4, 8, 16]},
    "method": {"name": "psc", "loss": "cross_entropy", "scale": 14},
    "train": {"epochs": 3},
    "optim": {"warmup_epochs": 0},
    "data": IN_MEMORY,
}


def test_a_search_whose_job_is_cancelled_continues_with_its_running_trial(
    dl2pa: Callable[..., Completed],
    cluster: Cluster,
    digits: Path,
    tmp_path: Path,
    cancelled_afterward: list[str],
) -> None:
    config_with(tmp_path, digits, SMALL)
    grid = {"optim.lr": {"choice": [0.05, 1e-9]}}
    search = {"config": "small.yaml", "parameters": grid, "sampler": "grid", "trials": 2, "seed": 1}
    (tmp_path / "lr.yaml").write_text(yaml.safe_dump({"search": search}))
    folder = tmp_path / "lr"
    resources = ["--gpus-per-node=0", "--time=30", "--cpus-per-gpu=1"]
    words = ["search", tmp_path / "lr.yaml", "--slurm", "--run-dir", folder, *resources, "--json"]

    def queued() -> str:
        done = dl2pa(*words)
        assert done.code == 0, done.error
        cancelled_afterward.append(done.result["job_id"])
        return done.result["job_id"]

    def record(trial: int) -> dict[str, Any]:
        path = folder / f"trial-{trial:03d}/slurm/job.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def log() -> str:
        return (folder / "search.log").read_text() if (folder / "search.log").exists() else ""

    first = queued()
    cluster.wait(lambda: record(0), f"the first trial is queued:\n{log()}")
    cancelled_afterward.append(record(0)["job_id"])
    progress = dl2pa(*words)
    assert progress.code == 0 and f"the search is job {first}" in progress.error
    assert [trial["trial"] for trial in progress.result["trials"]] == [0]
    command("scancel", first)
    cluster.wait(lambda: cluster.is_over(first), "the job of the search has ended")
    before = record(0)["job_id"]

    second = queued()
    assert second != first
    assert cluster.finish(second) == "COMPLETED", log()
    report = dl2pa("report", folder, "--json")
    assert report.code == 0, report.error
    trials = report.result["trials"]
    assert [trial["state"] for trial in trials] == ["finished", "pruned"], log()
    assert report.result["best"]["parameters"] == {"optim.lr": "0.05"}
    assert record(0)["job_id"] == before, "the trial was not queued again"
    assert [read_status(Path(trial["run_dir"]))["attempt"] for trial in trials] == [1, 1]
    ended = dl2pa(*words)
    assert ended.code == 0 and ended.result["outcome"] == "finished"
    assert cluster.queue() == []
