"""Cost of tracking: step time in different states of the server, and delivery of many points."""

from __future__ import annotations

import os
import resource
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dl2pa.config import parse_config
from dl2pa.model.model import build_model, init_prototypes
from dl2pa.rundir import RunDirectory
from dl2pa.tracking import Tracker, local_uri
from dl2pa.tracking.local import LocalServer
from dl2pa.training.data import build_train_pipeline, open_data
from dl2pa.training.distributed import World
from dl2pa.training.train_state import TrainState

_STATES = ("off", "spool", "server", "stopped")
_BLOCK_SECONDS = 4.0
_PERCENTILES = (50, 90, 99)
_METRICS = 5
_NAMES = tuple(f"group/metric_{i}" for i in range(_METRICS))
_CONFIG = {
    "data": {"dataset": "synthetic", "num_classes": 100, "synthetic_samples": [1024, 64], "image_size": 16},
    "model": {"backbone": "resnet8", "embedding_dim": 32, "widths": [8, 16, 32]},
    "train": {"batch_size": 32},
}


def bench_tracking(
    points: int, runs: int, rounds: int, world: World
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measure step times with tracking, and the delivery of many points.

    Args:
        points: metric points per run.
        rounds: interleaved blocks of steps in each state of the server; every step logs five points.

    Returns:
        Ratios of step-time percentiles to those without tracking, such as ``server/off p99``; rows of ``state steps
        p50_ms p90_ms p99_ms``, and a row of ``runs points`` with time of the logging calls, time until delivery,
        memory and sizes.
    """
    with tempfile.TemporaryDirectory(prefix="dl2pa-bench-") as folder, _server(Path(folder)) as server:
        times = _steps(server, Path(folder), rounds, world)
        volume = _volume(server, Path(folder), points, runs)
    rows: list[dict[str, Any]] = []
    for state, seconds in times.items():
        percentiles = {f"p{p}_ms": 1000 * _percentile(seconds, p) for p in _PERCENTILES}
        rows.append({"state": state, "steps": len(seconds), **percentiles})
    off = rows[0]
    ratios = {
        f"{row['state']}/off p{p}": row[f"p{p}_ms"] / off[f"p{p}_ms"]
        for row in rows[1:]
        for p in _PERCENTILES
    }
    return ratios, [*rows, volume]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def _server(folder: Path) -> Generator[LocalServer]:
    log, artifacts = folder / "server.log", folder / "artifacts"
    server = LocalServer(local_uri(folder / "store"), log, artifacts, "127.0.0.1", _free_port())
    (folder / "store").mkdir()
    server.start()
    try:
        yield server
    finally:
        server.stop()


def _tracker(run: Path, uri: str | None, *, enabled: bool = True) -> Tracker:
    tracker = Tracker(
        run, enabled=enabled, uri=uri, experiment="bench", run_name=run.name, attempt=1, drain_seconds=600
    )
    tracker.start({"bench": "tracking"}, {})
    return tracker


def _steps(server: LocalServer, folder: Path, rounds: int, world: World) -> dict[str, list[float]]:
    """Return the seconds of every training step by the state of tracking."""
    step = _training(world)
    trackers = {
        "off": _tracker(folder / "off", None, enabled=False),
        "spool": _tracker(folder / "spool", None),
        "server": _tracker(folder / "server", server.uri),
        "stopped": _tracker(folder / "stopped", server.uri),
    }
    _wait_until_sent(trackers)
    for number in range(20):
        step(number)
    times: dict[str, list[float]] = {state: [] for state in _STATES}
    count = 20
    for turn in range(rounds):
        for state in (*_STATES[turn % 4 :], *_STATES[: turn % 4]):
            with _stopped(server) if state == "stopped" else nullcontext():
                end = time.perf_counter() + _BLOCK_SECONDS
                while (start := time.perf_counter()) < end:
                    loss = step(count)
                    trackers[state].metrics(count, dict.fromkeys(_NAMES, loss))
                    times[state].append(time.perf_counter() - start)
                    count += 1
            _wait_until_sent(trackers)
    for tracker in trackers.values():
        tracker.finish("finished")
    return times


def _training(world: World) -> Callable[[int], float]:
    """Return a function that runs a training step and reads its loss on the host, as logging does."""
    config = parse_config(_CONFIG)
    data = open_data(config, world.size)
    pipeline = build_train_pipeline(config, data.train, world)
    model = build_model(config, len(data.classes), init_prototypes(config, len(data.classes)))
    train_state = TrainState(config, model, world, pipeline.steps_per_epoch)
    train_state.begin_epoch(0)
    train_state.wrap()
    train_state.model.train()
    pipeline.start(0, 0)
    batch = next(iter(pipeline))

    def step(number: int) -> float:
        train_state.step(batch, number, want_norm=False)
        return train_state.meter.read()

    return step


def _wait_until_sent(trackers: dict[str, Tracker]) -> None:
    """Wait until all points are sent, so that none is sent during the next block."""
    deadline = time.monotonic() + 120
    deliveries = [tracker._delivery for tracker in trackers.values() if tracker._delivery is not None]
    while not all(d.is_done(with_pending=False) for d in deliveries) and time.monotonic() < deadline:
        time.sleep(0.05)


@contextmanager
def _stopped(server: LocalServer) -> Generator[None]:
    """Suspend the server: it accepts connections but does not answer."""
    assert server.process is not None
    os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)


def _volume(server: LocalServer, folder: Path, points: int, runs: int) -> dict[str, Any]:
    """Log points from concurrent runs, one thread each, as fast as possible."""
    memory_before, server_before = _memory(os.getpid()), _server_usage(server)
    seconds: list[float] = []
    sent: list[float] = []
    start = time.perf_counter()

    def log(number: int) -> None:
        tracker = _tracker(folder / f"run-{number}", server.uri)
        cpu_start = time.thread_time()
        for step in range(points // _METRICS):
            tracker.metrics(step, dict.fromkeys(_NAMES, step / 7))
        seconds.append(time.thread_time() - cpu_start)
        tracker.finish("finished")
        sent.append(time.perf_counter() - start)

    threads = [threading.Thread(target=log, args=(number,)) for number in range(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory_after, server_after = _memory(os.getpid()), _server_usage(server)
    runs_left = sum(1 for number in range(runs) if _has_unsent(folder / f"run-{number}", server.uri))
    return {
        "runs": runs,
        "points": points,
        "call_us": 1e6 * statistics.mean(seconds) / (points // _METRICS),
        "delivered_s": max(sent),
        "points_per_s": runs * points / max(sent),
        "runs_left": runs_left,
        "spool_mib": sum(RunDirectory(folder / f"run-{n}").spool.stat().st_size for n in range(runs)) / 2**20,
        "database_mib": sum(p.stat().st_size for p in (folder / "store").glob("mlflow.db*")) / 2**20,
        "memory_grown_mib": memory_after - memory_before,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "server_peak_mib": server_after[0],
        "server_cpu_s": server_after[1] - server_before[1],
    }


def _has_unsent(run: Path, uri: str) -> bool:
    from dl2pa.tracking.delivery import Delivery

    return not Delivery(run, uri).is_done(with_pending=True)


def _memory(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _server_usage(server: LocalServer) -> tuple[float, float]:
    """Return the peak MiB and CPU seconds of all server processes."""
    assert server.process is not None
    peak = busy = 0.0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            if int(words[2]) != server.process.pid:
                continue
            status = (folder / "status").read_text(encoding="utf-8").splitlines()
        except (OSError, IndexError, ValueError):
            continue
        high = next((line.split()[1] for line in status if line.startswith("VmHWM")), "0")
        peak += int(high) / 1024
        busy += (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
    return peak, busy


def _percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]
