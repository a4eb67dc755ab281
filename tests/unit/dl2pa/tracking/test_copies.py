"""Copied, moved, mounted, linked and restored run directories."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from dl2pa.rundir import RunDirectory
from dl2pa.tracking import Tracker
from dl2pa.tracking.copies import find_original
from dl2pa.tracking.spool import load_identity, read_events
from dl2pa.tracking.sync import sync


def train(run: Path, attempt: int) -> str | None:
    """One attempt; returns the run uuid."""
    tracker = Tracker(run, enabled=True, uri=None, experiment="exp", run_name="name", attempt=attempt)
    tracker.start({}, {})
    tracker.finish("stopped")
    return tracker.run_uuid


@pytest.fixture
def original(tmp_path: Path) -> Path:
    train(tmp_path / "original", 1)
    return tmp_path / "original"


def uuid_of(run: Path) -> str:
    identity = load_identity(run)
    assert identity is not None
    return identity.run_uuid


def test_copy_gets_a_new_uuid_and_keeps_it(original: Path, tmp_path: Path) -> None:
    before = uuid_of(original)
    shutil.copytree(original, tmp_path / "copy")
    first = train(tmp_path / "copy", 2)
    assert first != before == train(original, 2)
    assert train(tmp_path / "copy", 3) == first
    identity = load_identity(tmp_path / "copy")
    assert identity is not None and identity.copied_from == before


def test_copy_of_a_copy_names_the_copy(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "copy")
    middle = train(tmp_path / "copy", 2)
    shutil.copytree(tmp_path / "copy", tmp_path / "second")
    train(tmp_path / "second", 3)
    identity = load_identity(tmp_path / "second")
    assert identity is not None and identity.copied_from == middle


def test_uuid_of_a_copy_survives_a_damaged_identity(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "copy")
    copied = train(tmp_path / "copy", 2)
    RunDirectory(tmp_path / "copy").identity.write_text("{")
    assert uuid_of(tmp_path / "copy") == copied


@pytest.mark.parametrize("how", ["moved", "moved and replaced", "restored", "linked", "never trained"])
def test_the_same_run_elsewhere_keeps_its_uuid(how: str, original: Path, tmp_path: Path) -> None:
    before, place = uuid_of(original), tmp_path / "elsewhere"
    if how == "restored":
        shutil.copytree(original, tmp_path / "backup")
        shutil.rmtree(original)
        shutil.copytree(tmp_path / "backup", original)
        place = original
    elif how == "linked":
        place.symlink_to(original)
    elif how == "never trained":  # a run of a version that recorded no place
        RunDirectory(original).place.unlink()
        place = original
    else:
        original.rename(place)
        if how == "moved and replaced":
            train(original, 1)
    assert train(place, 2) == before


def test_copy_with_the_inode_number_of_the_original_is_a_copy(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two file systems can use the same inode numbers."""
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    real = Path.stat

    def same_number(path: Path, **options: bool) -> os.stat_result:
        status = real(path, **options)
        if path not in (original, copy):
            return status
        return os.stat_result([status.st_mode, 7, 100 if path == copy else 200, *status[3:]])

    monkeypatch.setattr(Path, "stat", same_number)
    assert find_original(copy) == original
    assert sorted(copy.iterdir()) == [copy / "events"]


def test_second_mount_of_the_run_is_the_same_run(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network file system that is mounted twice has two device numbers; a link stands for the second mount here."""
    mount = tmp_path / "mount"
    mount.symlink_to(original)
    monkeypatch.setattr(Path, "samefile", lambda *_: False)
    monkeypatch.setattr(Path, "resolve", Path.absolute)
    assert find_original(mount) is None
    assert sorted(original.iterdir()) == [original / "events"]


@pytest.mark.parametrize("hidden", ["the folder", "its files"])
def test_run_of_another_user_that_cannot_be_read_is_another_run(
    hidden: str, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so the refusal is simulated where tests run as root."""
    before = uuid_of(original)
    shutil.copytree(original, tmp_path / "copy")
    real_stat, real_open = Path.stat, Path.open

    def refuse(path: Path) -> None:
        if path.is_relative_to(original if hidden == "the folder" else original / "events"):
            raise PermissionError(13, "Permission denied", str(path))

    def stat_(path: Path, **options: bool) -> os.stat_result:
        if hidden == "the folder":
            refuse(path)
        return real_stat(path, **options)

    def open_(path: Path, *arguments: object, **options: object) -> object:
        refuse(path)
        return real_open(path, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "stat", stat_)
    monkeypatch.setattr(Path, "open", open_)
    assert train(tmp_path / "copy", 2) not in (None, before)


def test_copy_made_of_hard_links_leaves_the_events_of_the_original(original: Path, tmp_path: Path) -> None:
    spool, before = RunDirectory(original).spool, RunDirectory(original).spool.read_bytes()
    shutil.copytree(original, tmp_path / "copy", copy_function=os.link)
    assert spool.stat().st_nlink == 2
    train(tmp_path / "copy", 2)
    assert spool.read_bytes() == before
    copied = RunDirectory(tmp_path / "copy").spool
    assert copied.read_bytes().startswith(before) and len(copied.read_bytes()) > len(before)
    assert stat.S_IMODE(copied.stat().st_mode) == stat.S_IMODE(spool.stat().st_mode)


def test_copy_made_while_a_line_was_written_starts_its_own_run(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "copy")
    spool = RunDirectory(tmp_path / "copy").spool
    whole = spool.read_bytes()
    spool.write_bytes(whole + whole[:20])
    first = train(tmp_path / "copy", 2)
    assert first != uuid_of(original)
    assert all(entry.event is not None for entry in read_events(spool))


@pytest.mark.parametrize("content", ["", "[]", '{"path": 3}', '{"path": "/no\\u0000path"}', "[" * 100_000])
def test_damaged_place_does_not_stop_tracking(content: str, original: Path, tmp_path: Path) -> None:
    before = uuid_of(original)
    RunDirectory(original).place.write_text(content, encoding="utf-8")
    assert train(original, 2) == before
    assert json.loads(RunDirectory(original).place.read_text(encoding="utf-8"))["path"] == str(original)


def interrupt(run: Path, steps: int) -> None:
    """An attempt that was killed: it has no end event."""
    tracker = Tracker(run, enabled=True, uri=None, experiment="exp", run_name="name", attempt=2)
    tracker.start({}, {})
    tracker.metrics(steps, {"loss": 1.0})


def test_sync_of_an_unfinished_copy_sends_to_a_run_of_its_own(original: Path, tmp_path: Path) -> None:
    """It must not end the MLflow run of an original that is still training."""
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    interrupt(original, 1)
    first = sync(original, uri, alive=True)
    shutil.copytree(original, tmp_path / "copy")
    second = sync(tmp_path / "copy", uri, alive=False)
    client = mlflow.MlflowClient(uri)
    assert first.run_id != second.run_id
    assert client.get_run(first.run_id).info.status == "RUNNING"
    assert client.get_run(second.run_id).data.tags["dl2pa.copied_from"] == uuid_of(original)
    assert sync(tmp_path / "copy", uri, alive=False).run_id == second.run_id
    shutil.copytree(tmp_path / "copy", tmp_path / "archive")
    sent = sync(tmp_path / "archive", uri, alive=False)
    assert (sent.run_id, sent.events_sent) == (second.run_id, 0), (
        "a copy that is completely sent stays as it is"
    )
