"""Health check of the image, on run directories locked by this process."""

from __future__ import annotations

import json
import time
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "docker/dl2pa-health"


@pytest.fixture
def health() -> Any:
    loader = SourceFileLoader("dl2pa_health", str(SCRIPT))
    spec = spec_from_loader("dl2pa_health", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def write_status(run: Path, state: str, idle: float) -> None:
    run.mkdir(exist_ok=True)
    (run / "status.json").write_text(json.dumps({"state": state, "step": 7, "updated": time.time() - idle}))


def test_runs_are_found_by_their_open_lock_file(health: Any, tmp_path: Path) -> None:
    with (tmp_path / "owner.lock").open("w"):
        assert tmp_path in health.runs()
    assert tmp_path not in health.runs()


@pytest.mark.parametrize(
    ("state", "idle", "code"),
    [("running", 5, 0), ("running", 4000, 1), ("stopping", 4000, 1), ("finished", 4000, 0)],
)
def test_training_without_progress_is_unhealthy(
    health: Any,
    state: str,
    idle: float,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    write_status(tmp_path / "run", state, idle)
    monkeypatch.setattr(health, "runs", lambda: {tmp_path / "run"})
    assert health.main() == code
    assert capsys.readouterr().out == f"run: {state}, step 7, {idle} s ago\n"


def test_container_without_training_is_healthy(health: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "runs", set)
    assert health.main() == 0
