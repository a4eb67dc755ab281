"""Parquet files with image bytes: every image is located, whatever the encoding, and read alone."""

from __future__ import annotations

import io
import json
import pickle
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dl2pa import cli
from dl2pa.errors import UserError
from pipelines.datasets import ImageTable, open_dataset
from pipelines.datasets.build_index import build_index, list_source
from pipelines.datasets.index import INDEX_NAME
from pipelines.datasets.pack import PackOptions, pack
from pipelines.datasets.parquet import ParquetOptions, find_parquet

NAMES = ("cat", "dog", "bee")
Write = Callable[..., Path]


def picture(i: int, side: int = 8) -> bytes:
    """A PNG of random pixels, which does not compress."""
    pixels = np.random.default_rng(i).integers(0, 256, (side, side + i % 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """40 images of up to 100 kB; two of them are equal."""
    images = [picture(i, 8 if i % 3 else 180) for i in range(40)]
    images[7] = images[3]
    return images


def write(
    path: Path, images: Sequence[bytes | None], labels: Sequence[Any] | None = None, **options: Any
) -> Path:
    """Write a file as `datasets` does: a structure of bytes and path, and the class names in the metadata."""
    label = options.pop("label", "label")
    names = options.pop("names", NAMES)
    features: dict[str, Any] = {"image": {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
    rows = [None if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    given = [i % 3 for i in range(len(images))] if labels is None else labels
    table = pa.table({"image": pa.array(rows, kind), label: pa.array(given)})
    table = table.replace_schema_metadata(
        {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if names else {}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def opened(root: Path, split: Any = "train") -> ImageTable:
    table = open_dataset("imagefolder", root, None, None, split)
    assert isinstance(table, ImageTable)
    return table


def index(root: Path, **options: Any) -> None:
    build_index(root, root / INDEX_NAME, 1, options=ParquetOptions(**options) if options else None)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"row_group_size": 7},
        {"use_dictionary": False, "data_page_size": 20_000},
        {"compression": "none"},
        {"compression": "zstd"},
        {"compression": "gzip", "row_group_size": 9},
        {"compression": "lz4"},
        {"data_page_version": "2.0", "row_group_size": 11},
        {"data_page_version": "2.0", "use_dictionary": False, "data_page_size": 20_000},
        {"use_content_defined_chunking": True, "write_page_index": True, "write_page_checksum": True},
        {"dictionary_pagesize_limit": 50_000, "write_batch_size": 4},
    ],
    ids=str,
)
def test_every_image_is_read_in_every_encoding(
    tmp_path: Path, pictures: list[bytes], options: dict[str, Any]
) -> None:
    images: list[bytes | None] = [*pictures]
    images[20] = None
    write(tmp_path / "data/train-00000-of-00002.parquet", images[:25], **options)
    write(tmp_path / "data/train-00001-of-00002.parquet", images[25:], [2] * 15, **options)
    write(tmp_path / "data/validation-00000-of-00001.parquet", pictures[:5], **options)
    index(tmp_path)
    table = opened(tmp_path)
    present = [data for data in images if data is not None]
    assert [table.read(i) for i in range(len(table))] == present
    assert [table.read(i) for i in (30, 2, 17)] == [present[i] for i in (30, 2, 17)]
    assert table.classes == NAMES
    assert table.labels.tolist() == [i % 3 for i in range(25) if i != 20] + [2] * 15
    assert table.sizes is not None
    assert table.sizes[1].tolist() == [8, 9]
    assert "row without image bytes: 1 (train-00000-of-00002.parquet row 20)" in str(table.skipped)
    assert str(table.path(20)).endswith("data/train-00000-of-00002.parquet/row 21")
    assert len(opened(tmp_path, "val")) == 5
    some = np.array([39, 0, 5])
    subset = pickle.loads(pickle.dumps(table.subset(some - [1, 0, 0])))
    assert [subset.read(i) for i in range(3)] == [present[38], present[0], present[5]]


def test_snappy_images_are_read_without_their_neighbors(tmp_path: Path) -> None:
    """A row group in one dictionary page: pyarrow reads 4 MB for an image of 50 kB."""
    write(tmp_path / "train.parquet", [picture(i, 130) for i in range(80)])
    index(tmp_path)
    members = opened(tmp_path).members
    assert members is not None
    assert members.spans is not None
    assert int(members.spans.raw_sizes.max()) <= 3 * 65536


def test_columns_are_chosen_by_type_or_option(tmp_path: Path, pictures: list[bytes]) -> None:
    file = write(tmp_path / "train-0.parquet", pictures[:3], label="fine_label")
    table = pq.read_table(file).append_column("coarse_label", pa.array([5, 5, 6]))
    pq.write_table(table, file)
    index(tmp_path)
    assert opened(tmp_path).classes == NAMES
    with pytest.raises(UserError, match="is not a column of numbers"):
        index(tmp_path, label="image")
    index(tmp_path, label="coarse_label")
    assert opened(tmp_path).labels.tolist() == [5, 5, 6]
    assert opened(tmp_path).classes == tuple("0123456")
    pq.write_table(table.append_column("mask", table.column("image")), file)
    with pytest.raises(UserError, match="is older than the data") as caught:
        opened(tmp_path)
    command = shlex.split(caught.value.remedy.split("`")[1])
    assert command[-2:] == ["--label-column", "coarse_label"]
    assert cli.main([*command[1:], "--workers", "1"]) == 0
    with pytest.raises(UserError, match="is not a column of image bytes"):
        index(tmp_path, image="fine_label")


def test_text_labels_and_class_file(tmp_path: Path, pictures: list[bytes]) -> None:
    write(tmp_path / "train-0.parquet", pictures[:3], ["dog", "cat", "dog"], names=None)
    index(tmp_path)
    assert (opened(tmp_path).classes, opened(tmp_path).labels.tolist()) == (("cat", "dog"), [1, 0, 1])
    (tmp_path / "names").write_text("dog\nowl\ncat\n")
    index(tmp_path, classes=tmp_path / "names")
    assert opened(tmp_path).labels.tolist() == [0, 2, 0]


def test_labels_without_a_class_are_counted_and_named(tmp_path: Path, pictures: list[bytes]) -> None:
    write(tmp_path / "train-0.parquet", pictures[:6], [0, 3, 1, -1, None, 7])
    with pytest.raises(UserError) as caught:
        index(tmp_path)
    assert caught.value.message == (
        "has 3 rows that cannot be used: label that is not among the 3 classes: 3 "
        "(train-0.parquet row 1: 3, train-0.parquet row 3: -1, train-0.parquet row 5: 7)"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-200], "not a readable Parquet file"),
        (lambda data: b"", "not a readable Parquet file"),
        (lambda data: data[:4] + b"\xff" * 200 + data[204:], "cannot be read"),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path, pictures: list[bytes], damage: Callable[[bytes], bytes], message: str
) -> None:
    file = write(tmp_path / "train-0.parquet", pictures[:6])
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        index(tmp_path)


def test_more_rows_than_bytes_are_refused(tmp_path: Path, pictures: list[bytes]) -> None:
    """Rows that compress to less than a byte would need any amount of memory."""
    count = 300_000
    path = write(tmp_path / "train.parquet", [pictures[1], *[None] * (count - 1)], [0] * count)
    assert path.stat().st_size < count
    with pytest.raises(UserError, match="300,000 rows in") as caught:
        index(tmp_path)
    assert caught.value.field == "ROOT"


def test_splits_are_in_the_names_of_files_or_folders(tmp_path: Path, pictures: list[bytes]) -> None:
    for name in ("train/0000.parquet", "test/0000.parquet", "validation/0000.parquet"):
        write(tmp_path / "one" / name, pictures[:2])
    files = find_parquet(tmp_path / "one")
    assert files.splits == {"train": ["train/0000.parquet"], "val": ["validation/0000.parquet"]}
    assert "test/0000.parquet" in str(files.skipped)
    for name in ("train-0", "test-0"):
        write(tmp_path / f"two/data/{name}.parquet", pictures[:2])
    assert find_parquet(tmp_path / "two").splits["val"] == ["data/test-0.parquet"]
    with pytest.raises(UserError, match="several data sets: one, two/data"):
        find_parquet(tmp_path)
    with pytest.raises(UserError, match="Parquet files without an index"):
        opened(tmp_path / "two")


def test_new_and_changed_files_are_refused(tmp_path: Path, pictures: list[bytes]) -> None:
    write(tmp_path / "train-0.parquet", pictures[:3])
    index(tmp_path)
    new = write(tmp_path / "train-1.parquet", pictures[:3])
    with pytest.raises(UserError, match=r"does not contain the Parquet file .train-1.parquet."):
        opened(tmp_path)
    new.unlink()
    write(tmp_path / "train-0.parquet", pictures[:4])
    with pytest.raises(UserError, match="another size"):
        opened(tmp_path)


def test_images_are_packed_in_order(tmp_path: Path, pictures: list[bytes]) -> None:
    write(tmp_path / "data/train-0.parquet", pictures[:6])
    with pytest.raises(UserError, match="without an index"):
        list_source(tmp_path / "data")
    index(tmp_path / "data")
    pack(list_source(tmp_path / "data"), tmp_path / "out", PackOptions(), 1, lambda done, total: None)
    table = opened(tmp_path / "out")
    assert [table.read(i) for i in range(6)] == pictures[:6]
    assert (table.classes, table.labels.tolist()) == (NAMES, [0, 1, 2, 0, 1, 2])


def test_compressed_row_groups_are_a_warning(
    tmp_path: Path, pictures: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "train-0.parquet", pictures, compression="zstd")
    assert cli.main(["data", "index", str(tmp_path), "--workers", "1", "--json"]) == 0
    warnings = json.loads(capsys.readouterr().out.splitlines()[-1])["warnings"]
    assert "times the bytes of the images" in warnings[0]
    assert "data pack" in warnings[0]
