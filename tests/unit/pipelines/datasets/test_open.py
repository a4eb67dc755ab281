import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dl2pa.errors import UserError
from pipelines.datasets import ArrayDataset, ImageTable, check_num_classes, open_dataset

Tree = Callable[..., Path]


def refused(words: str, **changes: Any) -> UserError:
    arguments: dict[str, Any] = {"name": "imagefolder", "root": None, "val_root": None, "classes": None}
    with pytest.raises(UserError, match=words) as caught:
        open_dataset(**{**arguments, "split": "train", **changes})
    return caught.value


def folder(dataset: ArrayDataset | ImageTable) -> ImageTable:
    assert isinstance(dataset, ImageTable)
    return dataset


@pytest.fixture
def pets(image_tree: Tree) -> Path:
    return image_tree(
        "pets", "train/ant/1.png", "train/cat/2.png", "train/dog/3.png", "val/dog/4.png", "val/cat/5.png"
    )


def test_one_root_contains_both_splits(pets: Path) -> None:
    train, val = (folder(open_dataset("imagefolder", pets, None, None, split)) for split in ("train", "val"))
    assert (train.root, val.root) == (pets / "train", pets / "val")
    assert train.classes == val.classes == ("ant", "cat", "dog")
    assert val.labels.tolist() == [1, 2]


@pytest.mark.parametrize("subfolders", [("", ""), ("train", ""), ("", "val"), ("train", "val")])
def test_splits_in_separate_folders(image_tree: Tree, tmp_path: Path, subfolders: tuple[str, str]) -> None:
    image_tree(f"here/{subfolders[0]}", "a/1.png", "b/2.png")
    image_tree(f"there/{subfolders[1]}", "b/3.png")
    root, val_root = tmp_path / "here", tmp_path / "there"
    train, val = (
        folder(open_dataset("imagefolder", root, val_root, None, split)) for split in ("train", "val")
    )
    assert (train.root, val.root) == (root / subfolders[0], val_root / subfolders[1])
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1], [1])


def test_class_list_sets_the_labels_of_both_splits(pets: Path, tmp_path: Path) -> None:
    file = tmp_path / "order.txt"
    file.write_text("dog\nunseen\ncat\nant\n")
    train, val = (folder(open_dataset("imagefolder", pets, None, file, split)) for split in ("train", "val"))
    assert train.classes == val.classes == ("dog", "unseen", "cat", "ant")
    assert (train.labels.tolist(), val.labels.tolist()) == ([3, 2, 0], [2, 0])
    check_num_classes(train, 4)


def test_validation_opens_alone_with_a_class_list(image_tree: Tree) -> None:
    root = image_tree("only", "val/b/1.png")
    assert open_dataset("imagefolder", root, None, ["a", "b"], "val").labels.tolist() == [1]
    assert refused("no folder 'train'", root=root, split="val").field == "data.root"


def test_unknown_validation_class_is_refused(image_tree: Tree) -> None:
    root, val_root = image_tree("here", "cat/1.png", "dog/2.png"), image_tree("there", "cats/3.png")
    error = refused(
        "'cats' in .*not among the 2 classes; the nearest is 'cat'", root=root, val_root=val_root, split="val"
    )
    assert (error.field, error.value) == ("data.val_root", str(val_root))


def test_missing_folders_are_reported(pets: Path, tmp_path: Path) -> None:
    error = refused("is not set")
    assert (error.field, error.value) == ("data.root", None)
    assert "DL2PA_DATA" in error.remedy
    error = refused("does not exist", root=tmp_path / "absent")
    assert error.value == str(tmp_path / "absent")
    error = refused("contains no folder 'train'", root=pets / "val")
    assert "data.val_root" in error.remedy
    error = refused("does not exist", root=pets, val_root=tmp_path / "absent", split="val")
    assert (error.field, error.value) == ("data.val_root", str(tmp_path / "absent"))


def test_unknown_data_set_is_refused() -> None:
    error = refused("nearest is 'cifar100'", name="cifar-100")
    assert (error.field, error.value) == ("data.dataset", "cifar-100")
    assert "tiny_imagenet" in error.remedy


@pytest.mark.parametrize(
    "name", ["tiny_imagenet", "cifar10", "cifar100", "svhn", "svhn_lt_legacy", "stl10", "digits"]
)
def test_only_image_folders_have_a_second_root(name: str, tmp_path: Path) -> None:
    assert (
        refused(f"not used by data.dataset={name}", name=name, root=tmp_path, val_root=tmp_path).field
        == "data.val_root"
    )
    assert refused("is not set", name=name).field == "data.root"


