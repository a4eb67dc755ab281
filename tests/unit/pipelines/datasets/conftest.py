"""Fixtures: real data, if the machine has it, and trees of small files."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).resolve().parents[4] / "../shared/data"


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Path of a shared file or folder; skip the test if it is missing."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"needs real data: there is no {SHARED / name}")
        return SHARED / name

    return find


@pytest.fixture(scope="session")
def cifar100_root(shared_data: Callable[[str], Path], pytestconfig: pytest.Config) -> Path:
    """The published CIFAR-100 files, unpacked once into pytest's cache."""
    script = shared_data("unpack.py")
    pytest.importorskip("pillow_jxl", reason="unpacking CIFAR-100 needs pillow-jxl-plugin")
    root = pytestconfig.rootpath / ".pytest_cache" / "d" / "cifar100"
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
            subprocess.run(
                [sys.executable, script, Path(scratch) / "complete"], check=True, capture_output=True
            )
            if not root.exists():
                (Path(scratch) / "complete").rename(root)
    return root


@pytest.fixture
def image_tree(tmp_path: Path) -> Callable[..., Path]:
    """Write files that contain their names: ``image_tree("data", "cat/1.jpeg", "dog/2.png")``."""

    def write(name: str, *paths: str) -> Path:
        for path in paths:
            file = tmp_path / name / path
            assert file.is_relative_to(tmp_path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(path.encode("utf-8", "surrogateescape"))
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A small JPEG image."""
    file = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def tar_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a tar file: ``tar_file("data/train-0.tar", {"a.jpg": b"…", "a.cls": b"1"})``."""

    def write(name: str, members: dict[str, bytes]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for key, content in members.items():
                member = tarfile.TarInfo(key)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return path

    return write
