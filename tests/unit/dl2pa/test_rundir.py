from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dl2pa import ownership
from dl2pa.errors import UserError
from dl2pa.osutil import read_json, write_atomically
from dl2pa.ownership import Ownership, is_owned
from dl2pa.rundir import RunDirectory
from dl2pa.training.run import report_error

ROOT = Path(__file__).resolve().parents[4]
HOLD = """
import sys
from pathlib import Path
from dl2pa.rundir import RunDirectory
from dl2pa.ownership import Ownership
run = RunDirectory(Path(sys.argv[1]))
run.create()
owner = Ownership(run)
owner.acquire()
owner.announce()
run.write_status(state=sys.argv[2])
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "my run; 'quoted'")
    directory.create()
    return directory


@pytest.fixture
def holder(run: RunDirectory, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the run, in the state given."""
    state = getattr(request, "param", "running")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.root), state],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
    if process.stdin is not None:
        process.stdin.close()


def test_readers_see_the_old_or_the_new_text(tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    write_atomically(file, json.dumps({"n": 0, "fill": "x" * 50_000}))
    done = threading.Event()
    seen: list[object] = []

    def read() -> None:
        while not done.is_set():
            seen.append(read_json(file).get("n", "torn"))

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(1, 60):
        write_atomically(file, json.dumps({"n": n, "fill": "x" * 50_000}))
    done.set()
    reader.join()
    assert "torn" not in seen
    assert read_json(file)["n"] == 59
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\x00"])
def test_a_file_without_a_json_object_reads_as_empty(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert read_json(tmp_path / "a.json") == {}
    assert read_json(tmp_path / "gone.json") == {}


def test_status_keeps_fields_that_are_not_updated(run: RunDirectory) -> None:
    run.write_status(state="running", attempt=3)
    run.write_status(state="stopped", step=7)
    status = run.status()
    assert (status["state"], status["attempt"], status["step"]) == ("stopped", 3, 7)
    assert status["updated"] > 0


def test_rank_errors_are_ordered_by_time(run: RunDirectory) -> None:
    for rank, time in ((0, 5.0), (2, 1.0), (1, 3.0)):
        write_atomically(
            run.error_file(rank), json.dumps({"rank": rank, "time": time, "launch": "a", "message": "no"})
        )
    assert [e["rank"] for e in run.errors("a")] == [2, 1, 0]
    assert run.errors("b") == []


def test_a_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        RunDirectory(tmp_path / "file" / "run").create()
    assert caught.value.field == "run-dir"


def test_a_path_that_is_not_writable_is_refused() -> None:
    """Not even root can create folders in /proc."""
    for refuse in (RunDirectory.check_place, RunDirectory.create):
        with pytest.raises(UserError) as caught:
            refuse(RunDirectory(Path("/proc/dl2pa-run")))
        assert caught.value.field == "run-dir"


def test_checking_a_path_creates_nothing(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "runs/run").check_place()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / ".profile").touch()
    for early in ("logs", "slurm", "checkpoints"):  # left by `submit` or by a killed start
        (tmp_path / early).mkdir()
    run.check_place()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"run-dir=.* contains other files and no run: thesis.tex"):
        run.check_place()
    # The first file of a run, while another node creates the others; and of one that ended before its status.
    for name in ("owner.lock", "owner.json"):
        (tmp_path / name).touch()
        run.check_place()
        (tmp_path / name).unlink()
    run.write_status(state="failed")
    run.check_place()


