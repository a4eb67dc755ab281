from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dl2pa.errors import UserError
from dl2pa.training.checkpoint import CheckpointStore


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    folder = tmp_path / "a run; 'quoted'" / "checkpoints"
    folder.mkdir(parents=True)
    return CheckpointStore(folder, keep=2, keep_best=True)


def state(step: int) -> dict[str, Any]:
    return {
        "weight": torch.full((3,), float(step)),
        "nested": {"list": [1, (2, torch.ones(1))]},
        "step": step,
    }


def save(store: CheckpointStore, *steps: int, best: tuple[int, ...] = ()) -> None:
    for step in steps:
        store.save(step, state(step), best=step in best, wait=True)


def loaded_step(store: CheckpointStore, which: str = "latest") -> int | None:
    loaded = store.load(which)
    return None if loaded is None else loaded["step"]


def test_a_saved_state_is_loaded(store: CheckpointStore) -> None:
    save(store, 10)
    loaded = store.load()
    assert loaded is not None
    assert torch.equal(loaded["weight"], torch.full((3,), 10.0))
    assert loaded["nested"]["list"][1] == (2, torch.ones(1))
    assert (store.folder.parent / "latest").read_text().strip() == store.path(10).name
    assert store.latest_name() == str(store.path(10))


def test_without_checkpoints_no_state_is_loaded(store: CheckpointStore) -> None:
    assert store.load() is None
    assert store.load("best") is None
    assert store.latest_name() == "none"
    assert store.steps() == []


def test_the_state_is_copied_when_save_is_called(store: CheckpointStore) -> None:
    weights = torch.zeros(1000)
    store.save(1, {"weights": weights})
    weights.fill_(7.0)
    store.wait()
    loaded = store.load()
    assert loaded is not None
    assert loaded["weights"].sum() == 0


def test_the_latest_and_the_best_checkpoints_are_kept(store: CheckpointStore) -> None:
    save(store, 1, 2, 3, 4, 5, best=(1, 2))
    assert store.steps() == [2, 4, 5]
    assert (loaded_step(store), loaded_step(store, "best")) == (5, 2)
    assert sorted(p.name for p in store.folder.glob("step-*")) == [store.path(s).name for s in (2, 4, 5)]


def test_without_keep_best_only_the_latest_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1, keep_best=False)
    save(store, 1, 2, 3, best=(1,))
    assert store.steps() == [3]


def test_saving_a_step_again_replaces_it(store: CheckpointStore) -> None:
    save(store, 5)
    store.save(5, {**state(5), "weight": torch.zeros(1)}, wait=True)
    loaded = store.load()
    assert loaded is not None
    assert len(loaded["weight"]) == 1
    assert [p.name for p in store.folder.iterdir()] == [store.path(5).name]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lambda file: os.truncate(file, 100),
        lambda file: os.truncate(file, 0),
        lambda file: file.unlink(),
        lambda file: (file.parent / "COMPLETE").write_text(""),
        lambda file: (file.parent / "COMPLETE").write_text("[]"),
    ],
    ids=["bit", "truncated", "empty", "missing", "empty marker", "wrong marker"],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    store: CheckpointStore, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 1, 2)
    damage(store.path(2) / "state.pt")
    assert loaded_step(store) == 1
    assert str(store.path(2)) in caplog.text


def test_only_damaged_checkpoints_are_an_error(store: CheckpointStore) -> None:
    save(store, 1, 2)
    for step in (1, 2):
        flip_a_bit(store.path(step) / "state.pt")
    with pytest.raises(UserError, match="every other checkpoint") as caught:
        store.load()
    assert caught.value.field == "checkpoint"


def test_a_checkpoint_without_its_marker_is_removed(store: CheckpointStore) -> None:
    save(store, 1, 2)
    (store.path(2) / "COMPLETE").unlink()
    aside = store.folder / ".aside-3-123"
    aside.mkdir()
    (aside / "state.pt").write_bytes(b"half")
    assert loaded_step(store) == 1
    store.clean()
    assert [p.name for p in store.folder.iterdir()] == [store.path(1).name]


def test_other_files_are_neither_read_nor_removed(store: CheckpointStore) -> None:
    save(store, 1)
    copy = store.folder / "step-1-before-I-changed-it"
    copy.mkdir()
    (copy / "COMPLETE").write_text("{}")
    notes = store.folder / "step-notes"
    notes.mkdir()
    (notes / "todo.txt").write_text("keep me")
    (store.folder / "step-7").write_text("a file")
    (store.folder / "README").write_text("a file")
    store.clean()
    assert loaded_step(store) == 1
    save(store, 2, 3, 4)
    assert store.steps() == [3, 4]
    assert (copy / "COMPLETE").exists()
    assert (notes / "todo.txt").exists()
    assert (store.folder / "step-7").exists()


def test_a_failed_write_is_raised_later_and_loses_nothing(store: CheckpointStore) -> None:
    save(store, 1)
    store.folder.rename(store.folder.with_name("moved"))
    store.folder.write_text("in the way")
    store.save(2, state(2))
    with pytest.raises(OSError, match="checkpoints"):
        store.wait()
    store.folder.unlink()
    store.folder.with_name("moved").rename(store.folder)
    assert loaded_step(store) == 1
    save(store, 2)
    assert loaded_step(store) == 2


def test_a_state_that_cannot_be_written_keeps_the_previous_one(store: CheckpointStore) -> None:
    save(store, 1)
    with pytest.raises(Exception, match="pickle"):
        store.save(2, {"function": lambda: None}, wait=True)
    assert loaded_step(store) == 1
    store.clean()
    assert [p.name for p in store.folder.iterdir()] == [store.path(1).name]


def test_only_data_is_loaded_and_never_code(store: CheckpointStore) -> None:
    """The checksum of the foreign checkpoint is valid, but its content is not allowed."""
    save(store, 1)
    store.save(2, {"path": Path("x")}, wait=True)
    assert loaded_step(store) == 1
