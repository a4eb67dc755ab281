"""Class folders decide the layout; archives, classes named train and system folders do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dl2pa.errors import UserError
from pipelines.datasets import ImageTable, open_dataset
from pipelines.datasets.build_index import build_index, list_source
from pipelines.datasets.folder import class_folders
from pipelines.datasets.index import INDEX_NAME
from pipelines.datasets.pack import PackOptions, pack
from pipelines.datasets.shards import find_shards

Tree = Callable[..., Path]

PETS = ("train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/dog/4.jpg")


def opened(root: Path, split: str = "train", val_root: Path | None = None) -> ImageTable:
    table = open_dataset("imagefolder", root, val_root, None, split)  # type: ignore[arg-type]
    assert isinstance(table, ImageTable)
    return table


@pytest.mark.parametrize(
    "archive",
    [
        "ILSVRC2012_img_val.tar",
        "backup.tar",
        "train/n01440764.tar",
        "val/ILSVRC2012_img_val.tar",
        "train-0000.tar",
    ],
)
def test_archive_next_to_class_folders_is_only_counted(
    image_tree: Tree, tmp_path: Path, archive: str
) -> None:
    root = image_tree("pets", *PETS)
    (root / archive).write_bytes(b"")
    name = archive.removeprefix("train/")
    for table in (opened(root), build_index(root, tmp_path / "i", 1).splits["train"].table):
        assert table.classes == ("cat", "dog")
        if not archive.startswith("val/"):
            assert table.skipped.as_dict() == {"archive": {"count": 1, "first": [name]}}
    assert opened(root, "val").classes == ("cat", "dog")
    packed = pack(list_source(root), tmp_path / "packed", PackOptions(), 1, lambda done, total: None)
    assert packed.images == 4


def test_archive_next_to_bare_class_folders(image_tree: Tree, tmp_path: Path) -> None:
    root = image_tree("train", "cat/1.jpg", "dog/images/2.jpg", "ILSVRC2012_img_train.tar")
    index = build_index(root, tmp_path / "index", 1)
    assert "archive: 1 (ILSVRC2012_img_train.tar)" in str(index.splits["all"].table.skipped)


def test_archive_instead_of_class_folders_is_named(image_tree: Tree) -> None:
    root = image_tree("pets", *PETS[:2], "val/ILSVRC2012_img_val.tar")
    with pytest.raises(
        UserError, match=r"no class folders .*archive: 1 \(ILSVRC2012_img_val\.tar\)"
    ) as caught:
        opened(root, "val")
    assert caught.value.remedy == "Unpack the archive."
    compressed = image_tree("compressed", "train-0.tar.gz", "train-1.tar.zst")
    with pytest.raises(UserError, match=r"archive: 2 \(train-0\.tar\.gz, train-1\.tar\.zst\)"):
        build_index(compressed, compressed / INDEX_NAME, 1)


def test_training_shards_next_to_validation_folders(
    tar_file: Callable[..., Path], image_tree: Tree, tmp_path: Path, picture: bytes
) -> None:
    root = tar_file("pets/train/0.tar", {"a.jpg": picture, "a.cls": b"0"}).parents[1]
    image_tree("pets", "val/cat/1.jpg")
    index = build_index(root, root / INDEX_NAME, 1)
    assert list(index.splits) == ["train"]
    assert "folder of images next to shards: 1 (val/cat/)" in str(index.splits["train"].table.skipped)


def test_single_folder_of_images_does_not_hide_shards(
    tar_file: Callable[..., Path], image_tree: Tree, picture: bytes
) -> None:
    root = tar_file("set/train-0.tar", {"a.jpg": picture, "a.cls": b"0"}).parent
    image_tree("set", "samples/1.jpg", "test/unknown/2.jpg")
    index = build_index(root, root / INDEX_NAME, 1)
    assert list(index.splits) == ["train"]
    assert "folder of images next to shards: 1 (samples/)" in str(index.splits["train"].table.skipped)


def test_tar_without_a_split_in_its_name_is_counted_next_to_named_shards(
    tar_file: Callable[..., Path], picture: bytes
) -> None:
    root = tar_file("set/imagenet-train-0.tar", {"a.jpg": picture, "a.cls": b"0"}).parent
    (root / "backup.tar").write_bytes(b"")
    (root / "imagenet-train-1.tar.gz").write_bytes(b"")
    table = build_index(root, root / INDEX_NAME, 1).splits["train"].table
    assert table.skipped.as_dict() == {
        "tar without train or val in its name": {"count": 1, "first": ["backup.tar"]},
        "compressed archive": {"count": 1, "first": ["imagenet-train-1.tar.gz"]},
    }
    assert opened(root).skipped.as_dict() == table.skipped.as_dict(), "the index stores the counts"


def test_hidden_tar_is_not_a_shard(tar_file: Callable[..., Path], picture: bytes) -> None:
    """AppleDouble data of a shard, or an unfinished shard of an interrupted packing."""
    root = tar_file("set/train-0.tar", {"a.jpg": picture, "a.cls": b"0"}).parent
    for name in ("._train-0.tar", ".train-000001-77.tar"):
        (root / name).write_bytes(b"no shard")
    assert find_shards(root) == {"train": [root / "train-0.tar"]}
    assert build_index(root, root / INDEX_NAME, 1).splits["train"].table.skipped.total == 0


def test_archive_of_unlabeled_images_is_refused_with_the_command_to_unpack(
    tar_file: Callable[..., Path], picture: bytes
) -> None:
    root = tar_file("set/train/n01440764.tar", {"n01440764_1.JPEG": picture}).parents[1]
    with pytest.raises(UserError, match="has no label") as caught:
        build_index(root, root / INDEX_NAME, 1)
    assert "mkdir n01440764 && tar -xf n01440764.tar -C n01440764" in caught.value.remedy


def test_class_may_be_named_train_or_val(image_tree: Tree, tmp_path: Path) -> None:
    root = image_tree("vehicles", "bus/1.jpg", "train/2.jpg", "val/3.jpg")
    val_root = image_tree("validation", "bus/1.jpg", "train/2.jpg", "val/3.jpg")
    classes = ("bus", "train", "val")
    assert build_index(root, tmp_path / "index", 1).classes == classes
    assert opened(root, val_root=val_root).classes == classes
    assert opened(root, "val", val_root).labels.tolist() == [0, 1, 2]


def test_split_with_images_in_no_class_folder_is_refused(image_tree: Tree, tmp_path: Path) -> None:
    root = image_tree("pets", *PETS[:2], "val/3.jpg", "val/4.jpg")
    words = (
        r"val'.* contains no class folders \(skipped: image outside the class folders: 2 \(3.jpg, 4.jpg\)\)"
    )
    with pytest.raises(UserError, match=words):
        build_index(root, tmp_path / "index", 1)
    flat = image_tree("flat", "train/1.jpg", "val/2.jpg")
    with pytest.raises(UserError, match="train': contains no class folders"):
        opened(flat, val_root=flat)


@pytest.mark.parametrize("name", ["__MACOSX", "@eaDir", "lost+found", ".cache"])
def test_system_folders_are_ignored_at_every_level(image_tree: Tree, name: str) -> None:
    root = image_tree("pets", *PETS, f"{name}/x.jpg", f"train/{name}/cat/x.jpg", f"train/cat/{name}/x.jpg")
    (root / "train/cat/._1.jpg").write_bytes(b"AppleDouble")
    table = opened(root)
    assert table.classes == ("cat", "dog")
    assert list(table.files) == ["cat/1.jpg", "dog/2.jpg"]
    assert table.skipped.total == 0
    assert not find_shards(root)


def test_folder_name_that_is_not_utf_8_is_an_escaped_class_name(image_tree: Tree, tmp_path: Path) -> None:
    root = image_tree("set", "train/ant/1.jpg", "train/caf\udce9/2.jpg", "val/caf\udce9/3.jpg")
    for table in (opened(root), build_index(root, root / INDEX_NAME, 1).splits["train"].table, opened(root)):
        assert table.classes == ("ant", "caf\\xe9")
        assert table.path(1) == root / "train/caf\udce9/2.jpg"
    assert opened(root, "val").labels.tolist() == [1]
    pack(list_source(root), tmp_path / "packed", PackOptions(), 1, lambda done, total: None)
    assert opened(tmp_path / "packed").classes == ("ant", "caf\\xe9")
    (root / "train/caf\\xe9").mkdir()
    with pytest.raises(UserError, match="have the same class name"):
        class_folders(root / "train", "data.root")
