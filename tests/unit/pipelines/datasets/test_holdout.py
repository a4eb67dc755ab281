"""The validation split that `data.val_fraction` draws from class folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl2pa.errors import UserError
from pipelines.datasets import ImageTable, PathTable, build_index, open_dataset
from pipelines.datasets.holdout import draw
from pipelines.datasets.index import INDEX_NAME

Tree = Callable[..., Path]
NAMES = [*(f"ant/{i}.png" for i in range(10)), *(f"cat/{i}.png" for i in range(5)), "dog/0.png"]


def opened(root: Path, split: Any, fraction: float | None = 0.2, **options: Any) -> ImageTable:
    arguments: dict[str, Any] = {"val_root": None, "classes": None, **options}
    table = open_dataset("imagefolder", root, split=split, val_fraction=fraction, **arguments)
    assert isinstance(table, ImageTable)
    return table


def refused(root: Path, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        opened(root, "train", **options)
    return caught.value


def test_each_image_is_in_one_split_and_each_class_has_its_share(image_tree: Tree) -> None:
    root = image_tree("pets", *NAMES)
    train, val = opened(root, "train"), opened(root, "val")
    assert sorted([*train.files, *val.files]) == sorted(NAMES)
    assert train.classes == val.classes == ("ant", "cat", "dog")
    assert np.bincount(train.labels, minlength=3).tolist() == [8, 4, 1]
    assert np.bincount(val.labels, minlength=3).tolist() == [2, 1, 0]
    for table in (train, val):
        assert [table.classes[label] for label in table.labels] == [name[:3] for name in table.files]
        assert list(table.files) == sorted(table.files)


RECORDED = ["ant/4.png", "ant/7.png", "cat/0.png"]
"""Validation images of NAMES. Another split would be evaluated on images that finished runs were trained on."""


def test_the_split_is_the_recorded_one(image_tree: Tree) -> None:
    assert list(opened(image_tree("pets", *NAMES), "val").files) == RECORDED


def test_folders_and_index_and_other_places_give_the_same_split(image_tree: Tree, tmp_path: Path) -> None:
    root = image_tree("pets", *NAMES)
    other = tmp_path / "copy"
    shutil.copytree(root, other / "train")
    listed = {split: opened(root, split) for split in ("train", "val")}
    for place in (root, other):
        build_index.build_index(place, place / INDEX_NAME, 1)
    build_index.build_index(root, tmp_path / "pets.index", 1)
    for split, expected in listed.items():
        for table in (
            opened(root, split),
            opened(other, split),
            opened(root, split, index=tmp_path / "pets.index"),
        ):
            assert list(table.files) == list(expected.files)
            assert table.fingerprint == expected.fingerprint
            assert table.sizes is not None
            assert len(table.sizes) == len(table)


def test_fractions_have_different_fingerprints(image_tree: Tree) -> None:
    root = image_tree("pets", *NAMES)
    assert len({opened(root, "train", fraction).fingerprint for fraction in (0.2, 0.4, 0.6)}) == 3


def test_a_new_image_moves_at_most_one_other_image() -> None:
    names = [f"cat/{i}.png" for i in range(50)]
    before = draw(PathTable.of(names), np.zeros(50, np.int64), 0.2)
    for new in ("cat/0a.png", "cat/9z.png", "cat/x.png"):
        more = sorted([*names, new])
        after = dict(zip(more, draw(PathTable.of(more), np.zeros(51, np.int64), 0.2).tolist(), strict=True))
        moved = [name for name, was in zip(names, before.tolist(), strict=True) if after[name] != was]
        assert len(moved) <= 1


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (5, 0.5, 3), (100, 0.1, 10)]
)
def test_rounding_leaves_images_for_both_splits(count: int, fraction: float, expected: int) -> None:
    paths = PathTable.of(f"cat/{i}.png" for i in range(count))
    assert draw(paths, np.zeros(count, np.int64), fraction).sum() == expected


def test_class_list_and_classes_without_images(image_tree: Tree) -> None:
    root = image_tree("pets", *NAMES)
    val = opened(root, "val", classes=["dog", "unseen", "cat", "ant"])
    assert list(val.files) == RECORDED
    assert val.labels.tolist() == [3, 3, 2]


def test_long_tail_reduces_the_training_split_only(image_tree: Tree) -> None:
    root = image_tree("pets", *(f"{c}/{i}.png" for c in ("ant", "cat") for i in range(10)))
    tail = opened(root, "train", imbalance=0.5)
    assert set(tail.files) < set(opened(root, "train").files)
    assert list(opened(root, "val", imbalance=0.5).files) == list(opened(root, "val").files)


@pytest.mark.parametrize("indexed", [False, True])
def test_existing_validation_folder_is_refused(image_tree: Tree, indexed: bool) -> None:
    root = image_tree("pets", "train/cat/1.png", "train/cat/2.png", "val/cat/3.png")
    if indexed:
        build_index.build_index(root, root / INDEX_NAME, 1)
    error = refused(root)
    assert (error.field, error.value) == ("data.val_fraction", 0.2)
    assert "already has a validation folder" in error.message
    assert len(opened(root / "train", "val")) == 1  # the remedy


def test_a_class_named_val_is_no_validation_folder(image_tree: Tree) -> None:
    root = image_tree("pets", *(f"{c}/{i}.png" for c in ("ant", "val") for i in range(4)))
    assert opened(root, "val").labels.tolist() == [0, 1]


def test_only_classes_of_one_image_are_refused(image_tree: Tree) -> None:
    error = refused(image_tree("pets", "ant/1.png", "cat/2.png"))
    assert (error.field, "no class has two images" in error.message) == ("data.val_fraction", True)


def test_shards_are_refused(tar_file: Callable[..., Path], picture: bytes) -> None:
    root = tar_file(
        "data/train-0.tar", {"a.jpg": picture, "a.cls": b"0", "b.jpg": picture, "b.cls": b"0"}
    ).parent
    build_index.build_index(root, root / INDEX_NAME, 1)
    error = refused(root)
    assert (error.field, "tar shards" in error.message) == ("data.val_fraction", True)


@pytest.mark.parametrize("split", ["train", "val"])
def test_missing_validation_folder_names_the_key(image_tree: Tree, split: str) -> None:
    root = image_tree("pets", *NAMES)
    with pytest.raises(UserError) as caught:
        opened(root, split, None)
    assert "data.val_fraction=0.1" in caught.value.remedy
