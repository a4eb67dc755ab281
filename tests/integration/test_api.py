"""Train from Python, stop and resume, and load the result."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import dl2pa
from support.runs import IN_MEMORY, config_with, read_status
from support.waiting import eventually


def test_a_stopped_run_resumes_and_returns_its_result(digits: Path, tmp_path: Path) -> None:
    config = config_with(tmp_path, digits, {"data": IN_MEMORY, "launch": {"nproc": 2}})
    run = tmp_path / "run"

    def stop() -> None:
        eventually(lambda: read_status(run).get("step", 0) >= 35, "the second epoch")
        (run / "stop").touch()

    stopper = threading.Thread(target=stop)
    stopper.start()
    stopped = dl2pa.train(config, run_dir=run, train={"epochs": 500, "eval_every_epochs": 1}, quiet=True)
    stopper.join()
    step = read_status(run)["step"]
    assert json.loads((run / "environment.json").read_text())["attempts"][0]["world_size"] == 2
    assert (stopped.state, stopped.run_dir) == ("stopped", run)
    epochs = step // 29
    assert stopped.last["epoch"] == epochs
    assert 1 <= stopped.best["epoch"] <= epochs
    assert stopped.best["top1"] >= stopped.last["top1"] > 0

    epochs += 1
    finished = dl2pa.train(config, run_dir=run, train={"epochs": epochs}, launch={"nproc": 1}, quiet=True)
    result = json.loads((run / "result.json").read_text())
    assert (finished.state, finished.mlflow_run_id, result["world_size"]) == ("finished", None, 1)
    last = {key: result[f"{key}_last"] for key in ("top1", "top5", "ece")}
    last |= {key: result[key] for key in ("ece_calibrated", "nll", "nll_calibrated", "temperature")}
    assert finished.last == {"epoch": epochs, **last}
    assert finished.best == {"epoch": result["epoch_best"], "top1": result["top1_best"]}
    assert finished.best["top1"] >= max(stopped.best["top1"], finished.last["top1"])


@pytest.mark.xdist_group("servers")
def test_loaded_weights_have_the_accuracy_of_the_run(trained: Path, digits: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    files = sorted((digits / "val").rglob("*.jpeg"))
    labels = [file.parent.name for file in files]
    before = torch.get_rng_state(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    for checkpoint in ("final", "latest", "best"):
        classifier = dl2pa.load(trained, checkpoint=checkpoint, device="cpu")
        accuracy = 100 * np.mean(
            [n == t for n, t in zip(classifier.predict(files).names, labels, strict=True)]
        )
        assert accuracy == pytest.approx(result["top1_best" if checkpoint == "best" else "top1_last"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before[1:]
