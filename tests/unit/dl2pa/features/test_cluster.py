"""Feature data sets with more classes: clusters within each class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl2pa.errors import UserError
from dl2pa.features.cluster import check_count, cluster_features, k_means
from dl2pa.training.data import open_data
from pipelines.datasets.features import load_features
from support.commands import run_here


def test_k_means_finds_separate_groups() -> None:
    generator = np.random.default_rng(0)
    centers = 20.0 * np.arange(5)[:, None] * np.ones(3)
    rows = (centers[:, None] + generator.normal(size=(5, 30, 3))).reshape(-1, 3)
    found = k_means(rows, 5, seed=1)
    assert np.abs(found[found[:, 0].argsort()] - centers).max() < 1.0
    assert len(k_means(np.zeros((4, 2)), 3, seed=0)) == 3, "equal rows"


def test_each_class_becomes_several(on_features: Any, folder: Path, tmp_path: Path) -> None:
    record = cluster_features(folder, tmp_path / "out", 2)
    assert len(record["classes"]) == 6
    config = on_features(data={"root": str(tmp_path / "out")})
    data = open_data(config, 1)
    assert data.classes[:3] == ("class0/0", "class0/1", "class1/0")
    for split in ("train", "val"):
        before, after = load_features(folder, split), load_features(tmp_path / "out", split)
        assert np.array_equal(after.features, before.features)
        assert np.array_equal(after.labels // 2, before.labels)
    assert np.bincount(load_features(tmp_path / "out", "train").labels).min() > 0


def test_too_many_clusters_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        cluster_features(folder, tmp_path / "out", 9)
    assert (caught.value.field, (tmp_path / "out").exists()) == ("--clusters", False)


def test_equal_features_do_not_make_empty_classes(folder: Path, tmp_path: Path) -> None:
    train = load_features(folder, "train")
    members = np.flatnonzero(train.labels == 1)
    few = train.features.copy()
    few[members] = train.features[members[np.arange(len(members)) % 3]]
    with pytest.raises(UserError, match="from 2 to 3"):
        check_count(4, replace(train, features=few))
    check_count(3, replace(train, features=few))
    few[members] = few[members[0]]
    with pytest.raises(UserError, match="'class1' has 1 different") as caught:
        check_count(3, replace(train, features=few))
    assert caught.value.field == "--clusters"


def test_the_command_writes_clusters(on_features: Any, file_of: Any, tmp_path: Path) -> None:
    file = file_of(on_features())
    done = run_here("features", file, "--out", tmp_path / "f", "--clusters", "3", "--json")
    assert done.code == 0, done.error
    assert (done.result["classes"], done.result["train"]) == (9, 24)
    refused = run_here("features", file, "--out", tmp_path / "g", "--clusters", "3", "--pca", "2", "--json")
    assert refused.result["error"]["field"] == "--clusters"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["data.imbalance=0.1", "--pca", "2"], "data.imbalance"),
        (["data.label_noise=0.1", "--clusters", "2"], "data.label_noise"),
        (["data.val_fraction=0.25", "--pca", "2"], "data.val_fraction"),
        (["--clusters", "2", "--dtype", "float16"], "--dtype"),
    ],
)
def test_settings_without_effect_on_existing_features_are_refused(
    on_features: Any, file_of: Any, tmp_path: Path, arguments: list[str], field: str
) -> None:
    refused = run_here("features", file_of(on_features()), *arguments, "--out", tmp_path / "g", "--json")
    assert (refused.code, refused.result["error"]["field"]) == (2, field)
    assert not (tmp_path / "g").exists()


def test_label_noise_changes_the_training_labels_only(on_features: Any) -> None:
    clean, noisy = (open_data(on_features(data={"label_noise": p}), 1) for p in (0.0, 0.5))
    assert not np.array_equal(noisy.train.labels, clean.train.labels)  # pyright: ignore
    assert noisy.val.fingerprint == clean.val.fingerprint
    drawn = open_data(on_features(data={"label_noise": 0.5, "val_fraction": 0.25}), 1)
    assert (len(drawn.train.labels), len(drawn.val.labels)) == (18, 6)  # pyright: ignore
