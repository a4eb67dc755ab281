"""Packed shards have the images of the folder in order, and are verified."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dl2pa.errors import UserError
from dl2pa.osutil import DiskFull
from pipelines import images
from pipelines.datasets import ImageTable, open_dataset
from pipelines.datasets import pack as packing
from pipelines.datasets.build_index import build_index, list_source
from pipelines.datasets.index import INDEX_NAME
from pipelines.datasets.pack import PackOptions, PackResult
from support.disks import full, small_disk

SMALL = PackOptions(shard_size=8000)


def jpeg(i: int, size: tuple[int, int] = (40, 30), form: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Names that are difficult for tar and WebDataset (dots, spaces, repeated stems), and a damaged image."""
    root = tmp_path / "pets"
    names = [
        "ant/1.jpeg",
        "ant/1.JPG",
        "ant/1.png",
        "ant/a.b.jpg",
        "ant/a_b.jpg",
        "golden retriever/ü 'x'.jpg",
    ]
    names += [f"dog/{i}.jpg" for i in range(6)]
    for split, part in (("train", names), ("val", names[3:7])):
        for i, name in enumerate(part):
            path = root / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(i, form="PNG" if name.endswith("png") else "JPEG"))
    (root / "train/dog/3.jpg").write_bytes(b"no image")
    (root / "words.txt").write_text("dog\ta friend\n")
    return root


def run(
    root: Path, out: Path, options: PackOptions = SMALL, progress: Any = lambda done, total: None
) -> PackResult:
    return packing.pack(list_source(root), out, options, 1, progress)


def tables(root: Path) -> list[ImageTable]:
    opened = [open_dataset("imagefolder", root, None, None, split) for split in ("train", "val")]
    assert all(isinstance(table, ImageTable) for table in opened)
    return opened  # type: ignore[return-value]


def contents(root: Path) -> dict[str, bytes]:
    """Files and columns of the index, without the times at which the shards were written."""
    from safetensors.numpy import load_file

    files = {path.name: path.read_bytes() for path in root.iterdir() if path.name != INDEX_NAME}
    columns = {key: value.tobytes() for key, value in load_file(root / INDEX_NAME).items()}
    return {**files, **{key: value for key, value in columns.items() if not key.endswith("/state_times")}}


@pytest.mark.parametrize("indexed", [True, False])
def test_shards_have_the_images_of_the_folder_in_order(pets: Path, tmp_path: Path, indexed: bool) -> None:
    if indexed:
        build_index(pets, pets / INDEX_NAME, 1)
    out = tmp_path / "packed"
    result = run(pets, out)
    assert (result.images, result.shards, result.not_resized) == (16, len(list(out.glob("*.tar"))), [])
    assert result.shards > 4
    for before, after in zip(tables(pets), tables(out), strict=True):
        assert after.classes == before.classes == ("ant", "dog", "golden retriever")
        assert after.labels.tolist() == before.labels.tolist()
        assert [after.read(i) for i in range(len(after))] == [before.read(i) for i in range(len(before))]
        assert len({after.path(i) for i in range(len(after))}) == len(after)
    assert result.index.words == {"dog": "a friend"}


