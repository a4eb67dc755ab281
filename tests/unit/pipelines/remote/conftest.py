"""Shards of generated images, on this machine and on a real S3 server."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.datasets import ImageTable, open_dataset
from pipelines.datasets.build_index import list_source
from pipelines.datasets.pack import PackOptions, pack
from pipelines.remote.address import RemoteOptions, place_of
from support.objects import ObjectServer, object_server

COUNT = 40


@pytest.fixture(scope="session")
def server() -> Iterator[ObjectServer]:
    yield from object_server()


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 40 training and 12 validation images of noise, about 25 kB each, with class names."""
    import io

    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for split, count in (("train", COUNT), ("val", 12)):
        for i in range(count):
            file = io.BytesIO()
            pixels = np.random.default_rng([count, i]).integers(0, 256, (128, 128, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file, "JPEG", quality=90)
            path = folder / split / ("cat", "dog")[i % 2] / f"{i:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
    out = tmp_path_factory.mktemp("shards") / "photos"
    pack(list_source(folder), out, PackOptions(shard_size=400_000), 1, lambda done, total: None)
    return out


@pytest.fixture
def uploaded(server: ObjectServer, packed: Path, tmp_path: Path) -> str:
    """Address of a copy of the shards with their index, of this test only."""
    return server.upload(packed, f"photos/{tmp_path.name}")


@pytest.fixture
def options(tmp_path: Path) -> RemoteOptions:
    return RemoteOptions(str(tmp_path / "cache"), 1.0, 5.0, 60.0)


Open = Callable[..., ImageTable]


@pytest.fixture
def open_at(options: RemoteOptions) -> Open:
    """``open_at(address, split)``: the table of a split."""

    def call(address: str, split: str = "train", chosen: RemoteOptions = options) -> ImageTable:
        root = place_of("data.root", address, chosen)
        table = open_dataset("imagefolder", root, None, None, split)  # pyright: ignore[reportArgumentType]
        assert isinstance(table, ImageTable)
        return table

    return call


@pytest.fixture(scope="session")
def local(packed: Path) -> ImageTable:
    table = open_dataset("imagefolder", packed, None, None, "train")
    assert isinstance(table, ImageTable)
    return table


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A copy of the shards on this machine, which the test may change."""
    return shutil.copytree(packed, tmp_path / "copy")
