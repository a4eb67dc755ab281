"""Time and memory before the first batch of a data set with millions of images, from a generated index."""

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
    """Measure the start with each number of entries; return the fastest of `rounds`, each in a new process.

    The index has one path of ImageNet's length per entry. The paths repeat those of a few real JPEGs, so that the first
    batch is read and decoded.

    Returns:
        Rows of `entries index_mib write_s open_s first_batch_s own_mib node_mib`: seconds without imports; private
        memory of a process after the order of the first epoch, and memory of 8 processes with the mapped index, both
        before any image is read.
    """
    return [_measure(count, rounds) for count in entry_counts]


def _measure(count: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="dl2pa-bench-") as scratch:
        root = Path(scratch)
        start = time.perf_counter()
        _write_synthetic(root, count)
        write_s = time.perf_counter() - start
        runs = [_run_first_batch(root) for _ in range(rounds)]
        index_mib = (root / "dl2pa.index").stat().st_size / _MIB
    own_mib = max(run["own_mib"] for run in runs)
    return {
        "entries": count,
        "index_mib": index_mib,
        "write_s": write_s,
        "open_s": min(run["open_s"] for run in runs),
        "first_batch_s": min(run["first_batch_s"] for run in runs),
        "own_mib": own_mib,
        "node_mib": _RANKS * own_mib + index_mib,
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

    def table(split: str, size: int) -> SplitIndex:
        block = PathTable.of(names)
        repeats = -(-size // _FILES)
        blob = bytes(block.blob) * repeats
        step = np.arange(repeats, dtype=np.int64)[:, None] * len(block.blob)
        ends = (block.ends[None, :] + step).reshape(-1)[:size]
        labels = np.arange(size, dtype=np.int64) * _CLASSES // size
        files = PathTable(blob[: int(ends[-1])], ends)
        images = ImageTable.of(root / split, files, np.resize(np.array(lengths), size), labels, classes)
        sizes = np.tile(np.array([[375, 500]], dtype=np.int32), (size, 1))
        return SplitIndex(replace(images, sizes=sizes), np.zeros(size, dtype=np.uint8))

    splits = {"train": table("train", count), "val": table("val", max(1, count // 26))}
    write_index(root / INDEX_NAME, root, Index(splits, classes, {}))


def _run_first_batch(root: Path) -> dict[str, float]:
    code = "import sys; from benchmarks.index import first_batch; first_batch(sys.argv[1])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def first_batch(root: str) -> None:
    """Open the data of `root` as in training, read one batch and print time and memory."""
    from dl2pa.config import parse_config
    from dl2pa.training.data import build_train_pipeline, open_data
    from dl2pa.training.distributed import World, join_world

    for module in ("pipelines.files", "pipelines.decode_pillow", "PIL.JpegImagePlugin"):
        importlib.import_module(module)  # exclude imports from the measurement
    config = parse_config(
        {
            "data": {"root": root, "loader": "torchvision"},
            "train": {"batch_size": 64},
            "launch": {"device": "cpu", "threads": 1},
        }
    )
    world: World = join_world(config)
    bytes_before, start = _private_bytes(), time.perf_counter()
    data = open_data(config, 1)
    open_s = time.perf_counter() - start
    pipeline = build_train_pipeline(config, data.train, world)
    pipeline.start(0)
    own_bytes = _private_bytes() - bytes_before
    next(iter(pipeline))
    first_batch_s = time.perf_counter() - start
    pipeline.close()
    print(json.dumps({"open_s": open_s, "first_batch_s": first_batch_s, "own_mib": own_bytes / _MIB}))
    sys.stdout.flush()
    os._exit(0)


def _private_bytes() -> int:
    """Return the private memory of this process: anonymous pages."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))
