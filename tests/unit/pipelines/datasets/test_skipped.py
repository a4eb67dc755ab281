"""Files that are not read are counted by reason, in folders and in shards."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dl2pa.errors import UserError
from pipelines.datasets import ImageTable, index_folder, open_dataset
from pipelines.datasets.build_index import build_index, list_source, problems_of
from pipelines.datasets.classes import empty_classes
from pipelines.datasets.index import INDEX_NAME
from pipelines.datasets.shards import read_shard
from pipelines.datasets.skipped import SkippedFiles, reason_for

Tree = Callable[..., Path]


def counts(skipped: SkippedFiles) -> dict[str, int]:
    return {reason: entry["count"] for reason, entry in skipped.as_dict().items()}


def test_memory_is_bounded_and_counts_survive_json() -> None:
    skipped = SkippedFiles()
    for i in range(1000):
        skipped.add("GIF image", f"{i}.gif")
    other = SkippedFiles.of(skipped.as_dict())
    other.update(skipped)
    assert str(other) == "GIF image: 2,000 (0.gif, 1.gif, 2.gif, …)"
    assert other.as_dict() == {"GIF image": {"count": 2000, "first": ["0.gif", "1.gif", "2.gif"]}}
    assert SkippedFiles().because() == ""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.gif", "GIF image"),
        ("a.TIF", "TIFF image"),
        ("a.heic", "HEIC image"),
        ("a.avif", "AVIF image"),
        ("a.ppm", "PNM image"),
        ("a.jp2", "JPEG 2000 image"),
        ("a.jfif", "JPEG image named .jfif (rename it to .jpg)"),
        ("a.tar.gz", "archive"),
        ("a.txt", "not an image"),
        ("tar", "not an image"),
    ],
)
def test_reason_names_the_format(name: str, reason: str) -> None:
    assert reason_for(name) == reason


def test_files_of_an_image_folder_are_counted(image_tree: Tree, tmp_path: Path) -> None:
    others = ["c/1.gif", "c/2.tif", "c/sub/3.gif", "c/boxes.txt", "c/.hidden.jpg", "c/images.zip", "flat.jpg"]
    root = image_tree("set", "c/ok.jpg", *others)
    (root / "dogs").symlink_to(tmp_path / "gone")
    table = index_folder(root, None, "data.root")
    assert list(table.files) == ["c/ok.jpg"]
    assert table.skipped.as_dict() == {
        "broken link": {"count": 1, "first": ["dogs"]},
        "image outside the class folders": {"count": 1, "first": ["flat.jpg"]},
        "hidden image": {"count": 1, "first": ["c/.hidden.jpg"]},
        "GIF image": {"count": 2, "first": ["c/1.gif", "c/sub/3.gif"]},
        "TIFF image": {"count": 1, "first": ["c/2.tif"]},
        "not an image": {"count": 1, "first": ["c/boxes.txt"]},
        "archive": {"count": 1, "first": ["c/images.zip"]},
    }


def test_index_stores_the_counts_for_training_and_packing(image_tree: Tree) -> None:
    root = image_tree("set", "train/c/1.jpg", "train/c/2.gif", "val/c/3.jpg", "val/c/4.heic")
    build_index(root, root / INDEX_NAME, 1)
    for split, reason in (("train", "GIF image"), ("val", "HEIC image")):
        table = open_dataset("imagefolder", root, None, None, split)  # type: ignore[arg-type]
        assert isinstance(table, ImageTable)
        assert counts(table.skipped) == {reason: 1}
        assert counts(table.subset(np.array([0])).skipped) == {reason: 1}
        assert counts(list_source(root).splits[split].table.skipped) == {reason: 1}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a/1.gif", "b/2.gif"], r"2 folders but no images \(skipped: GIF image: 2"),
        (
            ["a/1.jpg", "b/2.gif"],
            r"class folder 'b' contains no images \(skipped: GIF image: 1 \(b/2.gif\)\)",
        ),
        (["1.jpg", "2.jpg"], r"no class folders \(skipped: image outside the class folders: 2"),
    ],
)
def test_folder_without_images_is_refused_with_counts(image_tree: Tree, names: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        index_folder(image_tree("set", *names), None, "data.root")


def test_members_of_a_shard_are_counted(tmp_path: Path, picture: bytes) -> None:
    path = tmp_path / "train-0.tar"
    members = {
        "a.jpg": picture,
        "a.cls": b"0",
        "a.txt": b"a caption",
        "b.v2.jpg": picture,
        "b.cls": b"0",
        "c.tif": b"II*\0",
        "__MACOSX/._a.jpg": b"",
        "._a.jpg": b"",
    }
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, kind in (("d.jpg", tarfile.LNKTYPE), ("e.jpg", tarfile.SYMTYPE), ("f", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.jpg"
            archive.addfile(member)
    content = read_shard(path)
    assert content.labels == ["0"]
    assert content.skipped.as_dict() == {
        "not an image": {"count": 1, "first": ["train-0.tar/a.txt"]},
        "image with further dots in its name": {"count": 1, "first": ["train-0.tar/b.v2.jpg"]},
        "TIFF image": {"count": 1, "first": ["train-0.tar/c.tif"]},
        "link in a shard": {"count": 2, "first": ["train-0.tar/d.jpg", "train-0.tar/e.jpg"]},
        "label without an image": {"count": 1, "first": ["train-0.tar/b"]},
    }


@pytest.fixture
def shard(tar_file: Callable[..., Path], picture: bytes) -> Path:
    members = {
        f"{k}.{suffix}": content for k in "abc" for suffix, content in (("jpg", picture), ("cls", b"0"))
    }
    return tar_file("set/train-0.tar", members)


def end_of_members(content: bytes) -> int:
    return (len(content.rstrip(b"\0")) + 511) // 512 * 512


def test_shard_cut_off_between_members_is_counted(shard: Path) -> None:
    content = shard.read_bytes()
    shard.write_bytes(content[: end_of_members(content)])
    assert counts(read_shard(shard).skipped) == {"end of a shard, perhaps cut off": 1}
    shard.write_bytes(content[: end_of_members(content) + 1024])
    assert counts(read_shard(shard).skipped) == {}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data + data, "more data after its end"),
        (lambda data: data[: end_of_members(data)] + b"\0" * 10240 + data, "more data after its end"),
        (lambda data: data[: end_of_members(data) - 700], "cut off|not a complete"),
        (lambda data: data[: data.index(b"c.jpg") + 100], "cut off"),
        (lambda data: data.replace(b"b.jpg", b"\xff" * 5, 1), "no tar member"),
        (lambda data: b"", "it is empty"),
        (gzip.compress, "compressed with gzip"),
        (lambda data: b"PK\x03\x04" + data, "it is a zip file"),
    ],
)
def test_damaged_shard_is_refused(shard: Path, damage: Callable[[bytes], bytes], words: str) -> None:
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(UserError, match=words) as caught:
        read_shard(shard)
    assert (caught.value.field, caught.value.value) == ("ROOT", str(shard))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"GIF89a" + b"\0" * 90, "is a GIF file"),
        (b"\0\0\0\x20ftypavif" + b"\0" * 90, "is an AVIF file"),
        (b"\0\0\0\x20ftypheic" + b"\0" * 90, "is a HEIC file"),
        (b"\0\0\1\0" + b"\0" * 90, "is an ICO file"),
        (b"P6\n2 2\n255\n" + b"\0" * 12, "is a PNM file"),
        (b"<!DOCTYPE html>", "is an HTML file"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer file"),
        (b"\0" * 90, "contains only zeros"),
        (b"text", "is not an image"),
        (b"", "is empty"),
    ],
)
def test_problem_names_the_reason(image_tree: Tree, content: bytes, reason: str) -> None:
    root = image_tree("set", "a/1.jpg")
    (root / "a/1.jpg").write_bytes(content)
    problems = list(problems_of(build_index(root, root / INDEX_NAME, 1), root))
    assert [problem["reason"] for problem in problems] == [reason]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1000, 2000], "1,998 of 2,001 classes have no images: '1', '2', '3', '4', '5', …"),
        ([1, 2, 3], "1 of 4 classes have no images: '0'"),
        ([0, 1], None),
    ],
)
def test_gaps_in_labels_are_counted(labels: list[int], words: str | None) -> None:
    classes = [str(k) for k in range(max(labels) + 1)]
    assert empty_classes(np.array(labels), classes) == words