@pytest.mark.parametrize("name", ["tiny_imagenet", "cifar10", "cifar100", "svhn", "stl10"])
def test_missing_file_of_an_empty_root_is_reported(name: str, tmp_path: Path) -> None:
    remedy = refused("there is no file", name=name, root=tmp_path).remedy
    assert "official" in remedy or "authors'" in remedy


def test_unreadable_folder_is_reported(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", os.fspath(self))

    monkeypatch.setattr(Path, "is_dir", deny)
    error = refused("cannot be read: Permission denied", root=pets)
    assert (error.field, error.value) == ("data.root", str(pets))


def test_digits_are_written_if_missing(tmp_path: Path) -> None:
    train, val = (
        folder(open_dataset("digits", tmp_path / "digits", None, None, split)) for split in ("train", "val")
    )
    assert len(train) + len(val) == 1797
    assert train.classes == val.classes == tuple("0123456789")


def test_class_list_of_stl10_is_fixed(tmp_path: Path) -> None:
    (tmp_path / "class_names.txt").write_text("cat dog")
    (tmp_path / "train_X.bin").write_bytes(bytes(3 * 96 * 96))
    (tmp_path / "train_y.bin").write_bytes(bytes([2]))
    dataset = open_dataset("stl10", tmp_path, None, ["cat", "dog"], "train")
    assert isinstance(dataset, ArrayDataset)
    assert dataset.labels.tolist() == [1]
    assert (
        refused("not the class list", name="stl10", root=tmp_path, classes=["dog", "cat"]).field
        == "data.classes"
    )


def test_imagenette_mini(shared_data: Callable[[str], Path]) -> None:
    root = shared_data("imagenette-mini")
    synsets = shared_data("semantic/imagenet_synsets.txt")
    train, val = (folder(open_dataset("imagefolder", root, None, None, split)) for split in ("train", "val"))
    assert np.bincount(train.labels).tolist() == [60] * 10
    assert np.bincount(val.labels).tolist() == [20] * 10
    assert train.classes == val.classes
    full = folder(open_dataset("imagefolder", root, None, synsets, "val"))
    assert list(full.files) == list(val.files)
    assert [full.classes[label] for label in full.labels] == [val.classes[label] for label in val.labels]


@pytest.fixture
def many(image_tree: Tree) -> Path:
    """Twenty training and three validation images of each of three classes."""
    train = [f"train/{name}/{i:02d}.png" for name in ("ant", "cat", "dog") for i in range(20)]
    return image_tree(
        "many", *train, *(f"val/{name}/{i}.png" for name in ("ant", "cat", "dog") for i in range(3))
    )


def test_only_the_training_split_becomes_long_tailed(many: Path) -> None:
    full = folder(open_dataset("imagefolder", many, None, None, "train"))
    train = folder(open_dataset("imagefolder", many, None, None, "train", 0.1))
    assert np.bincount(train.labels).tolist() == [20, 6, 2]
    assert [train.files[i].split("/")[0] for i in range(len(train))] == [
        train.classes[k] for k in train.labels
    ]
    assert set(train.files) < set(full.files)
    assert train.read(3).decode() == f"train/{train.files[3]}"
    val, unchanged = (open_dataset("imagefolder", many, None, None, "val", i) for i in (0.1, None))
    assert len(val) == 9
    assert val.fingerprint == unchanged.fingerprint


def test_fingerprint_depends_on_the_imbalance(many: Path) -> None:
    def fingerprint(imbalance: float | None) -> str:
        return open_dataset("imagefolder", many, None, None, "train", imbalance).fingerprint

    assert len({fingerprint(i) for i in (None, 0.1, 0.2, 0.5)}) == 4
    assert fingerprint(0.1) == fingerprint(0.1)


def test_folder_too_small_for_the_imbalance(many: Path) -> None:
    error = refused("the class 'dog' would keep no training image", root=many, imbalance=0.04)
    assert (error.field, error.value, error.remedy) == ("data.imbalance", 0.04, "Choose at least 0.05.")


@pytest.mark.parametrize("split", ["train", "val"])
def test_svhn_lt_legacy_requires_an_imbalance(split: str, tmp_path: Path) -> None:
    error = refused("is a long-tailed data set", name="svhn_lt_legacy", root=tmp_path, split=split)
    assert error.field == "data.imbalance"
