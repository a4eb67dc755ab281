from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dl2pa.config import Config, merge, parse_config
from dl2pa.errors import UserError
from dl2pa.training.data import DataSplits, build_calibration_pipeline, open_data, open_split
from dl2pa.training.distributed import World
from pipelines.dataset import SyntheticDataset, num_samples
from pipelines.datasets import ImageTable, write_digits

SMALL: dict[str, Any] = {
    "data": {"dataset": "digits", "image_size": 16, "eval_resize": 16, "loader": "torchvision"},
    "model": {"backbone": "resnet8", "embedding_dim": 6},
    "train": {"batch_size": 16},
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits", size=16)


def config(digits: Path, **changes: dict[str, Any]) -> Config:
    return parse_config(merge(merge(SMALL, {"data": {"root": str(digits)}}), changes))


def train_counts(splits: DataSplits) -> list[int]:
    assert not isinstance(splits.train, SyntheticDataset)
    return np.bincount(splits.train.labels, minlength=len(splits.classes)).tolist()


def test_imbalance_applies_to_training_only(digits: Path) -> None:
    whole = open_data(config(digits), 1)
    tailed = open_data(config(digits, data={"imbalance": 0.1}), 1)
    most = num_samples(whole.train) / 10
    shares = [int(most * 0.1 ** (k / 9)) for k in range(10)]
    assert train_counts(tailed) == np.minimum(shares, train_counts(whole)).tolist()
    assert num_samples(tailed.val) == num_samples(whole.val) == 359
    assert tailed.val.fingerprint == whole.val.fingerprint
    assert whole.groups is None
    assert tailed.groups == ("head",) * 3 + ("medium",) * 4 + ("tail",) * 3


def test_the_subset_is_independent_of_the_seed(
    digits: Path,
) -> None:
    prints = {
        (imbalance, seed): open_data(
            config(digits, data={"imbalance": imbalance}, train={"seed": seed}), 1
        ).fingerprint
        for imbalance in (None, 0.1, 0.2)
        for seed in (0, 1)
    }
    assert all(prints[i, 0] == prints[i, 1] for i in (None, 0.1, 0.2))
    assert len(set(prints.values())) == 3


def test_an_unreadable_image_held_out_for_calibration_is_left_out(digits: Path, tmp_path: Path) -> None:
    root = tmp_path / "digits"
    shutil.copytree(digits, root)
    held = open_data(config(root, data={"calibration_fraction": 0.05}), 1).calibration
    assert isinstance(held, ImageTable)
    held.path(3).write_bytes(b"no image")
    settings = config(
        root, data={"calibration_fraction": 0.05}
    )  # max_bad_fraction: 0.01 of 72 images is none
    held = open_data(settings, 1).calibration
    assert held is not None
    pipeline = build_calibration_pipeline(settings, held, World(0, 1, 0, 1, torch.device("cpu"), 1))
    try:
        assert sum(batch.missing for batch in pipeline) == 1
    finally:
        pipeline.close()


def test_a_batch_larger_than_the_long_tail_is_refused(digits: Path) -> None:
    with pytest.raises(UserError, match=r"larger than the training set of \d+ images") as caught:
        open_data(config(digits, data={"imbalance": 0.1}, train={"batch_size": 600}), 1)
    assert caught.value.field == "train.batch_size"


def test_a_long_tailed_folder_has_groups(digits: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for k in range(10):
            (tmp_path / split / str(k)).mkdir(parents=True)
            files = sorted((digits / split / str(k)).iterdir())
            for file in files[: 130 // (k + 1) if split == "train" else 5]:
                (tmp_path / split / str(k) / file.name).symlink_to(file)
    splits = open_data(config(tmp_path, data={"dataset": "imagefolder"}), 1)
    assert train_counts(splits)[:2] == [130, 65]
    assert splits.groups == ("head", *["medium"] * 5, *["tail"] * 4)


def test_synthetic_data_without_a_number_of_classes_is_refused() -> None:
    with pytest.raises(UserError, match=r"Set data\.num_classes") as caught:
        open_split(parse_config({"data": {"dataset": "synthetic"}}), "val")
    assert caught.value.field == "data.num_classes"


def test_digits_are_written_to_runs_if_data_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the image: / is read-only, /runs is a volume."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    unset = parse_config(SMALL)
    with monkeypatch.context() as read_only:
        read_only.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
        open_data(unset, 1)
        assert (tmp_path / "runs/digits/train").is_dir() and not (tmp_path / "data").exists()
    open_data(unset, 1)
    assert not (tmp_path / "data").exists(), "written again beside what was there"


def test_an_empty_mount_is_reported_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = config(tmp_path, data={"dataset": "imagefolder"})
    with pytest.raises(UserError, match="contains no folder 'train'"):
        open_data(images, 1)
    monkeypatch.setenv("DL2PA_IMAGE", "unknown")
    with pytest.raises(UserError, match=r"is empty.*-v DIR:/data:ro"):
        open_data(images, 1)
    (tmp_path / "photo.jpeg").touch()
    with pytest.raises(UserError, match="contains no folder 'train'"):
        open_data(images, 1)
