"""Ownership without file locks, and the end of a process that lost its run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from dl2pa import fence, ownership
from dl2pa.errors import EXIT_FAILURE, UserError
from dl2pa.osutil import replacing, write_atomically
from dl2pa.ownership import Ownership, is_owned
from dl2pa.rundir import RunDirectory
from dl2pa.tracking.filelock import exclusive_lock
from dl2pa.tracking.nodes import NodeFile
from dl2pa.tracking.spool import Spool
from dl2pa.training.checkpoint import CheckpointStore
from dl2pa.training.distributed import World
from dl2pa.training.rank_log import _RankLog  # pyright: ignore[reportPrivateUsage]
from dl2pa.training.run import report_error
from dl2pa.training.stop import StopMonitor

ROOT = Path(__file__).resolve().parents[3]
HOLD = """
import sys
from pathlib import Path
from dl2pa import ownership
from dl2pa.rundir import RunDirectory
ownership._SETTLE_S = 0
run = RunDirectory(Path(sys.argv[1]))
owner = ownership.Ownership(run)
owner.acquire()
owner.announce()
run.write_status(state="running")
print("held", flush=True)
sys.stdin.readline()
"""


class Left(BaseException):
    """Raised in place of the end of this process."""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "my run; 'quoted'")
    directory.create()
    return directory


@pytest.fixture(autouse=True)
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes with which the process would have ended."""
    codes: list[int] = []

    def leave(code: int) -> NoReturn:
        codes.append(code)
        raise Left

    monkeypatch.setattr(fence, "_exit", leave)
    monkeypatch.setattr(ownership, "_SETTLE_S", 0.0)
    return codes


@pytest.fixture
def refuse_locks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the lock call fail with an error number, as a network file system does."""

    def refuse(number: int) -> None:
        def flock(file: object, operation: int) -> NoReturn:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return refuse


@pytest.fixture
def holder(run: RunDirectory) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns the run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def owned(run: RunDirectory) -> Iterator[Ownership]:
    owner = Ownership(run)
    owner.acquire()
    owner.announce()
    yield owner
    owner.release()


def replace_owner(run: RunDirectory, **fields: Any) -> None:
    record = {"host": "elsewhere", "pid": 41, "id": "another", "machine": "m", "processes": "p"}
    run.owner_file.write_text(json.dumps({**record, **fields}))


NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@pytest.mark.parametrize("number", NO_LOCKS, ids=lambda n: errno.errorcode[n])
def test_without_locks_a_new_folder_is_acquired_with_one_warning(
    number: int,
    run: RunDirectory,
    refuse_locks: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    refuse_locks(number)
    assert not is_owned(run)
    owner = Ownership(run)
    owner.acquire()
    owner.announce()
    assert run.owner()["pid"] == os.getpid()
    with exclusive_lock(run.sync_lock):
        pass
    owner.release()
    assert [r.getMessage().count("does not support locks") for r in caplog.records] == [1]


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES], ids=lambda n: errno.errorcode[n])
def test_a_lock_held_by_another_process_is_a_refusal(
    number: int, run: RunDirectory, refuse_locks: Callable[[int], None]
) -> None:
    refuse_locks(number)
    run.owner_lock.touch()
    assert is_owned(run)
    with pytest.raises(UserError, match="in use by process"):
        Ownership(run).acquire()


def test_without_locks_a_running_owner_is_named_and_a_dead_one_replaced(
    run: RunDirectory, holder: subprocess.Popen[str], refuse_locks: Callable[[int], None]
) -> None:
    refuse_locks(errno.ENOLCK)
    assert is_owned(run)
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on"):
        Ownership(run).acquire()
    holder.kill()
    holder.wait()
    assert not is_owned(run)
    Ownership(run).acquire()


def test_without_locks_a_reused_process_id_is_not_an_owner(
    run: RunDirectory, holder: subprocess.Popen[str], refuse_locks: Callable[[int], None]
) -> None:
    refuse_locks(errno.ENOLCK)
    record = run.owner()
    run.owner_file.write_text(json.dumps({**record, "start": record["start"] - 1}))
    assert not is_owned(run)
    Ownership(run).acquire()


@pytest.mark.parametrize("locks", [True, False])
def test_a_heartbeat_from_another_process_namespace_is_an_owner(
    locks: bool,
    run: RunDirectory,
    refuse_locks: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two containers with one host name, on two machines or on a file system without locks."""
    if not locks:
        refuse_locks(errno.ENOLCK)
    replace_owner(run, host=ownership.socket.gethostname())
    run.write_status(state="running")
    beats = iter(range(1, 100))
    now = run.owner_file.stat().st_mtime
    monkeypatch.setattr(ownership.time, "sleep", lambda s: os.utime(run.owner_file, (now + next(beats),) * 2))
    assert is_owned(run)
    with pytest.raises(UserError, match="process 41"):
        Ownership(run).acquire()


