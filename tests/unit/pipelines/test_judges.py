"""The index check and all loaders agree on which images are readable."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dl2pa import cli
from dl2pa.errors import UserError
from pipelines.batch import Pipeline
from pipelines.datasets.build_index import build_index
from pipelines.datasets.index import Index, open_index
from pipelines.datasets.pack import PackOptions, pack
from pipelines.datasets.probe import UNUSABLE
from pipelines.datasets.table import ImageTable
from pipelines.decoded import decode_folder
from pipelines.encoded import FaultLimits
from pipelines.sampler import EvalSampler, TrainSampler
from pipelines.transforms import Transforms

Folder = Callable[..., ImageTable]
Build = Callable[..., Pipeline]
EVAL = Transforms(24, train=False, eval_resize=28)
TRAIN = Transforms(24, train=True)


def encoded(form: str, mode: str = "RGB", **options: Any) -> bytes:
    y, x = np.mgrid[0:60, 0:80]
    pixels = np.stack([x * 3 % 256, y * 4 % 256, (x + y) * 2 % 256], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, form, **options)
    return file.getvalue()


JPEG, PNG, BMP, WEBP = (encoded(form) for form in ("JPEG", "PNG", "BMP", "WEBP"))
FRAME = JPEG.index(b"\xff\xc0")
HALF = len(JPEG) // 2


def chunk(kind: bytes, content: bytes, checksum_change: int = 0) -> bytes:
    checksum = zlib.crc32(kind + content) ^ checksum_change
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_with(extra: bytes) -> bytes:
    """PNG with a chunk after its header."""
    return PNG[:33] + extra + PNG[33:]


def png_data(change: Callable[[bytes], bytes], checksum_change: int = 0) -> bytes:
    """PNG with other compressed data."""
    start = PNG.index(b"IDAT")
    (length,) = struct.unpack(">I", PNG[start - 4 : start])
    content = PNG[start + 4 : start + 4 + length]
    return PNG[: start - 4] + chunk(b"IDAT", change(content), checksum_change) + PNG[start + 8 + length :]


def bmp_16_bits() -> bytes:
    body = bytes(range(256)) * 38
    body = body[: 80 * 60 * 2].ljust(80 * 60 * 2)
    header = struct.pack("<IiiHHIIiiII", 40, 80, 60, 1, 16, 0, len(body), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(body), 0, 0, 54) + header + body


READABLE = {
    "jpeg": JPEG,
    "jpeg with the end inside": JPEG[:HALF] + b"\xff\xd9" + JPEG[HALF:],
    "jpeg with wrong data": JPEG[:HALF] + b"\x55" * 10 + JPEG[HALF + 10 :],
    "jpeg with bytes behind": JPEG + b"\0" * 500,
    "jpeg with broken exif": JPEG[:2] + b"\xff\xe1\0\nExif\0\0XX" + JPEG[2:],
    "webp with broken exif": encoded("WEBP", exif=b"Exif\0\0xx"),
    "jpeg of four channels": encoded("JPEG", "CMYK"),
    "png": PNG,
    "png cut by 1": PNG[:-1],
    "png cut by 8": PNG[:-8],
    "png cut by 12": PNG[:-12],
    "png cut by 16": PNG[:-16],
    "png with a wrong checksum of its data": png_data(bytes, 1),
    "png with an unknown chunk": png_with(chunk(b"ABCD", b"x")),
    "bmp": BMP,
    "bmp of 16 bits": bmp_16_bits(),
    "webp": WEBP,
}
UNREADABLE = {
    "gif": encoded("GIF"),
    "ico": encoded("ICO"),
    "tiff": encoded("TIFF"),
    "jpeg 2000": encoded("JPEG2000"),
    "ppm": encoded("PPM"),
    "text": b"<html>404 not found</html>" * 9,
    "empty": b"",
    "jpeg cut": JPEG[:-5],
    "jpeg with two beginnings": JPEG[:2] + JPEG,
    "jpeg without quantization tables": JPEG.replace(b"\xff\xdb", b"\xff\xfe"),
    "jpeg without data": JPEG.replace(b"\xff\xda", b"\xff\xfe"),
    "lossless jpeg": JPEG[: FRAME + 1] + b"\xc3" + JPEG[FRAME + 2 :],
    "jpeg of 12 bits": JPEG[: FRAME + 4] + b"\x0c" + JPEG[FRAME + 5 :],
    "jpeg without height": JPEG[: FRAME + 5] + b"\0\0" + JPEG[FRAME + 7 :],
    "png cut by 60": PNG[:-60],
    "png with a wrong checksum": png_with(chunk(b"tEXt", b"a\0b", 1)),
    "bmp cut": BMP[:-3],
    "webp cut": WEBP[:-2],
}
DAMAGED_INSIDE = {
    "png with wrong data": png_data(lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "png with too little data": png_data(lambda data: data[:-20]),
}
"""Unreadable images that the index finds only by decoding them."""
CASES = READABLE | UNREADABLE | DAMAGED_INSIDE
BAD = [name in UNREADABLE or name in DAMAGED_INSIDE for name in CASES]


@pytest.fixture
def table(folder: Folder) -> ImageTable:
    return folder(len(CASES), dict(enumerate(CASES.values())))


def named(bad: list[bool]) -> dict[str, bool]:
    return dict(zip(CASES, bad, strict=True))


def flagged(index: Index, split: str = "all") -> list[bool]:
    return [bool(flags & UNUSABLE) for flags in index.splits[split].flags.tolist()]


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_loader_reads_exactly_the_readable_images(
    table: ImageTable, pipeline_over: Build, loader: str
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    limits = FaultLimits(max_bad_val_fraction=1.0)
    pipeline = pipeline_over(table, loader, EVAL, EvalSampler(len(CASES), 8), limits=limits)
    validated = {i for batch in pipeline for i in batch.indices[: batch.valid].tolist()}
    assert named([i not in validated for i in range(len(CASES))]) == named(BAD)
    bad = set(pipeline.bad_images())
    assert named([str(table.path(i)) in bad for i in range(len(CASES))]) == named(BAD)


def test_index_flags_exactly_the_unreadable_images(table: ImageTable, tmp_path: Path) -> None:
    by_ends = flagged(build_index(table.root, tmp_path / "ends", 1))
    assert named(by_ends) == named([name in UNREADABLE for name in CASES])
    command = ["data", "index", str(table.root), "--out", str(tmp_path / "decoded"), "--workers", "1"]
    assert cli.main([*command, "--decode"]) == 0
    decoded = open_index(tmp_path / "decoded", table.root)
    assert named(flagged(decoded)) == named(BAD)
    pack(decoded, tmp_path / "packed", PackOptions(), 1, lambda done, total: None)
    shards = build_index(tmp_path / "packed", tmp_path / "shards", 1, decode=True)
    assert named(flagged(shards)) == named(BAD)


def test_images_in_memory_are_the_readable_ones(table: ImageTable) -> None:
    def rejected(i: int) -> bool:
        try:
            decode_folder(table.subset(np.array([i])), 24, 1)
        except UserError:
            return True
        return False

    assert named([rejected(i) for i in range(len(CASES))]) == named(BAD)


def test_image_rejected_only_by_dali_has_the_pixels_of_pillow(folder: Folder, pipeline_over: Build) -> None:
    """They do not depend on where an epoch starts."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    others = {3: PNG[:-12], 7: png_data(bytes, 1), 8: png_with(chunk(b"ABCD", b"x"))}
    damaged, intact = folder(12, others), folder(12, dict.fromkeys(others, PNG))
    expected = list(pipeline_over(intact, "dali", TRAIN, TrainSampler(12, 4, 0)))
    pipeline = pipeline_over(damaged, "dali", TRAIN, TrainSampler(12, 4, 0))
    for step in (0, 2, 1):
        pipeline.start(0, step)
        for batch, other in zip(pipeline, expected[step:], strict=True):
            assert torch.equal(batch.images, other.images)
            assert torch.equal(batch.indices, other.indices)
    assert pipeline.bad_images() == []
