"""Skipped files and classes without images are logged at the start of training."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dl2pa.training.data import DataSplits, log_skipped
from pipelines.datasets import ImageTable, open_dataset


def splits(root: Path, *names: str) -> DataSplits:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"image")
    classes = ["ant", "bee", "cat"]
    train, val = (open_dataset("imagefolder", root, None, classes, split) for split in ("train", "val"))  # type: ignore[arg-type]
    assert isinstance(train, ImageTable)
    assert isinstance(val, ImageTable)
    return DataSplits(train, val, train.classes)


def test_images_that_are_not_read_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = (
        "train/ant/1.jpg",
        "train/ant/2.gif",
        "train/bee/1.jpg",
        "val/ant/1.jpg",
        "val/ant/1.txt",
        "old.tar",
    )
    with caplog.at_level(logging.INFO):
        log_skipped(splits(tmp_path, *names))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "training data: skipped GIF image: 1 (ant/2.gif); archive: 1 (old.tar)"),
        ("INFO", "validation data: skipped not an image: 1 (ant/1.txt)"),
        ("WARNING", "training data: 1 of 3 classes have no images: 'cat'"),
    ]


def test_complete_data_set_is_not_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{split}/{name}/1.jpg" for split in ("train", "val") for name in ("ant", "bee", "cat")]
    with caplog.at_level(logging.INFO):
        log_skipped(splits(tmp_path, *names))
    assert not caplog.records
