"""Throughput of training batches from image files, compared with DALI's reader, torchvision and synthetic data."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dl2pa.bench import LOADERS, NEEDS_DALI, OURS, PACKED
from dl2pa.bench.loaders import Source, open_images, open_loader
from dl2pa.errors import TrainingFailure, UserError
from dl2pa.osutil import usable_cores

_GENERATED_IMAGES = 128
_DISCARDED = 4
"""Batches before each timed block, which use up what was prefetched during other turns."""
_WARM_UP = 8
_IDLE_S = 0.1
_IDLE_TIMEOUT_S = 10.0
_GIB = 2**30
_SHORT_SIDE, _QUALITY = 256, 90
_ROLES = {"dl2pa-read": "reader", "dl2pa-feed": "feeder", "MainThread": "loop"}
"""Threads of a loader process by the beginning of their names; `loop` is the thread that takes the batches."""


@dataclass(frozen=True)
class Turn:
    """Time, CPU time and subsequent memory of one timed block.

    Attributes:
        thread_seconds: user and system CPU time per role of ``_ROLES``, in steps of 10 ms.
    """

    seconds: float
    cpu_seconds: float
    memory_bytes: int
    thread_seconds: dict[str, tuple[float, float]]


def bench_pipeline(
    loaders: list[str], root: Path | None, batch_size: int, steps: int, rounds: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measure each loader in a separate process; in every round the loaders take turns while the others are idle.

    Args:
        loaders: from ``LOADERS`` and ``PACKED``.
        root: class folders, a folder with train/, or shards (only loader `ours`); None: generated images.
        steps: timed batches per turn.

    Returns:
        Ratios of throughput (`ours/native_dali`, `ours/torchvision`) and of CPU time (`cpu: …`), medians over the
        rounds of the ratio within a round, and rows of `loader images_per_second cpu_seconds_per_image peak_gib
        by_round images`. `peak_gib` is the largest proportional set size of the process and its workers after a turn.
        The rows of dl2pa's loaders also have the CPU time of their Python threads, see ``_thread_columns``.

    Raises:
        UserError: DALI is not installed, or a folder has no images or cannot be read by a loader.
        TrainingFailure: a loader process died.
    """
    _check_dali(loaders)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dl2pa-bench-")))
        if root is None:
            root = generate_images(scratch / "images")
        sources = dict.fromkeys(loaders, Source(root, batch_size))
        if PACKED in sources:
            sources[PACKED] = Source(_pack(root, scratch / "packed"), batch_size)
        processes = {
            name: stack.enter_context(_LoaderProcess(name, source)) for name, source in sources.items()
        }
        counts = {name: process.wait_ready() for name, process in processes.items()}
        turns: dict[str, list[Turn]] = {name: [] for name in loaders}
        for number in range(rounds):
            # The order alternates to compensate for drift.
            for name in loaders if number % 2 == 0 else reversed(loaders):
                turns[name].append(processes[name].turn(steps))
    rows = [_row(name, turns[name], steps * batch_size, counts[name]) for name in loaders]
    return _ratios(turns), rows


def _row(name: str, turns: list[Turn], images: int, distinct: int) -> dict[str, Any]:
    speeds = [images / turn.seconds for turn in turns]
    return {
        "loader": name,
        "images_per_second": statistics.median(speeds),
        "cpu_seconds_per_image": statistics.median(turn.cpu_seconds for turn in turns) / images,
        "peak_gib": max(turn.memory_bytes for turn in turns) / _GIB,
        "by_round": [round(speed, 1) for speed in speeds],
        "images": distinct,
        **(_thread_columns(turns, images) if name in (OURS, PACKED) else {}),
    }


def _thread_columns(turns: list[Turn], images: int) -> dict[str, float]:
    """CPU microseconds per image of the threads that read, feed the decoder and take the batches.

    Means over the turns. Decoding is not included. Reader and feeder also have the images per second of one core that
    only runs them: `reader_images_per_second_per_core`, and `feeder_…` for feeding and taking together.
    """
    columns: dict[str, float] = {}
    for role in _ROLES.values():
        for i, kind in enumerate(("user", "system")):
            seconds = sum(turn.thread_seconds.get(role, (0.0, 0.0))[i] for turn in turns)
            columns[f"{role}_{kind}_us"] = 1e6 * seconds / (images * len(turns))
    for name, roles in (("reader", ["reader"]), ("feeder", ["feeder", "loop"])):
        total = sum(columns[f"{role}_{kind}_us"] for role in roles for kind in ("user", "system"))
        if total > 0:
            columns[f"{name}_images_per_second_per_core"] = 1e6 / total
    return columns


def _ratios(turns: dict[str, list[Turn]]) -> dict[str, float]:
    ratios: dict[str, float] = {}
    for other in turns:
        if OURS not in turns or other in (OURS, "synthetic"):
            continue
        pairs = list(zip(turns[OURS], turns[other], strict=True))
        name = f"ours/{other.replace('-', '_')}"
        ratios[name] = statistics.median(b.seconds / a.seconds for a, b in pairs)
        cpu = [a.cpu_seconds / b.cpu_seconds for a, b in pairs if b.cpu_seconds > 0]
        if cpu:  # CPU time has a resolution of 10 ms and may be 0
            ratios[f"cpu: {name}"] = statistics.median(cpu)
    return ratios