def test_the_clock_of_this_machine_does_not_decide_about_a_heartbeat(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_owner(run)
    run.owner_lock.touch()
    run.write_status(state="running")
    monkeypatch.setattr(ownership.time, "time", lambda: 4e9)
    assert is_owned(run)


def test_of_two_simultaneous_starts_without_locks_one_is_refused(
    run: RunDirectory, refuse_locks: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_locks(errno.ENOLCK)
    owner = Ownership(run)
    owner.acquire()
    monkeypatch.setattr(ownership.time, "sleep", lambda s: replace_owner(run))
    with pytest.raises(UserError, match="in use by process 41 on elsewhere"):
        owner.announce()
    assert run.owner()["id"] == "another"


def test_a_lock_file_that_cannot_be_opened_is_one_message(run: RunDirectory) -> None:
    run.owner_lock.mkdir()
    with pytest.raises(UserError, match=r"run-dir=.* cannot be written"):
        Ownership(run).acquire()


def begin(run: RunDirectory) -> Ownership:
    owner = Ownership(run)
    owner.acquire()
    owner.announce()
    return owner


def test_an_owner_removes_its_lock_file_and_a_killed_one_leaves_it(
    run: RunDirectory, holder: subprocess.Popen[str]
) -> None:
    holder.kill()
    holder.wait()
    assert run.owner_lock.exists()
    assert not is_owned(run)
    owner = begin(run)
    assert is_owned(run)
    owner.release()
    assert not run.owner_lock.exists()
    assert not is_owned(run)
    assert not run.owner_lock.exists(), "looking at a run creates no file"


@pytest.mark.parametrize("third", [False, True])
def test_a_waiting_start_locks_the_file_that_the_next_one_finds(
    third: bool, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first owner removes the file on which a second waits; a third may be faster to create it again."""
    first, others = begin(run), list[Ownership]()
    run.write_status(state="stopping")

    def sleep(seconds: float) -> None:
        first.release()
        if third and not others:
            others.append(begin(run))
            run.write_status(state="running")

    monkeypatch.setattr(ownership.time, "sleep", sleep)
    second = Ownership(run)
    if third:
        with pytest.raises(UserError, match="in use by"):
            second.acquire()
    else:
        second.acquire()
    with pytest.raises(UserError, match="in use by"):
        Ownership(run).acquire(wait_s=0)
    for owner in (second, *others):
        owner.release()


def test_an_owner_that_was_replaced_leaves_the_lock_file(run: RunDirectory) -> None:
    owner = begin(run)
    replace_owner(run)
    owner.release()
    assert run.owner_lock.exists()


def save(run: RunDirectory) -> None:
    store = CheckpointStore(run.checkpoints, keep=1, keep_best=False)
    store.save(1, {"weight": torch.ones(1)}, wait=True)


def request_stop(run: RunDirectory) -> None:
    world = World(0, 1, 0, 1, torch.device("cpu"), 1)
    StopMonitor(world, run.stop_file)._on_signal(15, None)  # pyright: ignore[reportPrivateUsage]


def log_line(run: RunDirectory) -> None:
    handler = _RankLog(run.rank_log(0), encoding="utf-8")
    handler.emit(logging.LogRecord("x", logging.INFO, "x", 1, "a line", None, None))


def replace_file(run: RunDirectory) -> None:
    with replacing(run.model) as temporary:
        temporary.write_bytes(b"weights")


def report(run: RunDirectory) -> None:
    report_error(run, 0, OSError("disk"), {})


WRITERS: dict[str, Callable[[RunDirectory], object]] = {
    "status": lambda run: run.write_status(step=1),
    "checkpoint": save,
    "text file": lambda run: write_atomically(run.result, "{}"),
    "replaced file": replace_file,
    "spool": lambda run: Spool(run.root, 1).metrics(1, {"loss": 1.0}),
    "system metrics": lambda run: NodeFile(run.root, 1, 1).write(1, {"cpu": 1.0}, 1),
    "log": log_line,
    "stop file": request_stop,
    "error report": report,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_process_that_lost_the_run_ends_before_it_writes(
    name: str, run: RunDirectory, owned: Ownership, exits: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    log_line(run)  # a handler opens its file before the loss
    replace_owner(run)
    owned._checked = -10.0  # pyright: ignore[reportPrivateUsage]  # more than a second ago
    before = {p: p.read_bytes() for p in run.root.rglob("*") if p.is_file()}
    with pytest.raises(Left):
        WRITERS[name](run)
    assert {p: p.read_bytes() for p in run.root.rglob("*") if p.is_file()} == before
    assert set(exits) == {EXIT_FAILURE}
    message = capfd.readouterr().err
    assert "was taken over by process 41 on elsewhere" in message
    assert "writes nothing more" in message


@pytest.mark.parametrize("name", WRITERS)
def test_the_owner_writes(name: str, run: RunDirectory, owned: Ownership, exits: list[int]) -> None:
    before = {p: p.read_bytes() for p in run.root.rglob("*") if p.is_file()}
    WRITERS[name](run)
    assert {p: p.read_bytes() for p in run.root.rglob("*") if p.is_file()} != before
    assert not exits


def test_a_checkpoint_is_not_published_after_a_loss_during_its_write(
    run: RunDirectory, owned: Ownership, exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(state: object, target: Any) -> None:
        target.write(b"the first half")
        replace_owner(run)

    monkeypatch.setattr(torch, "save", lose)
    with pytest.raises(Left):
        save(run)
    assert not list(run.checkpoints.glob("step-*"))


def test_heartbeats_end_a_process_that_lost_the_run(
    run: RunDirectory, exits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "start_thread", lambda target, name: None)
    monkeypatch.setattr(ownership, "_HEARTBEAT_S", 0.0)
    owner, follower = Ownership(run), Ownership(run)
    owner.acquire()
    owner.announce()
    os.utime(run.owner_file, (0, 0))
    replace_owner(run)
    stamp = run.owner_file.stat().st_mtime_ns
    with pytest.raises(Left):
        owner._beat()  # pyright: ignore[reportPrivateUsage]
    assert run.owner_file.stat().st_mtime_ns == stamp, "no heartbeat for the new owner"
    owner.release()
    follower.follow(owner.id)
    with pytest.raises(Left):
        follower._beat()  # pyright: ignore[reportPrivateUsage]
    follower.release()
    assert exits == [EXIT_FAILURE] * 2


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"host": 1}'])
def test_an_unreadable_owner_record_is_not_a_loss(
    content: str | None, run: RunDirectory, owned: Ownership, exits: list[int]
) -> None:
    if content is None:
        run.owner_file.unlink()
    else:
        run.owner_file.write_text(content)
    run.write_status(step=3)
    assert run.status()["step"] == 3
    assert not exits


def test_a_takeover_is_told_from_the_record_before_the_launch(run: RunDirectory) -> None:
    replace_owner(run, launch="one")
    before = run.owner()
    assert not run.is_taken_over(before, "two")
    replace_owner(run, launch="two")
    assert not run.is_taken_over(before, "two")
    replace_owner(run, launch="three")
    assert run.is_taken_over(before, "two")
    run.owner_file.unlink()
    assert not run.is_taken_over(before, "two")
