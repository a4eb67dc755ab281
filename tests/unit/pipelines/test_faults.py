"""Damaged, missing and stalled files in both loaders, from folders and from shards."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dl2pa.errors import UserError
from dl2pa.training.evaluate import evaluate
from pipelines.batch import Batch, Pipeline
from pipelines.datasets.build_index import list_source
from pipelines.datasets.folder import index_folder
from pipelines.datasets.index import Index, SplitIndex
from pipelines.datasets.pack import PackOptions, pack
from pipelines.datasets.table import ImageTable
from pipelines.encoded import FaultLimits, ImageReader
from pipelines.readers import ReaderPool, StalledRead
from pipelines.sampler import EvalSampler, TrainSampler
from pipelines.transforms import Transforms

Folder = Callable[..., ImageTable]
Build = Callable[..., Pipeline]
TRAIN = Transforms(16, train=True, trivial_augment=True, erasing=0.3)
EVAL = Transforms(16, train=False, eval_resize=18)
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(params=["dali", "torchvision"])
def loader(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    return request.param


def packed(table: ImageTable, out: Path) -> ImageTable:
    source = Index({"all": SplitIndex(table, np.zeros(len(table), np.uint8))}, table.classes, {})
    result = pack(source, out, PackOptions(shard_size=20_000), 1, lambda done, total: None)
    assert result.shards > 1
    return result.index.splits["all"].table


def assert_same(actual: list[Batch], expected: list[Batch]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        for x, y in ((a.indices, b.indices), (a.targets, b.targets), (a.images, b.images)):
            assert torch.equal(x, y)
        assert (a.valid, a.missing) == (b.valid, b.missing)


def test_shards_and_folder_give_the_same_batches_from_any_step(
    folder: Folder, pipeline_over: Build, loader: str, tmp_path: Path
) -> None:
    """The batches are bit-identical, including the substitutes of damaged images."""
    table = folder(24, {5: b"broken", 9: b""})
    shards = packed(table, tmp_path / "packed")
    sampler = TrainSampler(24, 4, 0)
    batches = list(pipeline_over(table, loader, TRAIN, sampler))
    for source in (table, shards):
        for first in (0, 2, 5):
            pipeline = pipeline_over(source, loader, TRAIN, sampler)
            pipeline.start(0, first)
            assert_same(list(pipeline), batches[first:])
    limits = FaultLimits(max_bad_val_fraction=0.1)
    from_both = [
        list(pipeline_over(source, loader, EVAL, EvalSampler(24, 5), limits=limits))
        for source in (table, shards)
    ]
    assert_same(*from_both)


def test_unreadable_images_are_counted_and_logged_once(
    folder: Folder, pipeline_over: Build, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {17: b"", 99: b"text", 250: b"\xff\xd8\xff", 301: b"\0" * 50}
    table = folder(400, bad)
    pipeline = pipeline_over(table, "torchvision", TRAIN, TrainSampler(400, 20, 0), limits=FaultLimits())
    for epoch in range(2):
        pipeline.start(epoch)
        assert len(list(pipeline)) == 20
    assert pipeline.bad_images() == [str(table.path(i)) for i in bad]
    assert all(caplog.text.count(f"{table.path(i)} ") == 1 for i in bad)


def test_process_stops_early_at_a_high_rate_of_unreadable_images(
    folder: Folder, pipeline_over: Build
) -> None:
    table = folder(400, dict.fromkeys(range(0, 400, 2), b""))
    limits = FaultLimits(max_bad_fraction=0.2)
    pipeline = pipeline_over(table, "torchvision", TRAIN, TrainSampler(400, 80, 0, 5, 8), limits=limits)
    with pytest.raises(UserError, match="are too many of the") as caught:
        for epoch in range(5):
            pipeline.start(epoch)
            list(pipeline)
    assert caught.value.field == "data.max_bad_fraction"
    assert caught.value.value < limits.allowed(400, True) == 80


def test_file_changed_after_listing_is_unreadable(folder: Folder, drawn: Any) -> None:
    table = folder(8)
    table.path(3).write_bytes(drawn.encoded(3)[:-700])
    reader = ImageReader(table, TRAIN, 0, FaultLimits(0.5))
    fetched = reader.fetch(0, 3)
    assert fetched is not None
    assert fetched[0] != 3
    assert "has changed" in reader.bad[3]


def evaluated(pipeline: Pipeline) -> dict[str, Any]:
    def score(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.zeros(len(images), dtype=torch.int64), 2).float()

    result = evaluate(score, pipeline, 2)
    assert result is not None
    return result.record()


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("bad", [(1,), (0, 5, 19), (8, 9, 10, 11), (4, 5, 6, 7, 16, 17, 18, 19)], ids=len)
def test_validation_leaves_out_unreadable_images(
    folder: Folder, pipeline_over: Build, loader: str, bad: tuple[int, ...], world: int, drawn: Any
) -> None:
    """Including steps without any image, and images that only the decoder rejects."""
    cut = drawn.encoded(5, "PNG")[: len(drawn.encoded(5, "PNG")) // 2]
    table = folder(20, {i: cut if i % 2 else b"" for i in bad})
    limits = FaultLimits(max_bad_val_fraction=0.4)
    seen: list[int] = []
    steps = set()
    missing = 0
    for rank in range(world):
        pipeline = pipeline_over(table, loader, EVAL, EvalSampler(20, 4, rank, world), limits=limits)
        for _ in range(2):  # a second validation gives the same
            pipeline.start(0)
            batches = list(pipeline)
        steps.add(len(batches))
        missing += sum(batch.missing for batch in batches)
        for batch in batches:
            assert (
                batch.targets[: batch.valid].tolist()
                == table.labels[batch.indices[: batch.valid].numpy()].tolist()
            )
            seen += batch.indices[: batch.valid].tolist()
    assert sorted(seen) == sorted(set(range(20)) - set(bad))
    assert (missing, len(steps)) == (len(bad), 1)
    if world == 1:
        record = evaluated(pipeline)
        assert (record["num_validated"], record["num_missing"]) == (20 - len(bad), len(bad))
        assert sum(record["class_total"]) == 20 - len(bad)


def test_training_images_that_are_read_as_in_validation_have_the_limit_of_training(
    folder: Folder, pipeline_over: Build
) -> None:
    """Images held out for calibration, or whose features are computed; training tolerates at least one."""
    limits = FaultLimits(of_training=True)
    pipeline = pipeline_over(folder(20, {3: b""}), "torchvision", EVAL, EvalSampler(20, 4), limits=limits)
    assert sum(batch.missing for batch in pipeline) == pipeline.max_bad_images == 1
    table = folder(20, dict.fromkeys((1, 2), b""))
    with pytest.raises(UserError, match="unreadable training images exceed the 1 allowed") as caught:
        list(pipeline_over(table, "torchvision", EVAL, EvalSampler(20, 4), limits=limits))
    assert caught.value.field == "data.max_bad_fraction"


def test_too_many_unreadable_validation_images_raise_an_error(folder: Folder, pipeline_over: Build) -> None:
    table = folder(20, dict.fromkeys((1, 2, 3), b""))
    limits = FaultLimits(max_bad_val_fraction=0.1)
    with pytest.raises(UserError, match="exceed the 2 allowed") as caught:
        list(pipeline_over(table, "torchvision", EVAL, EvalSampler(20, 4), limits=limits))
    assert caught.value.field == "data.max_bad_val_fraction"


class _Missing:
    """Pipeline of a rank that left out one more image than allowed over all ranks."""

    num_samples, steps_per_epoch, max_bad_images = 4, 1, 1

    def start(self, epoch: int, step: int = 0) -> None: ...

    def __iter__(self) -> Any:
        yield Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), torch.arange(2), 2, missing=2)


def test_missing_validation_images_are_limited_over_all_processes() -> None:
    with pytest.raises(UserError, match="exceed the 1 allowed, over all processes"):
        evaluated(_Missing())  # type: ignore[arg-type]


def test_stalled_read_is_logged_and_raises_an_error(
    folder: Folder,
    pipeline_over: Build,
    loader: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A blocking read of a pipe without a writer simulates a file system that does not respond."""
    monkeypatch.setattr("pipelines.datasets.table.read_image_file", lambda path: Path(path).read_bytes())
    table = folder(12)
    pipe = table.path(int(TrainSampler(12, 4, 0).indices(0, 1)[2]))
    pipe.unlink()
    os.mkfifo(pipe)
    limits = FaultLimits(0.5, read_warn_s=0.05, read_timeout_s=0.4)
    pipeline = pipeline_over(table, loader, TRAIN, TrainSampler(12, 4, 0), limits=limits, threads=2)
    with caplog.at_level(logging.WARNING), pytest.raises(StalledRead, match="has not finished") as caught:
        list(pipeline)
    assert str(pipe) in str(caught.value)
    assert f"reading {pipe} has not finished" in caplog.text
    release(pipe)


