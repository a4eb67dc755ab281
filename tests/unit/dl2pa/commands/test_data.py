"""`dl2pa data` reports what it does not read, and why images are damaged."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.commands import run_here


@pytest.fixture
def picture() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def pets(tmp_path: Path, picture: bytes) -> Path:
    """Two classes in two splits, with files that are not read and a damaged image."""
    root = tmp_path / "pets"
    contents = {f"{split}/{name}/1.jpg": picture for split in ("train", "val") for name in ("2", "10")}
    contents |= {"train/2/a.gif": b"GIF89a", "train/10/b.jpg": b"GIF89a", "backup.tar": b""}
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def test_index_reports_skipped_files_and_reasons(pets: Path) -> None:
    result = run_here("data", "index", pets, "--workers", "1", "--json").result
    assert result["skipped"] == {
        "train": {
            "GIF image": {"count": 1, "first": ["2/a.gif"]},
            "archive": {"count": 1, "first": ["backup.tar"]},
        },
        "val": {},
    }
    assert result["warnings"] == ["train: skipped GIF image: 1 (2/a.gif); archive: 1 (backup.tar)"]
    assert result["problems"] == [
        {"half": "train", "path": "train/10/b.jpg", "kinds": "not_an_image", "reason": "is a GIF file"}
    ]
    plain = run_here("data", "index", pets, "--workers", "1")
    assert "train: skipped GIF image: 1 (2/a.gif); archive: 1 (backup.tar)" in plain.error
    assert "train/10/b.jpg: not_an_image (is a GIF file)" in plain.error


def test_pack_reports_skipped_files_of_the_source(pets: Path, tmp_path: Path) -> None:
    result = run_here("data", "pack", pets, tmp_path / "packed", "--workers", "1", "--json").result
    assert result["images"] == {"train": 3, "val": 2}
    assert result["skipped"]["train"].keys() == {"GIF image", "archive"}


def test_index_warns_of_gaps_in_labels(tmp_path: Path, picture: bytes) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for label in (b"0", b"1000", b"2000"):
            for suffix, content in (("jpg", picture), ("cls", label)):
                member = tarfile.TarInfo(f"{label.decode()}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    result = run_here("data", "index", tmp_path, "--workers", "1", "--json").result
    assert result["classes"] == 2001
    assert result["warnings"] == ["train: 1,998 of 2,001 classes have no images: '1', '2', '3', '4', '5', …"]


def test_incomplete_packing_is_not_indexed(pets: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    run_here("data", "pack", pets, out, "--workers", "1", "--json")
    (out / "pack.unverified").touch()
    refused = run_here("data", "index", out, "--json")
    assert refused.code == 2
    assert refused.result["error"]["field"] == "ROOT"
    assert "data pack" in refused.result["error"]["remedy"]
    assert run_here("data", "pack", pets, out, "--workers", "1", "--json").code == 0
    assert run_here("data", "index", out, "--workers", "1", "--json").code == 0
