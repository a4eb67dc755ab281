"""An index of a folder or of tar shards is equivalent to listing and opening every file."""

from __future__ import annotations

import io
import json
import os
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dl2pa.errors import UserError
from pipelines.datasets import ImageTable, build_index, open_dataset
from pipelines.datasets.build_index import problems_of
from pipelines.datasets.index import INDEX_NAME, Index, open_index
from pipelines.datasets.pieces import inspect_image

Make = Callable[..., Path]


def jpeg(
    i: int, form: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (20, 12), **options: Any
) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form, **options)
    return file.getvalue()


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two splits; image i is 20 + i pixels wide."""
    root = tmp_path / "pets"
    names = (
        "train/ant/1.jpeg",
        "train/cat/2.JPG",
        "train/cat/3.png",
        "train/dog/4.jpg",
        "val/cat/5.jpg",
        "val/dog/6.png",
    )
    for i, name in enumerate(names, start=1):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i, "PNG" if name.endswith("png") else "JPEG", size=(20 + i, 12)))
    for folder in {root / name for name in ("", "train", "val")} | {
        path.parent for path in root.rglob("*.*")
    }:
        os.utime(folder, (0, 0))  # as if it was not changed while it is indexed
    return root


def opened(root: Path, split: Any, **options: Any) -> ImageTable:
    arguments: dict[str, Any] = {"val_root": None, "classes": None, "index": None, **options}
    index = arguments.pop("index")
    table = open_dataset("imagefolder", root, split=split, index=index, **arguments)
    assert isinstance(table, ImageTable)
    return table


def same(a: ImageTable, b: ImageTable) -> None:
    assert (a.root, list(a.files), a.classes, a.fingerprint) == (
        b.root,
        list(b.files),
        b.classes,
        b.fingerprint,
    )
    assert a.labels.tolist() == b.labels.tolist()
    assert a.lengths.tolist() == b.lengths.tolist()


def build(root: Path, out: Path | None = None, workers: int = 1) -> Index:
    return build_index.build_index(root, out or root / INDEX_NAME, workers)


def test_index_and_folders_give_the_same_tables(pets: Path) -> None:
    listed = {split: opened(pets, split) for split in ("train", "val")}
    build(pets)
    for split, expected in listed.items():
        table = opened(pets, split)
        same(table, expected)
        assert table.read(0) == expected.read(0)
        widths = [20 + int(Path(name).stem) for name in table.files]
        assert table.sizes is not None
        assert table.sizes.tolist() == [[12, width] for width in widths]
    assert list(pets.iterdir()) == [*pets.glob("*")]
    assert not list(pets.glob(".*.parts"))


def test_no_folder_is_listed_with_an_external_index(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For read-only data."""
    before = sorted(pets.rglob("*"))
    build(pets, tmp_path / "pets.index")
    assert sorted(pets.rglob("*")) == before

    def listing(*_: object) -> None:
        raise AssertionError("a folder is listed")

    monkeypatch.setattr(os, "scandir", listing)
    monkeypatch.setattr(os, "listdir", listing)
    for split, count in (("train", 4), ("val", 2)):
        assert len(opened(pets, split, index=tmp_path / "pets.index")) == count


@pytest.mark.parametrize("indexed", [("train",), ("val",), ("train", "val")])
def test_separate_split_folders_with_and_without_index(pets: Path, indexed: tuple[str, ...]) -> None:
    """The validation folder has fewer classes; its labels are those of training."""
    listed = {s: opened(pets / "train", s, val_root=pets / "val") for s in ("train", "val")}
    assert listed["val"].labels.tolist() == [1, 2]
    for name in indexed:
        build(pets / name)
    for split, expected in listed.items():
        same(opened(pets / "train", split, val_root=pets / "val"), expected)


def test_class_list_sets_the_labels_of_an_index(pets: Path) -> None:
    order = ["dog", "unseen", "cat", "ant"]
    listed = {split: opened(pets, split, classes=order) for split in ("train", "val")}
    build(pets)
    for split, expected in listed.items():
        same(opened(pets, split, classes=order), expected)
    with pytest.raises(UserError, match=r"'dog'.* is not among the 2 classes") as caught:
        opened(pets, "train", classes=["ant", "cat"])
    assert caught.value.field == "data.classes"


