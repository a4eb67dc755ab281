"""CPU microseconds per image, user and system, of reading images and of passing them to DALI.

`PYTHONPATH=TREE python -P tests/benchmarks/input_path.py ROOT [--copy] [--reading]`, ROOT with class folders; the
threads that read are those of dl2pa. To compare two versions, alternate their trees; `--copy` is for versions whose
inputs DALI copies, `--reading` leaves out DALI.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.datasets.folder import index_folder
from pipelines.datasets.table import ImageTable
from pipelines.encoded import EncodedStream, FaultLimits, ImageReader
from pipelines.transforms import Transforms

BATCH, STEPS, WARM_UP, THREADS, RUNS = 128, 400, 20, 2, 25


def cpu_us(work: Callable[[], object], images: int) -> list[float]:
    """User and system time of this thread per image; the first call is not counted."""
    work()
    before = resource.getrusage(resource.RUSAGE_THREAD)
    work()
    after = resource.getrusage(resource.RUSAGE_THREAD)
    seconds = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return [round(1e6 * each / images, 1) for each in seconds]


def reader_seconds() -> Any:
    """User and system time of the threads that read, in steps of 10 ms."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("dl2pa-read")]
    lines = [Path(f"/proc/self/task/{thread.native_id}/stat").read_text() for thread in threads]
    return (
        np.sum([[int(ticks) for ticks in line.rpartition(")")[2].split()[11:13]] for line in lines], 0) / 100
    )


def reading(table: ImageTable) -> list[float]:
    """User and system time of reading images and their headers, while as many as three batches are kept."""
    order = np.random.default_rng(0).integers(0, len(table), (STEPS, BATCH))
    reader = ImageReader(table, Transforms(224, train=True), 0, FaultLimits())
    stream = EncodedStream(reader, lambda _epoch, step: order[step], STEPS, THREADS)
    kept: deque[Any] = deque(maxlen=3)
    before = reader_seconds()
    for step in stream.steps(0, 0):
        if step.step == WARM_UP:
            before = reader_seconds()
        kept.append(step)
    images = (STEPS - WARM_UP) * BATCH
    return [round(1e6 * each / images, 1) for each in (reader_seconds() - before).tolist()]


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


def main(root: Path, options: list[str]) -> None:
    """Print the measurements as JSON."""
    table = index_folder(root, None, "ROOT")
    result = {"reading": reading(table)}
    if "--reading" not in options:
        data = [np.frombuffer(table.read(i), dtype=np.uint8) for i in range(min(BATCH, len(table)))]
        result["feeding"] = cpu_us(feeding(data, "--copy" in options), RUNS * len(data))
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
