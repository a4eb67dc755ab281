"""Training batches from image files: our pipeline beside DALI's own reader, torchvision's and no reading at all."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from dl2pa.bench.loaders import LOADERS, NEEDS_DALI, PACKED, Source, open_images, open_loader
from dl2pa.errors import TrainingFailure, UserError
from dl2pa.osutil import usable_cores

_MADE_UP = 128
_DISCARDED = 4
"""Batches before each timed block: what was read ahead while others had their turn is used up."""
_WARM_UP = 8
_QUIET_S = 0.1
_PATIENCE_S = 10.0
_GIB = 2**30
_SHORT_SIDE, _QUALITY = 256, 90


@dataclass(frozen=True)
class Turn:
    """What a loader took for its timed batches: seconds, seconds of processor time, and memory afterward."""

    seconds: float
    cpu_seconds: float
    memory_bytes: int


def bench_pipeline(
    loaders: list[str], root: Path | None, batch_size: int, steps: int, rounds: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Each loader in a process of its own; in every round each has one turn while the others rest.

    Args:
        loaders: some of ``LOADERS``, and ``PACKED``.
        root: class folders, or a folder with train/, or shards (ours only). None: photographs' stand-ins, made up.
        batch_size: images a batch.
        steps: batches timed a turn.

    Returns:
        Ratios of speed (`ours/native_dali`, `ours/torchvision`), medians over the rounds of the ratio within a round,
        and of processor time (`cpu: …`); rows of `loader images_per_second cpu_seconds_per_image peak_gib by_round
        images`.
        `peak_gib`: the proportional memory of the process and its workers, the most after any turn.

    Raises:
        UserError: DALI is not installed; a folder without images, or one that a loader cannot read.
        TrainingFailure: a loader's process died.
    """
    _check_dali(loaders)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dl2pa-bench-")))
        if root is None:
            root = make_up(scratch / "made up")
        sources = dict.fromkeys(loaders, Source(root, batch_size))
        if PACKED in sources:
            sources[PACKED] = Source(_pack(root, scratch / "packed"), batch_size)
        running = {name: stack.enter_context(_Resting(name, source)) for name, source in sources.items()}
        counts = {name: one.ready() for name, one in running.items()}
        turns: dict[str, list[Turn]] = {name: [] for name in loaders}
        for number in range(rounds):
            # Who comes first changes, so that a drift of the machine favors nobody.
            for name in loaders if number % 2 == 0 else reversed(loaders):
                turns[name].append(running[name].turn(steps))
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
    }


def _ratios(turns: dict[str, list[Turn]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for other in turns:
        if "ours" not in turns or other in ("ours", "synthetic"):
            continue
        pairs = list(zip(turns["ours"], turns[other], strict=True))
        name = f"ours/{other.replace('-', '_')}"
        found[name] = statistics.median(theirs.seconds / mine.seconds for mine, theirs in pairs)
        used = [(mine.cpu_seconds, theirs.cpu_seconds) for mine, theirs in pairs if theirs.cpu_seconds > 0]
        if used:  # the system counts in hundredths of a second
            found[f"cpu: {name}"] = statistics.median(mine / theirs for mine, theirs in used)
    return found


def _pack(root: Path, out: Path) -> Path:
    """Shards of the images below `root`, made smaller as a user would; returns `out`."""
    from pipelines.datasets.build_index import list_source
    from pipelines.datasets.pack import PackOptions, pack

    if open_images(root).members is not None:
        raise UserError(
            "--data", str(root), "holds shards, which are packed already", "Give a folder of images."
        )
    options = PackOptions(_SHORT_SIDE, _QUALITY, _GIB)
    pack(list_source(root), out, options, usable_cores(), lambda _done, _total: None)
    return out


def _check_dali(loaders: list[str]) -> None:
    wanted = [name for name in loaders if name in NEEDS_DALI]
    try:
        if wanted:
            from nvidia import dali as _dali  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        remedy = "Install nvidia-dali, or use " + ",".join(n for n in LOADERS if n not in NEEDS_DALI) + "."
        raise UserError("--loaders", wanted[0], "needs DALI, which is not installed", remedy) from None


def make_up(root: Path, count: int = _MADE_UP) -> Path:
    """Write JPEGs of 500 x 375 pixels, smooth with some noise, in two class folders below `root`; returns `root`."""
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


class _Resting:
    """A loader in a process of its own, which works only when asked."""

    def __init__(self, name: str, source: Source) -> None:
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._asked, theirs = context.Pipe()
        # No daemon: torch's loader has processes of its own.
        self._process = context.Process(target=_serve, args=(theirs, name, source))
        self._process.start()
        theirs.close()

    def __enter__(self) -> _Resting:
        return self

    def __exit__(self, *_: object) -> None:
        self._asked.close()
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()

    def ready(self) -> int:
        """Waits until it is warm; how many different images it has."""
        return self._answer()

    def turn(self, steps: int) -> Turn:
        """One turn of `steps` timed batches."""
        self._asked.send(steps)
        return self._answer()

    def _answer(self) -> Any:
        try:
            found = self._asked.recv()
        except (EOFError, ConnectionError):
            raise TrainingFailure(f"the process of {self._name} died (out of memory?)") from None
        if isinstance(found, UserError):
            raise found
        if isinstance(found, str):
            raise TrainingFailure(f"{self._name} failed: {found}")
        return found


def _serve(asked: Connection, name: str, source: Source) -> None:
    try:
        loader = open_loader(name, source)
        _take(loader.batches, _WARM_UP)
        _rest()
        asked.send(loader.images)
        while True:
            try:
                steps = asked.recv()
            except EOFError:
                break
            asked.send(_turn(loader.batches, steps))
        loader.close()
    except UserError as error:
        asked.send(error)
    except Exception as error:
        asked.send(f"{type(error).__name__}: {error}")


def _turn(batches: Iterator[Any], steps: int) -> Turn:
    _take(batches, _DISCARDED)
    before, began = _cpu_seconds(), time.perf_counter()
    _take(batches, steps)
    seconds, used = time.perf_counter() - began, _cpu_seconds() - before
    memory = _memory_bytes()
    _rest()
    return Turn(seconds, used, memory)


def _take(batches: Iterator[Any], count: int) -> None:
    for _ in range(count):
        next(batches)


def _rest() -> None:
    """Wait until what is read ahead is there, so that it is not done in another's turn."""
    until = time.monotonic() + _PATIENCE_S
    before = _cpu_seconds()
    while time.monotonic() < until:
        time.sleep(_QUIET_S)
        now = _cpu_seconds()
        if now - before < _QUIET_S / 10:
            return
        before = now


def _processes() -> list[psutil.Process]:
    """This one and its workers."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def _cpu_seconds() -> float:
    """Processor time of this process and its workers so far."""
    return sum(times.user + times.system for times in (one.cpu_times() for one in _processes()))


def _memory_bytes() -> int:
    """Memory of this process and its workers, a shared page divided among those who hold it."""
    return sum(one.memory_full_info().pss for one in _processes())