def _pack(root: Path, out: Path) -> Path:
    """Write the images below `root`, resized, as shards to `out`; return `out`."""
    from pipelines.datasets.build_index import list_source
    from pipelines.datasets.pack import PackOptions, pack

    if open_images(root).members is not None:
        raise UserError("--data", str(root), "is already packed", "Give a folder of images.")
    options = PackOptions(_SHORT_SIDE, _QUALITY, _GIB)
    pack(list_source(root), out, options, usable_cores(), lambda _done, _total: None)
    return out


def _check_dali(loaders: list[str]) -> None:
    dali_loaders = [name for name in loaders if name in NEEDS_DALI]
    try:
        if dali_loaders:
            from nvidia import dali as _dali  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        remedy = "Install nvidia-dali, or use " + ",".join(n for n in LOADERS if n not in NEEDS_DALI) + "."
        raise UserError(
            "--loaders", dali_loaders[0], "requires DALI, which is not installed", remedy
        ) from None


def generate_images(root: Path, count: int = _GENERATED_IMAGES) -> Path:
    """Write smooth, noisy JPEGs of 500 x 375 pixels to two class folders below `root`; return `root`."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375)), dtype=np.int16)
        noisy = np.clip(smooth + generator.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        folder = root / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(folder / f"{i:04d}.jpg", quality=90)
    return root


class _LoaderProcess:
    """A loader in a separate process, which is idle between turns."""

    def __init__(self, name: str, source: Source) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._connection, child_connection = context.Pipe()
        # Not a daemon, because torch's DataLoader starts processes.
        self._process = context.Process(target=_serve, args=(child_connection, name, source))
        self._process.start()
        child_connection.close()

    def __enter__(self) -> _LoaderProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()

    def wait_ready(self) -> int:
        """Wait for the end of the warm-up; return the number of distinct images."""
        return self._receive()

    def turn(self, steps: int) -> Turn:
        """Measure `steps` batches."""
        self._connection.send(steps)
        return self._receive()

    def _receive(self) -> Any:
        try:
            result = self._connection.recv()
        except (EOFError, ConnectionError):
            raise TrainingFailure(f"the process of loader {self._name} died (out of memory?)") from None
        if isinstance(result, UserError):
            raise result
        if isinstance(result, str):
            raise TrainingFailure(f"{self._name} failed: {result}")
        return result


def _serve(connection: Connection, name: str, source: Source) -> None:
    try:
        loader = open_loader(name, source)
        _take(loader.batches, _WARM_UP)
        _rest()
        connection.send(loader.images)
        while True:
            try:
                steps = connection.recv()
            except EOFError:
                break
            connection.send(_turn(loader.batches, steps))
        loader.close()
    except UserError as error:
        connection.send(error)
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


def _turn(batches: Iterator[Any], steps: int) -> Turn:
    _take(batches, _DISCARDED)
    threads_before, cpu_before, start = _thread_seconds(), _cpu_seconds(), time.perf_counter()
    _take(batches, steps)
    seconds, cpu_seconds = time.perf_counter() - start, _cpu_seconds() - cpu_before
    threads = {
        role: (user - before[0], system - before[1])
        for role, (user, system) in _thread_seconds().items()
        for before in [threads_before.get(role, (0.0, 0.0))]
    }
    memory = _memory_bytes()
    _rest()
    return Turn(seconds, cpu_seconds, memory, threads)


def _take(batches: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(batches)


def _rest() -> None:
    """Wait for the end of prefetching, so that it does not slow down other turns."""
    deadline = time.monotonic() + _IDLE_TIMEOUT_S
    before = _cpu_seconds()
    while time.monotonic() < deadline:
        time.sleep(_IDLE_S)
        now = _cpu_seconds()
        if now - before < _IDLE_S / 10:
            return
        before = now


def _processes() -> list[psutil.Process]:
    """Return this process and its workers."""
    process = psutil.Process()
    return [process, *process.children(recursive=True)]


def _cpu_seconds() -> float:
    """Return the CPU time of this process and its workers."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in _processes()))


def _thread_seconds() -> dict[str, tuple[float, float]]:
    """Return user and system CPU time of this process per role of ``_ROLES``."""
    roles = {
        thread.native_id: role
        for thread in threading.enumerate()
        for start, role in _ROLES.items()
        if thread.name.startswith(start)
    }
    sums: dict[str, tuple[float, float]] = {}
    for thread in psutil.Process().threads():
        if role := roles.get(thread.id):
            user, system = sums.get(role, (0.0, 0.0))
            sums[role] = user + thread.user_time, system + thread.system_time
    return sums


def _memory_bytes() -> int:
    """Return the proportional set size of this process and its workers."""
    return sum(process.memory_full_info().pss for process in _processes())
