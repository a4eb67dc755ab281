"""Full disks, and threads that cannot be started."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dl2pa import osutil
from dl2pa.assignment import Matching
from dl2pa.errors import UserError
from dl2pa.geometry import build_prototypes, save_prototypes
from dl2pa.osutil import (
    DiskFull,
    LockResult,
    full_disk,
    open_and_lock,
    remove_locked,
    replacing,
    start_thread,
    write_atomically,
)
from dl2pa.reporting.document import Heading
from dl2pa.reporting.write import write_document
from dl2pa.rundir import RunDirectory
from dl2pa.tracking.spool import Spool, read_events
from dl2pa.training.checkpoint import CheckpointStore
from dl2pa.training.match_history import MatchHistory
from dl2pa.training.rank_log import _RankLog  # pyright: ignore[reportPrivateUsage]
from support.disks import full, small_disk

SIZE = 8 << 20
OpenStore = Callable[..., CheckpointStore]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_disk(tmp_path_factory.mktemp("a small disk"), "4m") as folder:
        yield folder


@pytest.fixture
def folder(disk: Path, request: pytest.FixtureRequest) -> Path:
    path = disk / request.node.name.replace("/", "_")[:100]
    path.mkdir()
    return path


WRITERS: dict[str, Callable[[Path], object]] = {
    "array.npy": lambda path: np.save(path, np.zeros(SIZE)),
    "arrays.npz": lambda path: np.savez(path, a=np.random.default_rng(0).bytes(SIZE)),
    "model.safetensors": lambda path: save_file({"a": torch.zeros(SIZE, dtype=torch.uint8)}, path),
    "picture.png": lambda path: Image.effect_noise((2500, 2500), 100).save(path),
    "bytes.onnx": lambda path: path.write_bytes(bytes(SIZE)),
}


@pytest.fixture
def open_store() -> Iterator[OpenStore]:
    """Opens checkpoint stores, which are closed after the test."""
    with ExitStack() as stack:

        def open_one(folder: Path, keep: int = 1, keep_best: bool = False) -> CheckpointStore:
            store = CheckpointStore(folder, keep=keep, keep_best=keep_best)
            stack.callback(store.close)
            return store

        yield open_one


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_message_and_leaves_nothing(name: str, folder: Path) -> None:
    path = folder / name
    path.write_text("old")
    with pytest.raises(DiskFull) as caught, replacing(path) as temporary:
        WRITERS[name](temporary)
    message = str(caught.value)
    assert message.startswith(f"No space left on device: {folder} has ")
    assert "needed. Free some space there, then the same command continues" in message
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert list(folder.iterdir()) == [path]


def test_the_message_states_the_bytes_free_and_needed(folder: Path) -> None:
    with pytest.raises(DiskFull) as caught:
        write_atomically(folder / "report.html", "é" * SIZE)
    state = os.statvfs(folder)
    assert f"has {state.f_bavail * state.f_frsize:,} bytes free, {2 * SIZE:,} bytes are needed" in str(
        caught.value
    )
    assert list(folder.iterdir()) == []


def test_missing_inodes_are_named(tmp_path: Path) -> None:
    with small_disk(tmp_path, "4m,nr_inodes=4") as disk:
        for name in "abc":
            (disk / name).touch()
        with pytest.raises(DiskFull, match="bytes free, no free inodes"):
            write_atomically(disk / "d", "text")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_errors_of_quotas_and_size_limits_are_full_disks(number: int, tmp_path: Path) -> None:
    error = full_disk(OSError(number, "x"), tmp_path, 5)
    assert error is not None
    assert str(error).startswith(f"{os.strerror(number)}: {tmp_path} has ")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.errno) == (str(error), number)


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "x"), ValueError("x"), UserError("a", 1, "No space left", "")]
)
def test_other_errors_are_not_changed(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, replacing(tmp_path / "a"):
        raise error
    assert caught.value is error


def test_a_checkpoint_on_a_full_disk_is_one_message_and_the_next_save_succeeds(
    folder: Path, open_store: OpenStore
) -> None:
    store = open_store(folder / "checkpoints", keep=2, keep_best=True)
    store.save(1, {"weight": torch.zeros(10)}, wait=True)
    store.save(2, {"weight": torch.zeros(SIZE, dtype=torch.uint8)})
    with pytest.raises(DiskFull) as caught:
        store.wait()
    assert f"{folder}/checkpoints has " in str(caught.value)
    assert f"{SIZE:,} bytes are needed" in str(caught.value)
    assert sorted(p.name for p in store.folder.iterdir()) == ["step-000000001"]
    store.save(3, {"weight": torch.zeros(20)}, wait=True)
    loaded = store.load()
    assert loaded is not None and len(loaded["weight"]) == 20


def test_a_best_checkpoint_whose_record_did_not_fit_is_recorded_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_store: OpenStore
) -> None:
    store = open_store(tmp_path / "checkpoints", keep_best=True)
    store.save(1, {"step": 1}, best=True, wait=True)

    def fail(step: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_record_best", fail)
        store.save(2, {"step": 2}, best=True)
        with pytest.raises(OSError, match="full"):
            store.wait()
    store.clean()
    store.save(3, {"step": 3}, wait=True)
    assert (store.best_step(), store.steps()) == (2, [2, 3])


@pytest.mark.parametrize("name", ["p.safetensors", "p.npy"])
def test_prototypes_on_a_full_disk_are_one_message(name: str, folder: Path, disk: Path) -> None:
    prototypes = build_prototypes(200, 100)
    with full(disk, 20_000), pytest.raises(UserError) as caught:
        save_prototypes(prototypes, folder / name)
    assert f"{folder} has " in str(caught.value)
    assert "needed. Free some space there, then the same command continues" in str(caught.value)
    assert not (folder / name).exists()


def test_events_wait_while_the_disk_is_full(
    folder: Path, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(folder, 1)
    with full(disk):
        for step in range(3):
            spool.metrics(step, {"loss": 1.0 * step})
    spool.metrics(3, {"loss": 3.0})
    (warning, again) = [r.getMessage() for r in caplog.records]
    assert "No space left on device" in warning and "training continues" in warning
    assert "again" in again
    events = [e for e, _ in read_events(RunDirectory(folder).spool)]
    assert [e and e["step"] for e in events] == [0, 1, 2, 3]


def test_a_log_on_a_full_disk_prints_one_message(
    folder: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = _RankLog(folder / "rank-0.log", encoding="utf-8")
    record = logging.LogRecord("x", logging.INFO, "x", 1, "a line", None, None)
    with full(disk):
        for _ in range(3):
            handler.emit(record)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{folder}/rank-0.log cannot be written (No space left on device: {folder} has" in message


def test_an_assignment_update_that_did_not_fit_leaves_no_damaged_line(folder: Path, disk: Path) -> None:
    history = MatchHistory(folder / "matchings.jsonl")
    moves = tuple((label, 0, 1) for label in range(1000))
    update = Matching(len(moves), moves, 1.0, 2.0, 0.5, 3, 0.1, None)
    with full(disk, 4096):
        history.add(1, 0.5, update)
        history.add(2, 1.0, update)
    history.add(3, 1.5, update)
    lines = (folder / "matchings.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3]


def test_a_report_on_a_full_disk_is_one_message(folder: Path, disk: Path) -> None:
    with full(disk), pytest.raises(UserError, match=r"--out=.* bytes free, .* bytes are needed"):
        write_document([Heading(1, "a title")], {}, folder)
    assert list(folder.iterdir()) == []


def test_a_run_directory_on_a_full_disk_is_one_message(tmp_path: Path) -> None:
    with small_disk(tmp_path, "4m,nr_inodes=2") as disk:
        (disk / "file").touch()
        with pytest.raises(
            UserError, match=r"run-dir=.* cannot be written \(No space left .* no free inodes"
        ):
            RunDirectory(disk / "run").create()


def test_a_thread_that_cannot_be_started_names_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match=r"the thread name cannot be started .*ulimit"):
        start_thread(lambda: None, "name")


def test_the_end_of_the_writing_thread_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_store: OpenStore
) -> None:
    store = open_store(tmp_path / "checkpoints")
    monkeypatch.setattr(store, "_work", lambda: None)
    monkeypatch.setattr("dl2pa.training.checkpoint._POLL_S", 0.01)
    store.save(1, {"step": 1})
    with pytest.raises(RuntimeError, match="thread that writes checkpoints has ended"):
        store.wait()


def test_a_write_without_progress_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_store: OpenStore
) -> None:
    released = threading.Event()
    store = open_store(tmp_path / "checkpoints")

    def hang(*_: Any) -> None:
        released.wait()

    monkeypatch.setattr(store, "_write", hang)
    monkeypatch.setattr("dl2pa.training.checkpoint._POLL_S", 0.01)
    monkeypatch.setattr("dl2pa.training.checkpoint._STALL_S", 0.02)
    store.save(1, {"step": 1})
    with pytest.raises(TimeoutError, match=f"{tmp_path}/checkpoints made no progress"):
        store.wait()
    monkeypatch.setattr("dl2pa.training.checkpoint._STALL_S", 1e9)
    store.close()  # does not wait again
    released.set()


def test_running_out_of_memory_in_the_writing_thread_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_store: OpenStore
) -> None:
    store = open_store(tmp_path / "checkpoints")

    def exhaust(*_: Any) -> NoReturn:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", exhaust)
        store.save(1, {"step": 1})
        with pytest.raises(MemoryError):
            store.wait()
    store.save(1, {"step": 1}, wait=True)
    assert store.steps() == [1]


def test_a_lock_file_removed_before_it_is_locked_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "lock", osutil.try_lock

    def removed_first(descriptor: int) -> LockResult:
        monkeypatch.setattr(osutil, "try_lock", real)
        path.unlink()
        return real(descriptor)

    monkeypatch.setattr(osutil, "try_lock", removed_first)
    first, result = open_and_lock(path)
    assert result is LockResult.ACQUIRED
    second, result = open_and_lock(path)
    assert result is LockResult.HELD
    path.unlink()
    path.touch()
    remove_locked(path, first)
    assert path.exists(), "another process's file is kept"
    os.close(first)
    os.close(second)
