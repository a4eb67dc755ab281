"""Images named by files, folders, patterns and lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from dl2pa.errors import UserError
from pipelines.datasets.named import NamedImages, find_images, names_only_files

CLASSES = ["cat", "dog", "emu"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("dog/2.png", "dog/10.JPG", "cat/deep/er/1.jpeg", "top.bmp", ".cache/x.png", "dog/note.md"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(b"x" * len(name))
    (tmp_path / "d" / "dog" / "again").symlink_to(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(here: Path, text: str, name: str = "list.txt", root: Path | None = None) -> NamedImages:
    (here / name).write_text(text, encoding="utf-8")
    return find_images([f"@{name}"], root)


def test_a_folder_is_sorted_with_the_class_of_each_image(here: Path) -> None:
    images = find_images(["d"])
    assert images.paths == ["d/cat/deep/er/1.jpeg", "d/dog/10.JPG", "d/dog/2.png", "d/top.bmp"]
    assert images.classes(CLASSES)[0] == ["cat", "dog", "dog", ""]
    assert images.classes(CLASSES)[1].tolist() == [0, 1, 1, -1]
    assert str(images.skipped) == "not an image: 1 (dog/note.md)"
    table = images.table()
    assert table.lengths.tolist() == [18, 10, 9, 7]
    assert table.read(2) == b"x" * 9


def test_files_and_patterns_keep_the_order_of_the_words(here: Path) -> None:
    images = find_images(["d/top.bmp", "d/dog/*", "d/cat/**/1.*", "d/dog/note.md"])
    expected = ["d/top.bmp", "d/dog/10.JPG", "d/dog/2.png", "d/cat/deep/er/1.jpeg", "d/dog/note.md"]
    assert images.paths == expected


@pytest.mark.parametrize("labels", [("dog", "cat"), ("1", "0")])
def test_labels_of_lists_are_names_or_positions(here: Path, labels: tuple[str, str]) -> None:
    images = listed(here, f"# comment\nd/dog/2.png {labels[0]}\n\nd/top.bmp\t{labels[1]}\nd/dog/10.JPG\n")
    assert images.paths == ["d/dog/2.png", "d/top.bmp", "d/dog/10.JPG"]
    names, positions = images.classes(CLASSES)
    assert (names, positions.tolist()) == (["dog", "cat", ""], [1, 0, -1])


def test_labels_that_the_model_does_not_have_are_no_positions(here: Path) -> None:
    names, positions = listed(here, "d/dog/2.png 1\nd/top.bmp 3\n").classes(CLASSES)
    assert (names, positions.tolist()) == (["1", "3"], [-1, -1])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "number,image,class\n1,dog/2.png,dog\n2,gone.png,emu\n"),
        ("b.csv", "dog/2.png,dog\ngone.png,emu\n"),
        ("c.tsv", "label\tpath\ndog\tdog/2.png\nemu\tgone.png\n"),
    ],
)
def test_tables_have_a_column_of_paths(here: Path, name: str, text: str) -> None:
    images = listed(here, text, name, here / "d")
    assert images.paths == [f"{here}/d/dog/2.png", f"{here}/d/gone.png"]
    assert images.classes(CLASSES)[0] == ["dog", "emu"]
    assert images.table().lengths.tolist() == [9, -1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.png"], "No such file"),
        (["gone/*.png"], "No such file|contains no images"),
        (["d/dog/*.md"], "contains no images"),
        (["@gone.txt"], "cannot be read"),
        (["empty.txt"], "contains no images"),
        (["@away.txt"], "--root d"),
        (["@a.csv"], "no column of paths"),
        (["@two.csv"], "image, image_path can all contain the paths"),
    ],
)
def test_names_without_an_image_are_refused(here: Path, words: list[str], message: str) -> None:
    (here / "empty.txt").write_text("# nothing\n")
    (here / "d" / "away.txt").write_text("dog/2.png\n")
    (here / "a.csv").write_text("x,y\n1,2\n")
    (here / "two.csv").write_text("image,image_path,label\na,b.png,1\n")
    words = ["@d/away.txt"] if words == ["@away.txt"] else words
    with pytest.raises(UserError, match=message) as caught:
        find_images(words)
    assert caught.value.field == "image"


def test_only_single_files_are_checked_at_once(here: Path) -> None:
    (here / "list.txt").write_text("d/top.bmp\n")
    assert names_only_files(["d/top.bmp", "d/dog/note.md"], False)
    for word in ("list.txt", "@list.txt", "d"):
        assert not names_only_files(["d/top.bmp", word], False)
    assert find_images(["list.txt"]).paths == find_images(["list.txt"], lists=True).paths == ["d/top.bmp"]
