"""An index that is older than its data is refused, with the command that builds it again."""

from __future__ import annotations

import io
import json
import logging
import os
import shlex
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dl2pa import cli
from dl2pa.errors import UserError
from pipelines.datasets import index as index_module
from pipelines.datasets import open_dataset
from pipelines.datasets.build_index import build_index, list_source
from pipelines.datasets.index import INDEX_NAME

DAY = 86_400_000_000_000


def jpeg(level: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 12), (level, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def write_shard(path: Path, label: str, count: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            for suffix, content in (("jpg", jpeg(i)), ("cls", label.encode())):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Class folders, one of them with a folder in between."""
    root = tmp_path / "my pets"
    names = ("train/cat/1.jpg", "train/cat/2.jpg", "train/dog/images/1.jpg", "val/cat/1.jpg", "val/dog/1.jpg")
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(i))
    return root


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    root = tmp_path / "shards"
    for name, label in (("train-0", "0"), ("train-1", "1"), ("val-0", "1")):
        write_shard(root / f"{name}.tar", label)
    (root / "classes.txt").write_text("cat\ndog\n")
    return root


def opened(root: Path, index: Path | None = None) -> list[int]:
    return open_dataset("imagefolder", root, None, None, "train", index=index).labels.tolist()


def refused(root: Path, words: str, index: Path | None = None) -> None:
    """The index is refused; the command of the remedy builds one that is accepted."""
    with pytest.raises(UserError, match=words) as caught:
        opened(root, index)
    assert caught.value.field == "data.index"
    assert caught.value.value == str(index or root / INDEX_NAME)
    assert "is older than the data" in caught.value.message
    program, *arguments = shlex.split(caught.value.remedy.split("`")[1])
    assert program == "dl2pa"
    assert cli.main(arguments) == 0
    opened(root, index)


FOLDER_CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "image added": (lambda r: (r / "train/cat/3.jpg").write_bytes(jpeg()), "'cat' .*: 1 images are new"),
    "image added below": (
        lambda r: (r / "train/dog/images/3.jpg").write_bytes(jpeg()),
        "'dog' .*: 1 images are new",
    ),
    "folder added below": (
        lambda r: ((r / "train/cat/more").mkdir(), (r / "train/cat/more/1.jpg").write_bytes(jpeg())),
        "'cat' .*: 1 images are new",
    ),
    "image removed": (
        lambda r: (r / "train/cat/2.jpg").unlink(),
        "'cat' .* 0 images are new or other, 1 are gone",
    ),
    "image renamed": (
        lambda r: (r / "train/cat/2.jpg").rename(r / "train/cat/0.jpg"),
        "1 images are new or other, 1",
    ),
    "image replaced": (
        lambda r: ((r / "new").write_bytes(jpeg() + b"\0"), (r / "new").rename(r / "train/cat/2.jpg")),
        "1 images are new or other, 1 are gone",
    ),
    "class added": (
        lambda r: ((r / "train/emu").mkdir(), (r / "train/emu/1.jpg").write_bytes(jpeg())),
        "does not contain the class folder 'emu'",
    ),
    "class removed": (lambda r: shutil.rmtree(r / "val/dog"), "'dog' no longer exists"),
    "class renamed": (lambda r: (r / "val/cat").rename(r / "val/dog2"), "'cat' no longer exists"),
}


@pytest.mark.parametrize("external", [False, True], ids=["in the folder", "external"])
@pytest.mark.parametrize("change", FOLDER_CHANGES)
def test_index_of_changed_folders_is_refused(pets: Path, tmp_path: Path, change: str, external: bool) -> None:
    index = tmp_path / "pets index" if external else None
    build_index(pets, index or pets / INDEX_NAME, 1)
    opened(pets, index)
    apply, words = FOLDER_CHANGES[change]
    apply(pets)
    if change == "class renamed":
        (pets / "train/cat").rename(pets / "train/dog2")
    refused(pets, words, index)


def test_index_of_bare_class_folders_is_refused_after_a_change(pets: Path) -> None:
    root = pets / "train"
    build_index(root, root / INDEX_NAME, 1)
    assert len(list_source(root).splits["all"].table) == 3
    (root / "emu").mkdir()
    (root / "emu/1.jpg").write_bytes(jpeg())
    with pytest.raises(UserError, match="does not contain the class folder 'emu'"):
        list_source(root)


def test_copied_folder_keeps_its_index(pets: Path, tmp_path: Path) -> None:
    """A copy has other times; its files are compared."""
    build_index(pets, pets / INDEX_NAME, 1)
    copied = tmp_path / "copy"
    shutil.copytree(pets, copied, copy_function=shutil.copy)
    for folder in (copied / "train", *(copied / "train").rglob("*")):
        os.utime(folder, ns=(0, DAY))
    assert opened(copied) == [0, 0, 1]


def test_other_files_in_a_class_folder_do_not_matter(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_index(pets, pets / INDEX_NAME, 1)
    (pets / "train/cat/.nfs0001").write_text("")
    with caplog.at_level(logging.INFO):
        assert opened(pets) == [0, 0, 1]
    assert "but the same files" in caplog.text


SHARD_CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other labels, same size": (lambda r: write_shard(r / "train-0.tar", "1"), "'train-0.tar' was modified"),
    "longer": (lambda r: write_shard(r / "train-1.tar", "1", 20), "'train-1.tar' has another size"),
    "removed": (lambda r: (r / "train-1.tar").unlink(), "'train-1.tar' no longer exists"),
    "added": (lambda r: write_shard(r / "train-2.tar", "1"), "does not contain the shard 'train-2.tar'"),
    "validation shard": (lambda r: write_shard(r / "val-0.tar", "0", 20), "'val-0.tar' has another size"),
    "class list": (lambda r: (r / "classes.txt").write_text("dog\ncat\n"), "classes.txt has changed"),
    "other class list": (
        lambda r: (r / "classes.json").write_text(json.dumps({"dog": "", "cat": ""})),
        "classes.json has changed",
    ),
    "class list removed": (lambda r: (r / "classes.txt").unlink(), "classes.txt has changed"),
}


@pytest.mark.parametrize("external", [False, True], ids=["in the folder", "external"])
@pytest.mark.parametrize("change", SHARD_CHANGES)
def test_index_of_changed_shards_is_refused(
    shards: Path, tmp_path: Path, change: str, external: bool
) -> None:
    index = tmp_path / "shards.index" if external else None
    build_index(shards, index or shards / INDEX_NAME, 1)
    assert opened(shards, index) == [0, 0, 1, 1]
    apply, words = SHARD_CHANGES[change]
    apply(shards)
    refused(shards, words, index)


@pytest.mark.parametrize("tick", [1, 1_000, 1_000_000_000, 2_000_000_000])
def test_shards_copied_with_their_times_keep_their_index(shards: Path, tmp_path: Path, tick: int) -> None:
    """Other file systems and archives store times in coarser units."""
    build_index(shards, shards / INDEX_NAME, 1)
    copied = tmp_path / "copy"
    shutil.copytree(shards, copied)
    for file in copied.glob("*.tar"):
        time = (shards / file.name).stat().st_mtime_ns
        os.utime(file, ns=(time, time // tick * tick))
    assert opened(copied) == [0, 0, 1, 1]
    os.utime(copied / "train-0.tar", ns=(0, (shards / "train-0.tar").stat().st_mtime_ns - DAY))
    with pytest.raises(UserError, match=r"'train-0\.tar' was modified after it was indexed, or copied"):
        opened(copied)


@pytest.mark.parametrize("data", ["pets", "shards"])
def test_index_of_an_older_version_is_used_with_one_warning(
    data: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.numpy import load_file, save_file

    root: Path = request.getfixturevalue(data)
    built = build_index(root, root / INDEX_NAME, 1)
    columns = {k: v for k, v in load_file(root / INDEX_NAME).items() if "/state_" not in k}
    halves = {
        name: {"folder": "" if data == "shards" else name, "fingerprint": split.table.fingerprint}
        for name, split in built.splits.items()
    }
    content = {"format": "dl2pa index 1", "classes": built.classes, "words": {}, "halves": halves}
    save_file(columns, root / INDEX_NAME, {"dl2pa": json.dumps(content)})
    index_module._warned.clear()
    first = opened(root)
    assert opened(root) == first
    assert caplog.text.count(f"Run `dl2pa data index {shlex.quote(str(root))}` again") == 1


def test_file_added_while_the_folder_is_listed_is_noticed(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of the folder is read after the listing."""
    from pipelines.datasets import build_index as module

    listing = module._list_folders

    def list_and_add(root: Path) -> Any:
        tables = listing(root)
        (pets / "train/cat/3.jpg").write_bytes(jpeg())
        return tables

    with monkeypatch.context() as patch:
        patch.setattr(module, "_list_folders", list_and_add)
        build_index(pets, pets / INDEX_NAME, 1)
    refused(pets, "1 images are new")
