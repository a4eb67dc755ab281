"""Shards made of a folder hold its images, in its order, and nothing is taken on trust."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dl2pa.errors import UserError
from pipelines.datasets import ImageTable, open_dataset
from pipelines.datasets import pack as packing
from pipelines.datasets.build_index import build_index, list_source
from pipelines.datasets.index import INDEX_NAME
from pipelines.datasets.pack import PackOptions, PackResult

SMALL = PackOptions(shard_size=8000)


def jpeg(i: int, size: tuple[int, int] = (40, 30), form: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Names that tar and WebDataset find hard: dots, spaces, one stem twice; a damaged image among them."""
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
    for half, part in (("train", names), ("val", names[3:7])):
        for i, name in enumerate(part):
            path = root / half / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(i, form="PNG" if name.endswith("png") else "JPEG"))
    (root / "train/dog/3.jpg").write_bytes(b"no image")
    (root / "words.txt").write_text("dog\ta friend\n")
    return root


def run(
    root: Path, out: Path, options: PackOptions = SMALL, progress: Any = lambda done, total: None
) -> PackResult:
    return packing.pack(list_source(root), out, options, 1, progress)


def halves(root: Path) -> list[ImageTable]:
    found = [open_dataset("imagefolder", root, None, None, split) for split in ("train", "val")]
    assert all(isinstance(table, ImageTable) for table in found)
    return found  # type: ignore[return-value]


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.mark.parametrize("indexed", [True, False])
def test_shards_hold_the_very_images_in_the_folders_order(pets: Path, tmp_path: Path, indexed: bool) -> None:
    if indexed:
        build_index(pets, pets / INDEX_NAME, 1)
    out = tmp_path / "packed"
    done = run(pets, out)
    assert (done.images, done.shards, done.not_resized) == (16, len(list(out.glob("*.tar"))), [])
    assert done.shards > 4
    for ours, theirs in zip(halves(pets), halves(out), strict=True):
        assert theirs.classes == ours.classes == ("ant", "dog", "golden retriever")
        assert theirs.labels.tolist() == ours.labels.tolist()
        assert [theirs.read(i) for i in range(len(theirs))] == [ours.read(i) for i in range(len(ours))]
        assert len({theirs.path(i) for i in range(len(theirs))}) == len(theirs)
    assert done.index.words == {"dog": "a friend"}


def test_no_key_ends_early_or_twice(pets: Path, tmp_path: Path) -> None:
    run(pets, tmp_path / "packed", PackOptions())
    train, _ = halves(tmp_path / "packed")
    names = [str(train.path(i).relative_to(tmp_path / "packed" / "train-000000.tar")) for i in range(5)]
    assert names == ["ant/1.jpg", "ant/1-2.jpeg", "ant/1-3.png", "ant/a_b.jpg", "ant/a_b-2.jpg"]


def test_a_killed_packing_goes_on_and_ends_the_same(pets: Path, tmp_path: Path) -> None:
    run(pets, tmp_path / "whole")

    def killed(done: int, total: int) -> None:
        assert total == 16
        if done > 6:
            raise KeyboardInterrupt

    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run(pets, cut, progress=killed)
    (cut / ".train-000009-77.tar").write_bytes(b"half a shard")
    before = {path.name: path.stat().st_mtime_ns for path in cut.glob("[a-z]*.tar")}
    assert before
    assert not (cut / INDEX_NAME).exists()
    told: list[int] = []
    run(pets, cut, progress=lambda done, total: told.append(done))
    assert told[0] >= 7
    after = {path.name: path.stat().st_mtime_ns for path in cut.glob("[a-z]*.tar")}
    assert before.items() <= after.items(), "no shard is written twice"
    assert contents(cut) == contents(tmp_path / "whole")


def test_several_processes_pack_as_one(pets: Path, tmp_path: Path) -> None:
    run(pets, tmp_path / "one")
    packing.pack(list_source(pets), tmp_path / "two", SMALL, 2, lambda done, total: None)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_resampled_images_have_the_side_asked_for(pets: Path, tmp_path: Path) -> None:
    """Smaller ones stay as they are, and so does what cannot be decoded: counts are exact."""
    (pets / "train/ant/1.png").write_bytes(jpeg(1, (90, 60), "PNG"))
    (pets / "train/dog/1.jpg").write_bytes(jpeg(1, (12, 200)))
    done = run(pets, tmp_path / "packed", PackOptions(short_side=20, quality=80))
    source, packed = halves(pets)[0], halves(tmp_path / "packed")[0]
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
    assert packed.path(2).name == "1-3.jpeg", "a resampled PNG is a JPEG"
    assert done.not_resized == [str(source.path(list(source.files).index("dog/3.jpg")))]
    assert done.bytes_out > 0


@pytest.mark.parametrize(
    ("spoil", "field", "words"),
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
def test_a_folder_that_holds_something_else(
    pets: Path, tmp_path: Path, spoil: Callable[[Path, Path], Any], field: str, words: str
) -> None:
    out = tmp_path / "packed"
    out.mkdir()
    spoil(pets, out)
    with pytest.raises(UserError, match=words) as caught:
        run(pets, out)
    assert caught.value.field == field


def test_a_shard_exchanged_behind_its_back_is_noticed(pets: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    run(pets, out)
    (out / "train-000001.tar").write_bytes((out / "train-000000.tar").read_bytes())
    with pytest.raises(UserError, match="do not contain the 12 images of the source"):
        run(pets, out)


def test_a_disk_that_returns_other_bytes_is_noticed(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = packing._add

    def lying(archive: Any, name: str, content: bytes) -> None:
        written(archive, name, content[:-1] + b"!" if name == "ant/1.jpg" else content)

    monkeypatch.setattr(packing, "_add", lying)
    with pytest.raises(OSError, match="does not contain the data written"):
        run(pets, tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("[a-z]*.tar"))


def test_a_source_image_that_has_gone_is_named(pets: Path, tmp_path: Path) -> None:
    source = list_source(pets)
    (pets / "train/dog/0.jpg").unlink()
    with pytest.raises(UserError, match="No such file") as caught:
        packing.pack(source, tmp_path / "packed", SMALL, 1, lambda done, total: None)
    assert caught.value.value == str(pets / "train/dog/0.jpg")


def test_shards_are_not_packed_again(pets: Path, tmp_path: Path) -> None:
    run(pets, tmp_path / "packed")
    with pytest.raises(UserError, match="already contains tar shards"):
        list_source(tmp_path / "packed")


def test_the_plan_is_written_down(pets: Path, tmp_path: Path) -> None:
    run(pets, tmp_path / "packed")
    stored = json.loads((tmp_path / "packed/pack.json").read_text())
    assert (stored["short_side"], stored["shard_size"], set(stored["source"])) == (
        None,
        8000,
        {"train", "val"},
    )
