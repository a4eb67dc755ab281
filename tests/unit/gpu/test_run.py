"""`tests/gpu/run.py`: groups that are skipped, repeated, stopped; their output files and the exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gpu import run


@pytest.fixture
def examine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run groups; each is a name, Python code and a limit. Return the exit code and the output folder."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call(*groups: tuple[str, str, float], slice_s: float = 500) -> tuple[int, Path]:
        made = [run.Group(name, ["-u", "-c", code], limit, []) for name, code, limit in groups]
        monkeypatch.setattr(run, "groups", lambda *_: made)
        monkeypatch.setattr(run, "SLICE_S", slice_s)
        monkeypatch.setattr(run.sys, "argv", ["run.py", str(tmp_path / "out")])
        return run.main(), tmp_path / "out"

    for name in ("ONLY", "WHEELS"):
        monkeypatch.delenv(name, raising=False)
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_failed_group_does_not_hide_the_next_one_and_both_are_done(examine: Any) -> None:
    code, out = examine(("bad", "print('row'); raise SystemExit(3)", 100), ("good", "print('seen')", 100))
    assert code == 1
    assert "row" in (out / "bad.txt").read_text() and "seen" in (out / "good.txt").read_text()
    (out / "good.txt").write_text("kept")
    assert examine(("bad", "1/0", 100), ("good", "print('again')", 100))[0] == 0
    assert (out / "good.txt").read_text() == "kept" and "FAILED" in (out / "summary.txt").read_text()


def test_a_group_that_times_out_keeps_its_rows_and_is_not_done(examine: Any) -> None:
    wait = "import signal; print('first row'); signal.pause()"
    code, out = examine(("slow", wait, 5), ("next", "print('seen')", 100))
    assert code == 75
    assert not (out / "slow.txt").exists() and "first row" in (out / "slow.partial.txt").read_text()
    assert (out / "next.txt").exists()
    assert examine(("slow", "print('whole')", 100))[0] == 0
    rows = (out / "slow.txt").read_text()
    assert "first row" in rows and "whole" in rows and not (out / "slow.partial.txt").exists()


def test_a_used_up_slice_starts_no_group(examine: Any) -> None:
    code, out = examine(("late", "print(1)", 100), slice_s=run.SAVE_S + run.LEAST_S - 1)
    assert code == 75 and not list(out.glob("late*"))


def test_a_training_that_saved_on_request_is_not_done(examine: Any) -> None:
    code, out = examine(("training", "raise SystemExit(75)", 100))
    assert code == 75 and not (out / "training.txt").exists()


def test_a_signal_reaches_the_group_and_ends_the_call(examine: Any) -> None:
    stop = f"import os, signal; os.kill({os.getpid()}, signal.SIGTERM); signal.pause()"
    code, out = examine(("one", stop, 100), ("two", "print(1)", 100))
    assert code == 75 and not (out / "one.txt").exists() and not list(out.glob("two*"))


def test_unknown_groups_are_refused(examine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLY", "speed")
    assert examine(("one", "print(1)", 100))[0] == 2


def test_only_wheels_of_missing_packages_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch-1.0", "dl2pa_absent_package-1.0"):
        with zipfile.ZipFile(tmp_path / f"{name}-py3-none-any.whl", "w"):
            pass
    calls: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run.subprocess, "run", pip)
    run.install_wheels(tmp_path)
    ((command),) = calls
    assert "--no-index" in command and [word for word in command if word.endswith(".whl")] == [
        str(tmp_path / "dl2pa_absent_package-1.0-py3-none-any.whl")
    ]


def test_every_test_file_is_a_group() -> None:
    names = {group.name for group in run.groups(Path("out"), None)}
    files = {path.stem.removeprefix("test_") for path in (run.ROOT / "tests/gpu").glob("test_*.py")}
    assert files <= names
    assert all(group.limit_s + run.SAVE_S <= run.SLICE_S for group in run.groups(Path("out"), None))