KINDS: dict[str, tuple[str, bytes]] = {
    "empty": ("x.jpg", b""),
    "truncated": ("x.jpg", jpeg(1, size=(90, 90))[:-400]),
    "truncated png": ("x.png", jpeg(1, "PNG", size=(90, 90))[:-400]),
    "truncated webp": ("x.webp", jpeg(1, "WEBP", size=(90, 90))[:-40]),
    "not_an_image": ("x.jpg", b"<html>404 not found</html>" * 9),
    "cmyk": ("x.jpg", jpeg(1, mode="CMYK")),
    "wrong_extension": ("x.jpg", jpeg(1, "PNG")),
    "rotated": ("x.jpg", jpeg(1, exif=(lambda e: (e.__setitem__(0x0112, 6), e)[1])(Image.Exif()))),
    "": ("x.jpg", jpeg(1, progressive=True)),
    " with trailing bytes": ("x.jpg", jpeg(1) + b"\0" * 500),
    " with a long header": ("x.jpg", jpeg(1, comment=b"c" * 60_000, icc_profile=b"i" * 50_000)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_problems_are_listed(pets: Path, kind: str) -> None:
    name, content = KINDS[kind]
    (pets / "train/cat" / name).write_bytes(content)
    expected = {"half": "train", "path": f"train/cat/{name}", "kinds": kind.split(" ")[0]}
    problems = list(problems_of(build(pets), pets))
    reasons = [problem.pop("reason") for problem in problems]
    assert problems == ([expected] if expected["kinds"] else [])
    assert all(reasons)


def test_pipe_does_not_block_indexing(pets: Path) -> None:
    os.mkfifo(pets / "train/cat/pipe.jpg")
    assert [p["kinds"] for p in problems_of(build(pets), pets)] == ["empty"]


def test_too_many_open_files_are_not_a_fault_of_an_image(pets: Path) -> None:
    image = pets / "train/cat/2.JPG"
    length = image.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(image, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            inspect_image(image, length, decode=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert inspect_image(image, length, decode=False).flags == 0


def test_interrupted_indexing_continues_with_the_same_result(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_index, "_PIECE_SIZE", 1)
    out, expected = tmp_path / "resumed.index", tmp_path / "expected.index"
    build(pets, expected)

    def interrupt(done: int, total: int) -> None:
        assert total == 6
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index.build_index(pets, out, 1, interrupt)
    assert not out.exists()
    progress: list[int] = []
    build_index.build_index(pets, out, 1, lambda done, total: progress.append(done))
    assert progress == [4, 5, 6]
    assert out.read_bytes() == expected.read_bytes()
    assert sorted(p.name for p in tmp_path.glob(".*.parts")) == []


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGED_PARTS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": cut_in_half,
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "other columns": lambda file: np.savez(file, sizes=np.zeros((1, 2))),
    "no columns": lambda file: np.savez(file),
    "other shape": lambda file: _save_again(file, sizes=np.zeros(2, np.int32)),
    "other type": lambda file: _save_again(file, flags=np.zeros(1, np.float32)),
    "nested": lambda file: _save_again(file, labels=np.array(["[" * 100_000]), sizes=np.zeros(3, np.int32)),
}


def _save_again(file: Path, **changes: Any) -> None:
    with np.load(file) as stored:
        columns = {name: stored[name] for name in stored}
    np.savez(file, **{**columns, **changes})


@pytest.mark.parametrize("damage", DAMAGED_PARTS)
@pytest.mark.parametrize("data", ["pets", "shards"])
def test_interrupted_indexing_continues_over_damaged_partial_files(
    data: str,
    damage: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After a power failure, a file that was just written may be empty."""
    root = request.getfixturevalue(data)
    if data == "shards":
        for i in range(6):
            file = root(f"train-{i}.tar", sample("a", i, b"0"))
        root = file.parent
    monkeypatch.setattr(build_index, "_PIECE_SIZE", 1)
    out, expected = tmp_path / "resumed.index", tmp_path / "expected.index"
    build(root, expected)

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index.build_index(root, out, 1, interrupt)
    parts = sorted((tmp_path / ".resumed.index.parts").glob("*.npz"))
    DAMAGED_PARTS[damage](parts[1])
    progress: list[int] = []
    build_index.build_index(root, out, 1, lambda done, total: progress.append(done))
    assert progress == [3, 4, 5, 6]
    assert f"{parts[1]} is damaged" in caplog.text
    assert out.read_bytes() == expected.read_bytes()


def test_number_of_workers_does_not_matter(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_index, "_PIECE_SIZE", 2)
    build(pets, tmp_path / "one")
    build(pets, tmp_path / "two", workers=2)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_readable_class_names_are_stored(pets: Path) -> None:
    (pets / "LOC_synset_mapping.txt").write_text("ant ant, emmet\ndog dog, domestic dog\nemu a bird\n")
    build(pets)
    assert open_index(pets / INDEX_NAME, pets).words == {"ant": "ant, emmet", "dog": "dog, domestic dog"}


def test_index_is_a_safetensors_file(pets: Path) -> None:
    from safetensors.numpy import load_file

    build(pets)
    columns = load_file(pets / INDEX_NAME)
    assert columns["train/labels"].tolist() == [0, 1, 1, 2]
    assert bytes(columns["val/names"]) == b"cat/5.jpgdog/6.png"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.unlink(), "No such file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-9]), "is truncated"),
        (lambda file: file.write_text("an index"), "is not an index"),
        (lambda file: file.write_bytes(b""), "is not an index"),
        (lambda file: (file.parent / "pets").rename(file.parent / "gone"), "not in data.root"),
    ],
)
def test_invalid_index_is_refused(
    pets: Path, tmp_path: Path, damage: Callable[[Path], Any], words: str
) -> None:
    file = tmp_path / "pets.index"
    build(pets, file)
    damage(file)
    with pytest.raises(UserError, match=words) as caught:
        opened(pets, "train", index=file)
    assert caught.value.field == "data.index"


def test_index_of_other_images_has_another_fingerprint(pets: Path) -> None:
    build(pets)
    first = opened(pets, "train").fingerprint
    (pets / "train/cat/2.JPG").write_bytes(jpeg(2) + b"\0")
    build(pets)
    assert opened(pets, "train").fingerprint != first


def test_index_is_refused_for_other_data_sets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not used by data\.dataset=cifar10") as caught:
        open_dataset("cifar10", tmp_path, None, None, "train", index=tmp_path / "x")
    assert caught.value.field == "data.index"


@pytest.fixture
def shards(tmp_path: Path) -> Make:
    """``shards("train-0.tar", {"a.jpg": b"…", "a.cls": b"1"})``."""

    def make(name: str, members: dict[str, bytes]) -> Path:
        path = tmp_path / "shards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for key, content in members.items():
                info = tarfile.TarInfo(key)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return path

    return make


def sample(key: str, i: int, label: bytes, form: str = "cls") -> dict[str, bytes]:
    return {f"{key}.jpg": jpeg(i, size=(20 + i, 12)), f"{key}.{form}": label}


def test_webdataset_shards_of_other_tools(shards: Make) -> None:
    """Labels before or after the image, as numbers or names; other members; long names."""
    long = "n01/" + "x" * 140
    root = shards(
        "imagenet-train-000.tar", {"__meta__.txt": b"", **sample("a/1", 1, b"1\n"), **sample(long, 2, b"0")}
    ).parent
    shards(
        "imagenet-train-001.tar",
        {"b.json": json.dumps({"label": 1, "w": 3}).encode(), "b.seg.png": b"", "b.JPG": jpeg(3)},
    )
    shards("imagenet-validation-0.tar", sample("c", 4, b"dog"))
    with pytest.raises(UserError, match=r"'dog' is not among numbers.*classes\.txt"):
        build(root)
    with pytest.raises(UserError, match="shards without an index"):
        opened(root, "train")
    (root / "classes.txt").write_text("cat a small feline\ndog\n")
    build(root)
    train, val = opened(root, "train"), opened(root, "val")
    assert train.classes == val.classes == ("cat", "dog")
    assert (train.labels.tolist(), val.labels.tolist()) == ([1, 0, 1], [1])
    assert [train.read(i) for i in range(3)] == [jpeg(1, size=(21, 12)), jpeg(2, size=(22, 12)), jpeg(3)]
    assert train.path(0) == root / "imagenet-train-000.tar" / "a/1.jpg"
    assert str(train.path(1)).startswith(f"{root}/imagenet-train-000.tar/n01/xxx")
    assert train.sizes is not None
    assert train.sizes.tolist() == [[12, 21], [12, 22], [12, 20]]
    assert train.subset(np.array([2, 0])).read(0) == jpeg(3)


def test_shards_in_split_folders(shards: Make) -> None:
    root = shards("train/0.tar", sample("a", 1, b"4")).parents[1]
    shards("val/0.tar", sample("b", 2, b"2"))
    build(root)
    assert opened(root, "val").classes == tuple("01234")
    assert opened(root, "train").read(0) == jpeg(1, size=(21, 12))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.jpg": b"x"}, "'a' has no label"),
        ({"a.jpg": b"x", "a.json": b'{"caption": 3}'}, "'a' has no label"),
        ({"a.jpg": b"x", "a.json": b"[1"}, "cannot be read as a label"),
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"1"}, "two images"),
        ({"a.jpg": b"x", "a.cls": b"-1"}, "'-1' is not among"),
        ({"a.cls": b"1"}, "contain no images"),
    ],
)
def test_inconsistent_shards_are_refused(shards: Make, members: dict[str, bytes], words: str) -> None:
    root = shards("train-0.tar", members).parent
    with pytest.raises(UserError, match=words) as caught:
        build(root)
    assert caught.value.field == "ROOT"


def test_truncated_or_compressed_shard_is_refused(shards: Make) -> None:
    path = shards("train-0.tar", {**sample("a", 1, b"1"), "b.cls": b"1", "b.jpg": jpeg(5, size=(90, 90))})
    complete = path.read_bytes()
    path.write_bytes(complete[: complete.index(b"b.jpg") + 2000])
    with pytest.raises(UserError, match="not a complete, uncompressed tar"):
        build(path.parent)
    import gzip

    path.write_bytes(gzip.compress(complete))
    with pytest.raises(UserError, match="not a complete, uncompressed tar"):
        build(path.parent)
