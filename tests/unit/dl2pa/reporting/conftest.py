"""Run directories of finished runs, written without training."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dl2pa.config import Config, dump_config, flatten, parse_config
from dl2pa.tracking.spool import Spool, ensure_identity

MakeRun = Callable[..., Path]
TREE: dict[str, Any] = {
    "data": {"dataset": "synthetic", "num_classes": 10, "synthetic_samples": [800, 200], "image_size": 8},
    "model": {"backbone": "resnet8", "embedding_dim": 6},
    "optim": {"lr": 0.1, "schedule": "step", "milestones": [10, 15]},
    "train": {"epochs": 20, "batch_size": 8},
}
STEPS_PER_EPOCH = 100


@pytest.fixture(autouse=True)
def no_data_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DL2PA_DATA", raising=False)


@pytest.fixture(scope="session")
def config_with() -> Callable[..., Config]:
    """Build the small configuration with changes: ``config_with({"train.seed": 3})``."""

    def make(changes: Mapping[str, Any] | None = None) -> Config:
        tree = json.loads(json.dumps(TREE))
        for key, value in (changes or {}).items():
            *sections, name = key.split(".")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = value
        return parse_config(tree)

    return make


@pytest.fixture
def make_run(tmp_path: Path, make_runs_in: Callable[[Path], MakeRun]) -> MakeRun:
    """Create finished run directories in the folder of the test."""
    return make_runs_in(tmp_path)


@pytest.fixture(scope="session")
def make_runs_in(config_with: Callable[..., Config]) -> Callable[[Path], MakeRun]:
    """Create a function that creates finished run directories in a folder.

    ``make_run({"train.seed": 1}, last=50.0)`` builds on the small configuration, ``make_run(config)`` on another;
    further keywords are written to result.json. ``attempts`` are the configurations of the attempts, ``fingerprint`` is
    that of the data.
    """

    def in_folder(folder: Path) -> MakeRun:
        return functools.partial(_make_run, config_with, folder, [])

    return in_folder


def _make_run(
    config_with: Callable[..., Config],
    folder: Path,
    made: list[Path],
    changes: Mapping[str, Any] | Config | None = None,
    *,
    last: float = 50.0,
    best: float | None = None,
    name: str | None = None,
    state: str = "finished",
    status: Mapping[str, Any] | None = None,
    attempts: Sequence[Config] = (),
    steps_per_epoch: int = STEPS_PER_EPOCH,
    fingerprint: str | None = None,
    **result: Any,
) -> Path:
    config = changes if isinstance(changes, Config) else config_with(changes)
    run = folder / "runs" / (name or f"run-{len(made):02}")
    made.append(run)
    (run / "logs").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    full = config.train.epochs * steps_per_epoch
    steps = min(full, config.train.max_steps or full)
    content = {
        "top1_last": last,
        "top1_best": best if best is not None else last,
        "ece_last": 3.0,
        "num_validated": 200,
        "num_classes": 10,
        "epochs": steps // steps_per_epoch,
        "steps": steps,
        "world_size": 1,
        **result,
    }
    (run / "result.json").write_text(json.dumps(content), encoding="utf-8")
    defaults = {"state": state, "step": steps, "total_steps": steps, "updated": 1000.0 + len(made)}
    (run / "status.json").write_text(json.dumps({**defaults, **(status or {})}), encoding="utf-8")
    environment: dict[str, Any] = {"device": "cpu", "git_commit": "0123456789abcdef", "git_dirty": False}
    environment |= {} if fingerprint is None else {"data_fingerprint": fingerprint}
    (run / "environment.json").write_text(json.dumps({"attempts": [environment]}), encoding="utf-8")
    _record_attempts(run, attempts or [config])
    return run


def _record_attempts(run: Path, attempts: Sequence[Config]) -> None:
    """Write the spool of the attempts."""
    identity = ensure_identity(run, "report", run.name)
    for number, config in enumerate(attempts, 1):
        spool = Spool(run, number)
        spool.start(identity, flatten(config), {"seed": str(config.train.seed)})
        spool.metrics(number, {"train/loss": 1.0})
        spool.event("end", status="finished", dropped=0)
        spool.flush()
        spool.close()
