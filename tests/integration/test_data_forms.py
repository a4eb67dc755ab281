"""A data set as folders, as folders with an index and as shards gives bit-identical runs."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from support.commands import run_here
from support.runs import Training, assert_identical

pytestmark = pytest.mark.xdist_group("runs")
SHORT = {"train": {"epochs": 1, "max_steps": 8}, "checkpoint": {"every_steps": 3, "every_epochs": 0}}


@pytest.fixture(scope="module")
def forms(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    """How to name each form to a training."""
    folder = tmp_path_factory.mktemp("forms")
    index, packed = folder / "digits.index", folder / "packed"
    done = run_here("data", "index", digits, "--out", index, "--workers", "1", "--json")
    assert done.code == 0, done.error
    assert done.result["images"] == {"train": 1438, "val": 359}
    assert done.result["problems"] == []
    done = run_here("data", "pack", digits, packed, "--shard-size", "300KiB", "--workers", "1", "--json")
    assert done.code == 0, done.error
    assert done.result["shards"] > 4
    return {"folder": (), "index": (f"data.index={index}",), "shards": (f"data.root={packed}",)}


@pytest.fixture
def whole(undisturbed: Callable[..., Training]) -> Training:
    """The undisturbed run from folders."""
    return undisturbed(1, SHORT)


def test_the_index_gives_the_same_run(
    train: Callable[..., Training], forms: dict[str, tuple[str, ...]], whole: Training
) -> None:
    training = train(1, "indexed", SHORT)
    training.finish(*forms["index"])
    assert_identical(training.run, whole.run)
    attempt = json.loads((training.run / "environment.json").read_text())["attempts"][0]
    first = json.loads((whole.run / "environment.json").read_text())["attempts"][0]
    assert attempt["data_fingerprint"] == first["data_fingerprint"]


def test_shards_killed_and_continued_give_the_run_of_the_folder(
    train: Callable[..., Training], forms: dict[str, tuple[str, ...]], whole: Training
) -> None:
    training = train(1, "shards", SHORT)
    started = training.start(*forms["shards"])
    training.wait_for(started, lambda: (training.run / "latest").exists(), "a checkpoint")
    started.signal_group(signal.SIGKILL)
    started.wait()
    finished = training.finish(*forms["shards"])
    assert "resuming at epoch 0" in finished.error
    assert_identical(training.run, whole.run)


def test_a_run_is_not_continued_with_another_index(
    forms: dict[str, tuple[str, ...]], whole: Training
) -> None:
    refused = run_here(*whole.command("train.max_steps=14", *forms["shards"]))
    assert refused.code == 2
    assert refused.result["error"]["field"] == "data.root"
    assert "the images differ" in refused.result["error"]["message"]


def test_unreadable_validation_images_are_left_out_only_where_allowed(
    train: Callable[..., Training], digits: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "val"
    for path in sorted((digits / "val").rglob("*.jp*g"))[::4]:
        target = copy / path.relative_to(digits / "val")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    spoiled = sorted(copy.rglob("*.jp*g"))[::45]
    assert len(spoiled) == 2
    for path in spoiled:
        path.write_bytes(path.read_bytes()[:-30])
    changes = {"train": {"epochs": 1, "max_steps": 2}, "data": {"val_root": str(copy)}}
    refused = run_here(*train(1, "one", changes).command())
    assert refused.code == 2
    assert refused.result["error"]["field"] == "data.val_root"
    assert "data.max_bad_val_fraction" in refused.result["error"]["remedy"]
    finished = train(1, "two", changes).finish("data.max_bad_val_fraction=0.03")
    assert (finished.result["num_validated"], finished.result["num_missing"]) == (88, 2)
    assert "(2 unreadable left out)" in finished.error


def test_damaged_files_are_listed_and_a_read_only_root_is_said(digits: Path, tmp_path: Path) -> None:
    copy = tmp_path / "set"
    subprocess.run(["cp", "-r", digits / "val", copy], check=True)
    first = min(copy.rglob("*.jp*g"))
    first.write_bytes(b"")
    done = run_here("data", "index", copy, "--workers", "2", "--json")
    path = str(first.relative_to(copy))
    assert done.result["problems"] == [{"half": "all", "path": path, "kinds": "empty"}]
    assert done.result["problem_counts"] == {"empty": 1}
    people = run_here("data", "index", copy, "--workers", "1")
    assert f"{path}: empty" in people.error
    nowhere = run_here("data", "index", copy, "--out", "/proc/x.index", "--json")
    assert nowhere.code == 2
    assert nowhere.result["error"]["field"] == "--out"
    assert "data.index=FILE" in nowhere.result["error"]["remedy"]
