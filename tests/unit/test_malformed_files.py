"""Damaged and hostile files of every form that the program reads: one message each, in bounded time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from dl2pa.geometry import load_prototypes
from pipelines.datasets.index import open_index
from pipelines.single import load_image
from support.malformed import GOOD, PREPROCESSING, counted, jpeg, npy, small_index, small_model, tar

TESTS = Path(__file__).resolve().parents[1]


def test_valid_files_of_each_format_are_read(tmp_path: Path) -> None:
    """Shows that the refusals of the next test are due to the damage."""
    (tmp_path / "cat").mkdir()
    for form in ("JPEG", "PNG", "WEBP", "BMP"):
        Image.new("RGB", (32, 16)).save(tmp_path / f"cat/1.{form.lower()}", form)
        assert load_image(tmp_path / f"cat/1.{form.lower()}", **PREPROCESSING).shape == (3, 16, 16)
    assert not counted(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/train-0.tar").write_bytes(tar(("a.jpg", jpeg()), ("a.cls", b"1")))
    assert not counted(tmp_path / "shards")
    small_index(tmp_path / "indexed")
    assert len(open_index(tmp_path / "indexed/dl2pa.index", tmp_path / "indexed").classes) == 2
    small_model(tmp_path / "model")
    (tmp_path / "a.npy").write_bytes(npy("(10, 5)", GOOD))
    assert load_prototypes(tmp_path / "a.npy", 10, 5).points.shape == (10, 5)


def test_every_malformed_file_is_refused_or_counted(tmp_path: Path) -> None:
    """Code in the files is not executed: the fake `gs` replaces Ghostscript, which Pillow starts for EPS files."""
    ghostscript = tmp_path / "bin/gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch '{tmp_path}/work/TRACE'\n")
    ghostscript.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{ghostscript.parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{TESTS}:{TESTS.parent}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "support.malformed", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tried"] >= 150
    shown = "\n".join(f"--- {name}: {said}" for name, said in found["wrong"].items())
    assert not found["wrong"], f"{len(found['wrong'])} of {found['tried']}\n{shown}"