@pytest.mark.parametrize(
    ("accepted", "error", "expected"),
    [
        (False, UserError("optim.lr", 1, "changed", "Put it back."), ("stopped", 1, None)),
        (True, UserError("data.root", 1, "damaged", "Restore it."), ("failed", 2, "data.root")),
        (False, OSError("disk"), ("failed", 2, "disk")),
        (True, OSError("disk"), ("failed", 2, "disk")),
    ],
)
def test_only_a_refused_attempt_keeps_the_state_of_the_run(
    accepted: bool, error: Exception, expected: tuple[str, int, str | None], run: RunDirectory
) -> None:
    before = {"state": "stopped", "attempt": 1, "error": None, "pid": 5}
    run.write_status(**{**before, "state": "running", "attempt": 2, "pid": 6}, step=7)
    attempts = [{"attempt": number} for number in range(1, 3 if accepted else 2)]
    run.environment.write_text(json.dumps({"attempts": attempts}), encoding="utf-8")
    report_error(run, 0, error, before)
    status = run.status()
    state, attempt, text = expected
    assert (status["state"], status["attempt"], status["step"]) == (state, attempt, 7)
    assert status["error"] == text or status["error"].startswith(str(text))
    refused = attempt == 1
    assert read_json(run.error_file(0, refused=refused))["message"] == str(error)
    assert not run.error_file(0, refused=not refused).exists()


def test_in_a_container_the_remedy_is_a_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(Path("/proc/dl2pa-run"))
    for variable, mount in ((None, False), ("unknown", True)):
        monkeypatch.delenv("DL2PA_IMAGE", raising=False)
        if variable:
            monkeypatch.setenv("DL2PA_IMAGE", variable)
        with pytest.raises(UserError) as caught:
            run.check_place()
        assert ("-v DIR:/runs" in caught.value.remedy) == mount


def test_a_running_owner_is_named_and_kept(run: RunDirectory, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError) as caught:
        Ownership(run).acquire()
    assert caught.value.field == "run-dir"
    assert str(holder.pid) in caught.value.message
    assert socket.gethostname() in caught.value.message
    assert run.owner()["pid"] == holder.pid
    assert is_owned(run)


def test_the_directory_of_a_dead_owner_is_acquired(run: RunDirectory, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert not is_owned(run)
    owner = Ownership(run)
    owner.acquire()
    owner.announce()
    assert run.owner()["pid"] == os.getpid()
    owner.release()


@pytest.mark.parametrize("holder", ["stopping"], indirect=True)
def test_acquire_waits_for_a_stopping_owner(run: RunDirectory, holder: subprocess.Popen[str]) -> None:
    """The owner ends after this process has started to wait."""
    owner, acquired = Ownership(run), threading.Event()

    def acquire() -> None:
        owner.acquire()
        acquired.set()

    waiting = threading.Thread(target=acquire, daemon=True)
    waiting.start()
    assert not acquired.is_set()
    assert holder.stdin is not None
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert acquired.wait(30)
    owner.release()


@pytest.mark.parametrize("holder", ["stopping"], indirect=True)
def test_the_wait_for_an_owner_is_limited(run: RunDirectory, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match=str(holder.pid)):
        Ownership(run).acquire(wait_s=0.1)


def test_an_owner_on_another_host_without_heartbeat_is_replaced(run: RunDirectory) -> None:
    write_atomically(run.owner_file, json.dumps({"host": "elsewhere", "pid": 1}))
    run.write_status(state="running")
    os.utime(run.owner_file, (0, 0))
    owner = Ownership(run)
    owner.acquire()
    owner.release()


def test_a_heartbeat_from_another_host_is_refused(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:

    write_atomically(run.owner_file, json.dumps({"host": "elsewhere", "pid": 41}))
    run.write_status(state="running")
    beats = iter(range(2_000_000_000, 2_000_000_100))
    monkeypatch.setattr(ownership, "_POLL_S", 0.0)
    monkeypatch.setattr(ownership.time, "sleep", lambda s: os.utime(run.owner_file, (next(beats),) * 2))
    with pytest.raises(UserError, match="41 on elsewhere"):
        Ownership(run).acquire()


def test_a_released_run_can_be_acquired_again(run: RunDirectory) -> None:
    for _ in range(2):
        owner = Ownership(run)
        owner.acquire()
        assert is_owned(run)
        owner.release()
        assert not is_owned(run)


def test_a_copied_log_is_not_the_log_of_a_rank(run: RunDirectory) -> None:
    for name in ("rank-0", "rank-11", "rank-0 (copy)", "rank-1.old"):
        (run.logs / f"{name}.log").touch()
    assert run.logged_ranks() == [0, 11]
