"""Folders, folders with an index, and shards give bit-identical runs; damaged validation images."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from pipelines.datasets.folder import index_folder
from support.commands import run_here
from support.runs import Training, assert_identical

pytestmark = pytest.mark.xdist_group("runs")
SHORT = {"train": {"epochs": 1, "max_steps": 8}, "checkpoint": {"every_steps": 3, "every_epochs": 0}}


@pytest.fixture(scope="module")
def layouts(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    """Training overrides that select each layout of the same data set."""
    folder = tmp_path_factory.mktemp("layouts")
    index, packed = folder / "digits.index", folder / "packed"
    result = run_here("data", "index", digits, "--out", index, "--workers", "1", "--json")
    assert result.code == 0, result.error
    assert result.result["images"] == {"train": 1438, "val": 359}
    assert result.result["problems"] == []
    result = run_here("data", "pack", digits, packed, "--shard-size", "300KiB", "--workers", "1", "--json")
    assert result.code == 0, result.error
    assert result.result["shards"] > 4
    return {"folder": (), "index": (f"data.index={index}",), "shards": (f"data.root={packed}",)}


@pytest.fixture
def undisturbed_run(undisturbed: Callable[..., Training]) -> Training:
    """An undisturbed run from folders."""
    return undisturbed(1, SHORT)


def test_index_gives_the_same_run(
    train: Callable[..., Training], layouts: dict[str, tuple[str, ...]], undisturbed_run: Training
) -> None:
    training = train(1, "indexed", SHORT)
    training.finish(*layouts["index"])
    assert_identical(training.run, undisturbed_run.run)
    attempt = json.loads((training.run / "environment.json").read_text())["attempts"][0]
    first = json.loads((undisturbed_run.run / "environment.json").read_text())["attempts"][0]
    assert attempt["data_fingerprint"] == first["data_fingerprint"]


def test_killed_and_resumed_run_from_shards_is_identical(
    train: Callable[..., Training], layouts: dict[str, tuple[str, ...]], undisturbed_run: Training
) -> None:
    training = train(1, "shards", SHORT)
    started = training.start(*layouts["shards"])
    training.wait_for(started, lambda: (training.run / "latest").exists(), "a checkpoint")
    started.signal_group(signal.SIGKILL)
    started.wait()
    finished = training.finish(*layouts["shards"])
    assert "resuming at epoch 0" in finished.error
    assert_identical(training.run, undisturbed_run.run)


def test_killed_and_resumed_run_from_parquet_is_identical(
    train: Callable[..., Training], digits: Path, tmp_path: Path, undisturbed_run: Training
) -> None:
    """Rows in the order of the folder; the images are in Snappy blocks of one row group."""
    for split in ("train", "val"):
        table = index_folder(digits / split, None, "data.root")
        images = [{"bytes": table.read(i), "path": name} for i, name in enumerate(table.files)]
        names = [table.classes[label] for label in table.labels.tolist()]
        parquet.write_table(pyarrow.table({"image": images, "label": names}), tmp_path / f"{split}-0.parquet")
    result = run_here("data", "index", tmp_path, "--workers", "1", "--json")
    assert result.code == 0, result.error
    assert result.result["images"] == {"train": 1438, "val": 359}
    training = train(1, "parquet", SHORT)
    started = training.start(f"data.root={tmp_path}")
    training.wait_for(started, lambda: (training.run / "latest").exists(), "a checkpoint")
    started.signal_group(signal.SIGKILL)
    started.wait()
    finished = training.finish(f"data.root={tmp_path}")
    assert "resuming at epoch 0" in finished.error
    assert_identical(training.run, undisturbed_run.run)


def test_run_does_not_resume_with_other_images(
    layouts: dict[str, tuple[str, ...]], undisturbed_run: Training
) -> None:
    refused = run_here(*undisturbed_run.command("train.max_steps=14", *layouts["shards"]))
    assert refused.code == 2
    assert refused.result["error"]["field"] == "data.root"
    assert "the images differ" in refused.result["error"]["message"]


def test_unreadable_validation_images_need_a_limit(
    train: Callable[..., Training], digits: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "val"
    for path in sorted((digits / "val").rglob("*.jp*g"))[::4]:
        target = copy / path.relative_to(digits / "val")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    damaged = sorted(copy.rglob("*.jp*g"))[::45]
    assert len(damaged) == 2
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-30])
    (damaged[0].parent / "x.gif").write_bytes(b"GIF89a")
    changes = {"train": {"epochs": 1, "max_steps": 2}, "data": {"val_root": str(copy)}}
    refused = run_here(*train(1, "one", changes).command())
    assert refused.code == 2
    assert refused.result["error"]["field"] == "data.val_root"
    assert "data.max_bad_val_fraction" in refused.result["error"]["remedy"]
    finished = train(1, "two", changes).finish("data.max_bad_val_fraction=0.03")
    assert (finished.result["num_validated"], finished.result["num_missing"]) == (88, 2)
    assert "(2 unreadable images skipped)" in finished.error
    assert f"validation data: skipped GIF image: 1 ({damaged[0].parent.name}/x.gif)" in finished.error


def test_damaged_files_and_a_read_only_root_are_reported(digits: Path, tmp_path: Path) -> None:
    copy = tmp_path / "set"
    subprocess.run(["cp", "-r", digits / "val", copy], check=True)
    first = min(copy.rglob("*.jp*g"))
    first.write_bytes(b"")
    result = run_here("data", "index", copy, "--workers", "2", "--json")
    path = str(first.relative_to(copy))
    assert result.result["problems"] == [
        {"half": "all", "path": path, "kinds": "empty", "reason": "is empty"}
    ]
    assert result.result["problem_counts"] == {"empty": 1}
    plain = run_here("data", "index", copy, "--workers", "1")
    assert f"{path}: empty" in plain.error
    refused = run_here("data", "index", copy, "--out", "/proc/x.index", "--json")
    assert refused.code == 2
    assert refused.result["error"]["field"] == "--out"
    assert "cannot be written" in refused.result["error"]["message"]
    refused = run_here("data", "index", "/proc/sys", "--json")
    assert refused.code == 2
    assert "data.index=FILE" in refused.result["error"]["remedy"]
