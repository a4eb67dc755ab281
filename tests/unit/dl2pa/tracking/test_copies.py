"""Copied, moved and restored run directories."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dl2pa.rundir import RunDirectory
from dl2pa.tracking import Tracker
from dl2pa.tracking.spool import load_identity


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
