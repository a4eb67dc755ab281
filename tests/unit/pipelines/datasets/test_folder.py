import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from dl2pa.errors import UserError
from pipelines.datasets import PathTable, index_folder, load_classes

Tree = Callable[..., Path]


def refused(root: Path, words: str, classes: list[str] | None = None, field: str = "data.root") -> UserError:
    with pytest.raises(UserError, match=words) as caught:
        index_folder(root, classes, field)
    return caught.value


class TestPathTable:
    PATHS = ("n01/a.JPEG", "n01/ü 'b';.png", "n02/images/c.jpg", "n02/\udcff.jpg")

    def test_returns_its_paths(self) -> None:
        table = PathTable.of(self.PATHS)
        assert tuple(table) == self.PATHS
        assert len(table) == 4
        assert (table[-1], table[1:3]) == (self.PATHS[-1], list(self.PATHS[1:3]))
        assert tuple(pickle.loads(pickle.dumps(table))) == self.PATHS

    def test_index_out_of_range(self) -> None:
        with pytest.raises(IndexError):
            _ = PathTable.of(self.PATHS)[4]

    def test_empty(self) -> None:
        assert list(PathTable.of([])) == []


def test_classes_and_files_are_sorted_and_labeled(image_tree: Tree) -> None:
    root = image_tree("data", "dog/10.jpeg", "dog/2.jpeg", "Cat/z.png", "Cat/a.png", "ant/it's ; odd.webp")
    dataset = index_folder(root, None, "data.root")
    assert dataset.classes == ("Cat", "ant", "dog")
    assert list(dataset.files) == [
        "Cat/a.png",
        "Cat/z.png",
        "ant/it's ; odd.webp",
        "dog/10.jpeg",
        "dog/2.jpeg",
    ]
    assert dataset.labels.tolist() == [0, 0, 1, 2, 2]
    assert dataset.path(2) == root / "ant" / "it's ; odd.webp"
    assert dataset.read(4) == b"dog/2.jpeg"
    assert len(dataset) == 5


def test_only_files_with_an_image_suffix_are_listed(image_tree: Tree) -> None:
    images = ["c/1.jpeg", "c/2.JPG", "c/3.png", "c/4.JPEG", "c/5.webp", "c/6.Bmp"]
    others = ["c/boxes.txt", "c/.7.jpeg", "c/jpeg", "c/8.npy", "README.md", ".cache/9.jpeg", "10.jpeg"]
    assert list(index_folder(image_tree("data", *images, *others), None, "data.root").files) == images


def test_subfolders_of_a_class_are_listed(image_tree: Tree) -> None:
    root = image_tree("data", "n1/images/n1_0.JPEG", "n1/n1_boxes.txt", "n2/top.jpg", "n2/images/n2_0.JPEG")
    assert list(index_folder(root, None, "data.root").files) == [
        "n1/images/n1_0.JPEG",
        "n2/images/n2_0.JPEG",
        "n2/top.jpg",
    ]


def test_deeper_folder_is_refused(image_tree: Tree) -> None:
    root = image_tree("data", "train/n1/images/a.jpeg")
    assert refused(root, "train/n1/images is nested too deeply").value == str(root)


def test_class_list_sets_labels_and_may_have_no_folders(image_tree: Tree) -> None:
    root = image_tree("data", "ant/1.png", "cat/2.png", "dog/3.png")
    dataset = index_folder(root, ["dog", "unseen", "cat", "ant"], "data.root")
    assert dataset.classes == ("dog", "unseen", "cat", "ant")
    assert dataset.labels.tolist() == [3, 2, 0]


def test_listed_class_may_have_an_empty_folder(image_tree: Tree) -> None:
    root = image_tree("data", "ant/1.png", "unseen/.keep")
    assert index_folder(root, ["ant", "unseen"], "data.root").labels.tolist() == [0]


def test_empty_class_folder_is_refused(image_tree: Tree) -> None:
    refused(image_tree("data", "ant/1.png", "bee/.keep"), "class folder 'bee' contains no images")


def test_unknown_class_folder_is_refused_with_the_nearest(image_tree: Tree) -> None:
    root = image_tree("data", "n01440764/1.png", "n0144353/2.png", "other/3.png")
    error = refused(root, r"\(and 1 more\).*nearest is 'n01443537'", ["n01440764", "n01443537"])
    assert (error.field, error.value) == ("data.classes", "n0144353")


@pytest.mark.parametrize("field", ["data.root", "data.val_root"])
def test_missing_root_is_reported_with_its_key(tmp_path: Path, field: str) -> None:
    error = refused(tmp_path / "absent", "does not exist", field=field)
    assert (error.field, error.value) == (field, str(tmp_path / "absent"))
    assert field in error.remedy


def test_roots_without_a_data_set(image_tree: Tree) -> None:
    flat = image_tree("flat", "1.jpeg", "2.jpeg")
    refused(flat, "no class folders")
    refused(flat / "1.jpeg", "not a directory")
    error = refused(image_tree("text", "a/1.txt", "b/2.txt"), "2 folders but no images", ["a", "b"])
    assert ".jpeg" in error.remedy


def test_unreadable_class_folder(image_tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_tree("data", "ant/1.png", "bee/2.png")
    scandir = os.scandir

    def deny(path: Path):  # Simulated, because root may read every folder.
        if path.name == "bee":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    error = refused(root, "cannot be read: Permission denied")
    assert error.value == str(root / "bee")


def test_links_are_followed_and_broken_links_refused(image_tree: Tree, tmp_path: Path) -> None:
    elsewhere = image_tree("elsewhere", "1.png")
    root = image_tree("data", "ant/1.png")
    (root / "bee").symlink_to(elsewhere)
    assert list(index_folder(root, None, "data.root").files) == ["ant/1.png", "bee/1.png"]
    (root / "ant" / "2.png").symlink_to(tmp_path / "gone.png")
    refused(root, "ant/2.png is a broken link")


def test_fingerprint_depends_on_paths_sizes_and_labels(image_tree: Tree) -> None:
    def fingerprint(root: Path, *classes: str) -> str:
        return index_folder(root, classes or None, "data.root").fingerprint

    first = fingerprint(image_tree("one", "a/1.png", "b/2.png"))
    root = image_tree("two", "b/2.png", "a/1.png")
    assert fingerprint(root) == first
    assert fingerprint(root, "a", "b", "unseen") == first
    assert fingerprint(root, "b", "a") != first
    (root / "a" / "1.png").write_bytes(b"longer than it was")
    assert fingerprint(root) != first
    assert fingerprint(image_tree("three", "a/1.png", "b/3.png")) != first


def test_imagenet_samples(shared_data: Callable[[str], Path]) -> None:
    classes = load_classes(shared_data("semantic/imagenet_synsets.txt"))
    dataset = index_folder(shared_data("imagenet-samples"), classes, "data.root")
    assert (len(dataset), len(dataset.classes)) == (256, 1000)
    assert all(dataset.files[i].startswith(dataset.classes[dataset.labels[i]]) for i in range(256))
    assert dataset.read(0).startswith(b"\xff\xd8")
