"""`train.profile`: profiled steps, files written, failures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import record_function

from dl2pa.training.distributed import World
from dl2pa.training.profile import StepProfile

WORLD = World(0, 1, 0, 1, torch.device("cpu"), 1)


def take_steps(profile: StepProfile, count: int) -> list[list[Path]]:
    """Files returned after each step."""
    left: list[list[Path]] = []
    for number in range(count):
        profile.before_step()
        with record_function(f"step {number}"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        left.append(profile.after_step())
    return left


def test_the_trace_contains_the_steps_after_the_tenth(tmp_path: Path) -> None:
    left = take_steps(StepProfile(3, tmp_path / "profile", WORLD), 20)
    assert [number for number, paths in enumerate(left) if paths] == [12]
    trace, table = left[12]
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {f"step {number}" for number in range(20)} & names == {"step 10", "step 11", "step 12"}
    assert "3 steps" in table.read_text() and "aten::mm" in table.read_text()


def test_a_run_that_ends_early_writes_the_steps_so_far(tmp_path: Path) -> None:
    profile = StepProfile(50, tmp_path / "profile", WORLD)
    assert not any(take_steps(profile, 12))
    assert [path.name for path in profile.finish()] == ["trace.json", "table.txt"]
    assert profile.finish() == []


def test_other_ranks_and_zero_steps_write_no_profile(tmp_path: Path) -> None:
    second = World(1, 2, 1, 2, torch.device("cpu"), 1)
    for profile in (StepProfile(0, tmp_path / "p", WORLD), StepProfile(5, tmp_path / "p", second)):
        assert not any(take_steps(profile, 20)) and profile.finish() == []
    assert not (tmp_path / "p").exists()


def test_failing_to_write_only_logs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("a file is in the way")
    assert not any(take_steps(StepProfile(2, tmp_path / "profile", WORLD), 20))
    assert "no profile" in caplog.text