def test_the_end_of_a_reading_thread_raises_an_error(
    folder: Folder, pipeline_over: Build, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that gets no memory can end without an answer."""
    monkeypatch.setattr(ReaderPool, "_work", lambda pool: None)
    limits = FaultLimits(0.5, read_warn_s=0.05, read_timeout_s=0.4)
    pipeline = pipeline_over(folder(12), loader, TRAIN, TrainSampler(12, 4, 0), limits=limits, threads=2)
    with pytest.raises(RuntimeError, match="a thread that reads images has ended"):
        list(pipeline)


def release(pipe: Path) -> None:
    os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))


HANGS = """
import sys
from pathlib import Path
import torch
from pipelines.build import build_pipeline
from pipelines.datasets.folder import index_folder
from pipelines.encoded import FaultLimits
from pipelines.sampler import TrainSampler
from pipelines.transforms import Transforms
import pipelines.datasets.table
pipelines.datasets.table.read_image_file = lambda path: Path(path).read_bytes()
table = index_folder(Path(sys.argv[1]), None, "data.root")
pipeline = build_pipeline(table, Transforms(16, train=True), TrainSampler(4, 4, 0), loader="torchvision", seed=0,
    device=torch.device("cpu"), threads=1, limits=FaultLimits(read_warn_s=0.1, read_timeout_s=0.2))
list(pipeline)
"""


def test_process_with_a_stalled_read_can_exit(folder: Folder) -> None:
    table = folder(4)
    table.path(1).unlink()
    os.mkfifo(table.path(1))
    command = [sys.executable, "-c", HANGS, str(table.root)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 1
    assert "StalledRead" in result.stderr.splitlines()[-1]


def test_list_source_has_the_fingerprint_of_the_folder(folder: Folder, tmp_path: Path) -> None:
    table = folder(6)
    assert list_source(table.root).splits["all"].table.fingerprint == table.fingerprint
    assert index_folder(table.root, None, "data.root").fingerprint == table.fingerprint