def test_a_shard_is_opened_again_after_a_restart_of_the_file_system(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(pets, tmp_path / "packed", PackOptions())
    train, _ = tables(tmp_path / "packed")
    expected, pread, lost = train.read(0), os.pread, set[int]()

    def read(file: int, length: int, offset: int) -> bytes:
        if not lost:
            lost.add(file)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pread(file, length, offset)

    monkeypatch.setattr(os, "pread", read)
    assert train.read(0) == expected
    assert len(lost) == 1


def test_keys_are_unique_and_have_no_dots(pets: Path, tmp_path: Path) -> None:
    run(pets, tmp_path / "packed", PackOptions())
    train, _ = tables(tmp_path / "packed")
    names = [str(train.path(i).relative_to(tmp_path / "packed" / "train-000000.tar")) for i in range(5)]
    assert names == ["ant/1.jpg", "ant/1-2.jpeg", "ant/1-3.png", "ant/a_b.jpg", "ant/a_b-2.jpg"]


def test_interrupted_packing_continues_with_the_same_result(pets: Path, tmp_path: Path) -> None:
    run(pets, tmp_path / "expected")

    def interrupt(done: int, total: int) -> None:
        assert total == 16
        if done > 6:
            raise KeyboardInterrupt

    out = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        run(pets, out, progress=interrupt)
    (out / ".train-000009-77.tar").write_bytes(b"incomplete shard")
    existing = {path.name: path.stat().st_mtime_ns for path in out.glob("[a-z]*.tar")}
    assert existing
    assert not (out / INDEX_NAME).exists()
    progress: list[int] = []
    run(pets, out, progress=lambda done, total: progress.append(done))
    assert progress[0] >= 7
    all_shards = {path.name: path.stat().st_mtime_ns for path in out.glob("[a-z]*.tar")}
    assert existing.items() <= all_shards.items(), "no shard is written twice"
    assert contents(out) == contents(tmp_path / "expected")


def test_number_of_workers_does_not_matter(pets: Path, tmp_path: Path) -> None:
    run(pets, tmp_path / "one")
    packing.pack(list_source(pets), tmp_path / "two", SMALL, 2, lambda done, total: None)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_resized_images_have_the_requested_side(pets: Path, tmp_path: Path) -> None:
    """Smaller and undecodable images are copied unchanged."""
    (pets / "train/ant/1.png").write_bytes(jpeg(1, (90, 60), "PNG"))
    (pets / "train/dog/1.jpg").write_bytes(jpeg(1, (12, 200)))
    result = run(pets, tmp_path / "packed", PackOptions(short_side=20, quality=80))
    source, packed = tables(pets)[0], tables(tmp_path / "packed")[0]
    assert packed.labels.tolist() == source.labels.tolist()
    sizes = packed.sizes
    assert sizes is not None
    for i, name in enumerate(source.files):
        data = packed.read(i)
        if name == "dog/3.jpg":
            assert data == b"no image"
        elif name == "dog/1.jpg":
            assert data == source.read(i)
        else:
            with Image.open(io.BytesIO(data)) as image:
                assert image.format == "JPEG"
                assert image.size == ((30, 20) if name == "ant/1.png" else (27, 20)), name
                assert sizes[i].tolist() == [image.height, image.width]
    assert packed.path(2).name == "1-3.jpeg", "a resized PNG is a JPEG"
    assert result.not_resized == [str(source.path(list(source.files).index("dog/3.jpg")))]
    assert result.bytes_out > 0


@pytest.mark.parametrize(
    ("prepare", "field", "words"),
    [
        (lambda pets, out: (out / "stray").touch(), "OUT", "is not empty"),
        (lambda pets, out: run(pets, out, PackOptions(quality=3)), "OUT", "a packing of other images"),
        (
            lambda pets, out: run(pets, out) and (pets / "train/ant/1.png").unlink(),
            "OUT",
            "a packing of other images",
        ),
    ],
)
def test_folder_with_other_content_is_refused(
    pets: Path, tmp_path: Path, prepare: Callable[[Path, Path], Any], field: str, words: str
) -> None:
    out = tmp_path / "packed"
    out.mkdir()
    prepare(pets, out)
    with pytest.raises(UserError, match=words) as caught:
        run(pets, out)
    assert caught.value.field == field


def test_replaced_shard_is_detected(pets: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    run(pets, out)
    (out / "train-000001.tar").write_bytes((out / "train-000000.tar").read_bytes())
    with pytest.raises(UserError, match="do not contain the 12 images of the source"):
        run(pets, out)


def test_corrupted_write_is_detected(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = packing._add

    def corrupting_add(archive: Any, name: str, content: bytes) -> None:
        add(archive, name, content[:-1] + b"!" if name == "ant/1.jpg" else content)

    monkeypatch.setattr(packing, "_add", corrupting_add)
    with pytest.raises(OSError, match="does not contain the data written"):
        run(pets, tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("[a-z]*.tar"))


def test_missing_source_image_is_reported(pets: Path, tmp_path: Path) -> None:
    source = list_source(pets)
    (pets / "train/dog/0.jpg").unlink()
    with pytest.raises(UserError, match="No such file") as caught:
        packing.pack(source, tmp_path / "packed", SMALL, 1, lambda done, total: None)
    assert caught.value.value == str(pets / "train/dog/0.jpg")


def test_an_image_that_is_too_large_for_training_is_packed_smaller(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 100)  # 256 MiB
    assert run(pets, tmp_path / "out", PackOptions(short_side=8)).images == 16


def test_shards_are_not_packed_again(pets: Path, tmp_path: Path) -> None:
    run(pets, tmp_path / "packed")
    with pytest.raises(UserError, match="already contains tar shards"):
        list_source(tmp_path / "packed")


def test_options_are_stored(pets: Path, tmp_path: Path) -> None:
    run(pets, tmp_path / "packed")
    stored = json.loads((tmp_path / "packed/pack.json").read_text())
    assert (stored["short_side"], stored["shard_size"], set(stored["source"])) == (
        None,
        8000,
        {"train", "val"},
    )


def test_a_full_disk_names_the_folder_and_the_same_command_continues(pets: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with small_disk(tmp_path / "disk", "1m") as disk:
        out = disk / "packed"
        with full(disk, 20_000), pytest.raises(DiskFull, match=f"{out} has .* the same command continues"):
            run(pets, out)
        assert not (out / INDEX_NAME).exists()
        run(pets, out)
        run(pets, tmp_path / "reference")
        assert contents(out) == contents(tmp_path / "reference")
