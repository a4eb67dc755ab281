"""What a data set of millions of images costs before its first batch, from an index made up for the purpose."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

_CLASSES = 1000
_FILES = 64
_RANKS = 8
_MIB = 2**20


def bench_index(entry_counts: list[int], rounds: int) -> list[dict[str, Any]]:
    """One row a count of entries; the fastest of `rounds`, each in a process of its own.

    The index has as many paths, as long as ImageNet's, as it has entries; they name a few real JPEGs over and over,
    so that the first batch is really read and decoded.

    Returns:
        Rows of `entries index_mib write_s open_s first_batch_s own_mib node_mib`: seconds beyond imports; memory that a
        process has for itself after its first order, and that of a node of 8 with the mapped index, both before any
        image is read.
    """
    return [_measure(count, rounds) for count in entry_counts]


def _measure(count: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="dl2pa-bench-") as scratch:
        root = Path(scratch)
        began = time.perf_counter()
        _write_synthetic(root, count)
        write_s = time.perf_counter() - began
        found = [_in_a_process(root) for _ in range(rounds)]
        index_mib = (root / "dl2pa.index").stat().st_size / _MIB
    own = max(one["own_mib"] for one in found)
    return {
        "entries": count,
        "index_mib": index_mib,
        "write_s": write_s,
        "open_s": min(one["open_s"] for one in found),
        "first_batch_s": min(one["first_batch_s"] for one in found),
        "own_mib": own,
        "node_mib": _RANKS * own + index_mib,
    }


def _write_synthetic(root: Path, count: int) -> None:
    from PIL import Image

    from pipelines.datasets.index import INDEX_NAME, Index, SplitIndex, write_index
    from pipelines.datasets.table import ImageTable, PathTable

    generator = np.random.default_rng(0)
    classes = tuple(f"n{k:08d}" for k in range(_CLASSES))
    lengths: list[int] = []
    names: list[str] = []
    for i in range(_FILES):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((500, 375)).save(file, "JPEG", quality=90)
        names.append(f"{classes[i]}/{classes[i]}_{i:05d}.JPEG")
        path = root / "train" / names[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
        lengths.append(len(file.getvalue()))
    (root / "val").symlink_to("train")

    def table(half: str, size: int) -> SplitIndex:
        block = PathTable.of(names)
        repeats = -(-size // _FILES)
        blob = bytes(block.blob) * repeats
        step = np.arange(repeats, dtype=np.int64)[:, None] * len(block.blob)
        ends = (block.ends[None, :] + step).reshape(-1)[:size]
        labels = np.arange(size, dtype=np.int64) * _CLASSES // size
        files = PathTable(blob[: int(ends[-1])], ends)
        whole = ImageTable.of(root / half, files, np.resize(np.array(lengths), size), labels, classes)
        sizes = np.tile(np.array([[375, 500]], dtype=np.int32), (size, 1))
        return SplitIndex(replace(whole, sizes=sizes), np.zeros(size, dtype=np.uint8))

    halves = {"train": table("train", count), "val": table("val", max(1, count // 26))}
    write_index(root / INDEX_NAME, root, Index(halves, classes, {}))


def _in_a_process(root: Path) -> dict[str, float]:
    code = "import sys; from benchmarks.index import first_batch; first_batch(sys.argv[1])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def first_batch(root: str) -> None:
    """Open the data of `root` as training does, and take one batch; prints what it took."""
    from dl2pa.config import parse_config
    from dl2pa.training.data import build_train_pipeline, open_data
    from dl2pa.training.distributed import World, join_world

    for module in ("pipelines.files", "pipelines.decode_pillow", "PIL.JpegImagePlugin"):
        importlib.import_module(module)  # imports are not what is measured
    config = parse_config(
        {
            "data": {"root": root, "loader": "torchvision"},
            "train": {"batch_size": 64},
            "launch": {"device": "cpu", "threads": 1},
        }
    )
    world: World = join_world(config)
    before, began = _own_bytes(), time.perf_counter()
    data = open_data(config, 1)
    opened = time.perf_counter() - began
    pipeline = build_train_pipeline(config, data.train, world)
    pipeline.start(0)
    own = _own_bytes() - before
    next(iter(pipeline))
    passed = time.perf_counter() - began
    pipeline.close()
    found = {"open_s": opened, "first_batch_s": passed, "own_mib": own / _MIB}
    print(json.dumps(found), flush=True)
    sys.stdout.flush()
    os._exit(0)


def _own_bytes() -> int:
    """Memory that no other process shares: anonymous pages."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))
