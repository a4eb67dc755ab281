"""Lists of images: `path label` lines and CSV files become an index in their order; wrong entries are counted."""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dl2pa import cli
from dl2pa.errors import UserError
from pipelines.datasets import ImageTable, open_dataset
from pipelines.datasets.build_index import build_index, list_source
from pipelines.datasets.index import INDEX_NAME
from pipelines.datasets.lists import ListOptions, relative_path
from pipelines.datasets.pack import PackOptions, pack

NAMES = ("train/a/1.jpg", "train/a/two words.jpg", "train/b/3.JPEG", "val/a/4.jpg", "other/5.jpg")


@pytest.fixture
def photos(tmp_path: Path, picture: bytes) -> Path:
    root = tmp_path / "photos"
    for name in NAMES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture)
    return root


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def opened(root: Path, split: Any = "train", **options: Any) -> ImageTable:
    table = open_dataset("imagefolder", root, None, options.pop("classes", None), split, **options)
    assert isinstance(table, ImageTable)
    return table


def index(root: Path, train: Path, val: Path | None = None, **options: Any) -> None:
    build_index(root, root / INDEX_NAME, 1, options=ListOptions(train, val, **options))


def refused(root: Path, *arguments: Any, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        index(root, *arguments, **options)
    assert not (root / INDEX_NAME).exists()
    return caught.value


def test_images_keep_the_order_of_the_list(photos: Path, write: Callable[..., Path], picture: bytes) -> None:
    train = write(
        "train.txt", "# a comment\ntrain/b/3.JPEG 1\n\ntrain/a/two words.jpg 0\n./train/a/1.jpg 0\n"
    )
    index(photos, train, write("val.txt", f"/val/a/4.jpg\t0\r\n{photos}/other/5.jpg 1\n"))
    table = opened(photos)
    assert list(table.files) == ["train/b/3.JPEG", "train/a/two words.jpg", "train/a/1.jpg"]
    assert table.labels.tolist() == [1, 0, 0]
    assert table.classes == ("0", "1")
    assert table.sizes is not None
    assert table.sizes.tolist() == [[10, 10]] * 3
    assert table.read(1) == picture
    assert list(opened(photos, "val").files) == ["val/a/4.jpg", "other/5.jpg"]


@pytest.mark.parametrize(
    ("name", "text", "columns"),
    [
        ("a.csv", "id,Image,class\n7,train/a/1.jpg,cat\n8,train/b/3.JPEG,dog\n", None),
        ("a.csv", 'train/a/1.jpg,"cat"\ntrain/b/3.JPEG,dog\n', None),
        ("a.tsv", "label\tpath\ncat\ttrain/a/1.jpg\ndog\ttrain/b/3.JPEG\n", None),
        ("a.txt", "x,y\ncat,train/a/1.jpg\ndog,train/b/3.JPEG\n", ("y", "x")),
        ("a.txt", "train/a/1.jpg cat\ntrain/b/3.JPEG dog\n", None),
    ],
)
def test_tables_and_class_names(
    photos: Path, write: Callable[..., Path], name: str, text: str, columns: tuple[str, str] | None
) -> None:
    index(photos, write(name, text), columns=columns)
    table = opened(photos)
    assert (list(table.files), table.labels.tolist()) == (["train/a/1.jpg", "train/b/3.JPEG"], [0, 1])
    assert table.classes == ("cat", "dog")


def test_class_file_names_the_positions(photos: Path, write: Callable[..., Path]) -> None:
    classes = write("names.txt", "n01 tench\nn02 shark\nn03 ray\n")
    index(photos, write("a.txt", "train/a/1.jpg 2\ntrain/b/3.JPEG 0\n"), classes=classes)
    assert opened(photos).classes == ("n01", "n02", "n03")
    assert opened(photos, classes=["n03", "n02", "n01"]).labels.tolist() == [0, 2]


def test_wrong_entries_are_counted_and_named_in_one_message(photos: Path, write: Callable[..., Path]) -> None:
    missing = "".join(f"train/gone/{i}.jpg 0\n" for i in range(5))
    train = write(
        "a.txt",
        f"train/a/1.jpg 0\n{missing}train/b/3.JPEG 3\n../x.jpg 1\nno_label.jpg\ntrain/a/1.jpg 1\nval/a/4.jpg -1\n",
    )
    classes = write("names.txt", "cat\ndog\n")
    error = refused(photos, train, write("val.txt", "val/gone.jpg 1\n"), classes=classes)
    assert error.field == "--list"
    assert error.message == (
        "has 10 entries that cannot be used: line without a path and a label: 1 (line 9: no_label.jpg); "
        "label that is not among the 2 classes: 2 (line 7: 3, line 11: -1); path outside ROOT: 1 (line 8: ../x.jpg); "
        "file listed with two labels: 1 (line 10: train/a/1.jpg); file that does not exist: 5 (line 2: "
        "train/gone/0.jpg, line 3: train/gone/1.jpg, line 4: train/gone/2.jpg, …). In val.txt: file that does not "
        "exist: 1 (line 1: val/gone.jpg)"
    )
    assert "--skip-missing" in error.remedy


def test_repeated_and_other_files_are_skipped_and_counted(photos: Path, write: Callable[..., Path]) -> None:
    (photos / "train/a/6.gif").write_bytes(b"GIF89a")
    lines = "train/a/1.jpg 0\ntrain/a/1.jpg 0\ntrain/a/6.gif 0\ntrain/b/3.JPEG 1\ngone.jpg 1\n"
    index(photos, write("a.txt", lines), skip_missing=True)
    table = opened(photos)
    assert list(table.files) == ["train/a/1.jpg", "train/b/3.JPEG"]
    counts = {reason: entry["count"] for reason, entry in table.skipped.as_dict().items()}
    assert counts == {"listed more than once": 1, "GIF image": 1, "file that does not exist": 1}


def test_wrong_root_is_recognized(photos: Path, write: Callable[..., Path]) -> None:
    train = write("a.txt", "a/1.jpg 0\nb/3.JPEG 1\n")
    assert f"in {photos / 'train'}" in refused(photos, train).remedy
    train = write("a.txt", "photos/train/a/1.jpg 0\n")
    assert f"in {photos.parent}" in refused(photos, train).remedy


@pytest.mark.parametrize(
    ("arguments", "field", "message"),
    [
        (("--list", "gone.txt"), "--list", "cannot be read"),
        (("--val-list", "a.txt"), "--val-list", "--list is not given"),
        (("--list", "a.txt", "--columns", "a"), "--columns", "two names"),
        (("--list", "a.csv"), "--list", "do not tell"),
        (("--list", "a.csv", "--columns", "a,label"), "--columns", "has the columns"),
        (("--list", "a.txt", "--classes", "gone.txt"), "--classes", "cannot be read"),
        (("--list", "a.txt", "--label-column", "x"), "--label-column", "Parquet"),
        (("--list", "empty.txt"), "--list", "lists no images"),
        (("--label-column", "x"), "ROOT", "no Parquet files"),
    ],
)
def test_invalid_options_are_one_message(
    photos: Path,
    write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    field: str,
    message: str,
) -> None:
    write("a.txt", "train/a/1.jpg 0\n")
    write("a.csv", "some,thing\nx,y\n")
    write("empty.txt", "\n")
    monkeypatch.chdir(photos.parent)
    assert cli.main(["data", "index", "photos", "--workers", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dl2pa: {field}=")
    assert message in error
    assert "Traceback" not in error


def test_overlap_of_the_lists_is_a_warning(
    photos: Path, write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        index(photos, write("a.txt", "train/a/1.jpg 0\n"), write("b.txt", "train/a/1.jpg 0\nval/a/4.jpg 0\n"))
    assert "1 images are in both lists, such as train/a/1.jpg" in caplog.text


def test_changed_list_or_images_are_refused_with_a_command_that_works(
    photos: Path, write: Callable[..., Path]
) -> None:
    train = write("my list.txt", "train/a/1.jpg 0\ntrain/b/3.JPEG 1\n")
    index(photos, train)
    (photos / "train/a/new.jpg").write_bytes(b"another file in a listed folder")
    before = opened(photos).fingerprint
    train.write_text("train/a/1.jpg 0\ntrain/a/two\twords.jpg 1\ntrain/a/two words.jpg 1\n")
    with pytest.raises(UserError, match=r"my list.txt has changed") as caught:
        opened(photos)
    train.write_text("train/b/3.JPEG 1\ntrain/a/two words.jpg 0\n")
    command = shlex.split(caught.value.remedy.split("`")[1])
    assert cli.main([*command[1:], "--workers", "1"]) == 0
    assert opened(photos).fingerprint != before
    (photos / "train/b/3.JPEG").unlink()
    with pytest.raises(UserError, match=r"1 listed images are gone .* 'train/b/3.JPEG'"):
        opened(photos)


def test_index_of_a_list_opens_without_the_list_and_in_a_copy(
    photos: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    train = write("a.txt", "train/a/1.jpg 0\ntrain/b/3.JPEG 1\n")
    index(photos, train)
    before = opened(photos).fingerprint
    train.unlink()
    photos.rename(tmp_path / "moved")
    for folder in (tmp_path / "moved/train").iterdir():
        os.utime(folder, (time.time() + 60,) * 2)
    assert opened(tmp_path / "moved").fingerprint == before


def test_validation_without_a_list_names_the_option(photos: Path, write: Callable[..., Path]) -> None:
    index(photos, write("a.txt", "train/a/1.jpg 0\n"))
    with pytest.raises(UserError, match="no split 'val'") as caught:
        opened(photos, "val")
    assert "--val-list" in caught.value.remedy


def test_listed_images_are_packed_in_order(photos: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "an.index"
    options = ListOptions(write("a.txt", "train/b/3.JPEG 1\ntrain/a/1.jpg 0\n"))
    build_index(photos, out, 1, options=options)
    pack(list_source(photos, out), tmp_path / "packed", PackOptions(), 1, lambda done, total: None)
    table = opened(tmp_path / "packed")
    assert (table.labels.tolist(), table.classes) == ([1, 0], ("0", "1"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("/data/x/a.jpg", "a.jpg"),
        ("/a/b.jpg", "a/b.jpg"),
        ("a//b/../c.jpg", "a/c.jpg"),
        ("a/../../b.jpg", None),
        ("..", None),
        ("/", None),
    ],
)
def test_paths_are_relative_to_the_root(path: str, expected: str | None) -> None:
    assert relative_path("/data/x", path) == expected
