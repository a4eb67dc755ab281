"""CPU microseconds per image, user and system, of reading images and of passing them to DALI; without torch.

`PYTHONPATH=TREE python tests/benchmarks/input_path.py ROOT [--copy]`, ROOT with class folders. To compare two versions,
alternate their trees; `--copy` is for versions whose inputs DALI copies.
"""

from __future__ import annotations

import json
import resource
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.datasets.folder import index_folder
from pipelines.datasets.table import ImageTable
from pipelines.header import image_size, is_cut_png

BATCH, EPOCHS, RUNS = 128, 10, 25


def cpu_us(work: Callable[[], object], images: int) -> list[float]:
    """User and system time of this thread per image; the first call is not counted."""
    work()
    before = resource.getrusage(resource.RUSAGE_THREAD)
    work()
    after = resource.getrusage(resource.RUSAGE_THREAD)
    seconds = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return [round(1e6 * each / images, 1) for each in seconds]


def read_all(table: ImageTable, header_of: Callable[[bytes], Any]) -> None:
    """Read all images and their headers, and keep as many as three batches."""
    kept: deque[Any] = deque(maxlen=3 * BATCH)
    for _ in range(EPOCHS):
        for i in range(len(table)):
            data = table.read(i)
            header = header_of(data)
            image_size(header)
            is_cut_png(header)
            kept.append(np.frombuffer(data, dtype=np.uint8))


def header_argument(data: bytes) -> Callable[[bytes], Any]:
    """Conversion of bytes to what `image_size` of this version takes."""
    try:
        image_size(data)
    except AttributeError:
        return lambda data: np.frombuffer(data, dtype=np.uint8)
    return lambda data: data


def feeding(data: list[Any], copy: bool) -> Callable[[], None]:
    """Runs of a DALI pipeline that decodes only small windows."""
    from nvidia import dali

    fn: Any = dali.fn
    pipeline_def: Any = dali.pipeline_def
    anchor, shape = np.zeros((len(data), 2), np.int32), np.full((len(data), 2), 32, np.int32)
    inputs = data, anchor, shape, np.zeros(len(data), np.int32)

    @pipeline_def(batch_size=len(data), num_threads=2, device_id=None, prefetch_queue_depth=2)
    def graph() -> Any:
        encoded, start, window, mirror = fn.external_source(
            source=lambda: inputs, num_outputs=4, batch=True, no_copy=None if copy else True
        )
        options = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
        images = fn.decoders.image_slice(encoded, start, window, device="cpu", **options)
        return fn.flip(fn.resize(images, size=[8, 8]), horizontal=mirror)

    pipe = graph()
    pipe.build()

    def run() -> None:
        for _ in range(RUNS):
            pipe.run()

    return run


def main(root: Path, copy: bool) -> None:
    """Print both measurements as JSON."""
    table = index_folder(root, None, "ROOT")
    header_of = header_argument(table.read(0))
    reading = cpu_us(lambda: read_all(table, header_of), EPOCHS * len(table))
    data = [np.frombuffer(table.read(i), dtype=np.uint8) for i in range(min(BATCH, len(table)))]
    print(json.dumps({"reading": reading, "feeding": cpu_us(feeding(data, copy), RUNS * len(data))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--copy" in sys.argv)
