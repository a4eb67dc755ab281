"""System metrics of each node (CPU, memory, disk, network, GPUs), named as MLflow names them.

A thread of the first rank of each node measures. Rank 0 writes its points to the spool. Every other node appends to
``RUN/events/system-N.jsonl``, and rank 0 copies these points to the spool with their original times. The spool keeps
each (name, step) once, so copying twice changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dl2pa import fence
from dl2pa.rundir import RunDirectory
from dl2pa.tracking.spool import now_ms, read_events

log = logging.getLogger(__name__)

_READINGS = 5
"""Number of readings that are averaged into a point."""
_GPU_USE = re.compile(r"gpu_\d+_utilization_percentage")
_SLOWER_AFTER = 1000
"""Points after which the interval doubles, to limit the size of long runs."""


class Write(Protocol):
    """Record the values measured at a step and a time (ms)."""

    def __call__(self, step: int, values: Mapping[str, Any], time_ms: int) -> None: ...


class OtherNodes:
    """Read the points of the other nodes, each line once."""

    def __init__(self, run_dir: Path) -> None:
        self._pattern = RunDirectory(run_dir).node_metrics("*")
        self._offsets: dict[Path, int] = {}

    def collect(self, write: Write) -> None:
        """Pass the lines that are new since the last call to `write`."""
        for path in sorted(self._pattern.parent.glob(self._pattern.name)):
            for event, end in read_events(path, self._offsets.get(path, 0)):
                self._offsets[path] = end
                if event is not None and event["e"] == "metrics":
                    write(event["step"], event["v"], event["t"])


class NodeFile:
    """Append the points of one node to its file; a write error is logged once."""

    def __init__(self, run_dir: Path, node: int, attempt: int) -> None:
        self._path = RunDirectory(run_dir).node_metrics(node)
        self._attempt = attempt
        self._refused = False

    def write(self, step: int, values: Mapping[str, Any], time_ms: int) -> None:
        event = {"e": "metrics", "t": time_ms, "a": self._attempt, "step": step, "v": dict(values)}
        line = json.dumps(event, separators=(",", ":")) + "\n"
        fence.check(self._path, fresh=False)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                # End a line truncated by a kill or a full disk, so that the reader skips only that line.
                torn = file.tell() > 0 and not _ends_a_line(self._path)
                file.write((b"\n" if torn else b"") + line.encode())
        except OSError as error:
            if not self._refused:
                log.warning("cannot write points to %s (%s); training continues", self._path, error)
            self._refused = True


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class NodeWatch(threading.Thread):
    """Daemon thread that measures a node at an interval until stopped; an error ends only this thread.

    Args:
        node: number of the node.
        write: called with each point; metrics are named ``system/node-N/...``.
        also: called after each point; rank 0 copies the points of the other nodes there.
        started_ms: start of the run; the step of a point is the number of seconds since, across attempts.
        every: initial seconds between points.
        gpus: UUIDs of the GPUs that the run uses on this node.
        folder: the run directory, whose disk is measured.
    """

    def __init__(
        self,
        node: int,
        write: Write,
        started_ms: int,
        every: float,
        gpus: Sequence[str],
        folder: Path,
        also: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(name="dl2pa-system", daemon=True)
        # Imports modules here, because a fork during an import in the thread would leave a locked import lock.
        self._machine = _Machine(gpus, folder)
        self._node = node
        self._write = write
        self._also = also
        self._started_ms = started_ms
        self._every = every
        self._end = threading.Event()
        self.gpu_use: float | None = None
        """Mean utilization of the GPUs in the last point, in percent."""

    def run(self) -> None:
        try:
            self._machine.begin()
            points = 0
            pause = min(1.0, self._every)  # so that a short run has a point
            while not (points and self._end.is_set()):  # at least one point
                readings: list[dict[str, float]] = []
                count = _READINGS if points else 1
                for _ in range(count):
                    self._end.wait(pause / count)
                    readings.append(self._machine.read())
                    if self._end.is_set():
                        break
                self._record(readings)
                points += 1
                pause = self._every * 2.0 ** (points // _SLOWER_AFTER)
        except Exception as error:
            log.warning("system metrics stopped (%s); training continues", error)

    def _record(self, readings: Sequence[Mapping[str, float]]) -> None:
        time_ms = now_ms()
        step = max(0, time_ms - self._started_ms) // 1000
        prefix = f"system/node-{self._node}/"
        means = _means(readings)
        used = [value for name, value in means.items() if _GPU_USE.fullmatch(name)]
        self.gpu_use = round(sum(used) / len(used), 1) if used else None
        self._write(step, {prefix + k: v for k, v in means.items()}, time_ms)
        self._also()

    def stop(self) -> None:
        """Record a last point and end; waits up to 5 seconds."""
        self._end.set()
        if self.is_alive():
            self.join(timeout=5)


def _means(readings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    series: defaultdict[str, list[float]] = defaultdict(list)
    for reading in readings:
        for name, value in reading.items():
            series[name].append(value)
    # Network traffic is cumulative, so the last reading is kept.
    return {
        name: values[-1] if name.startswith("network") else round(sum(values) / len(values), 2)
        for name, values in series.items()
    }


class _Machine:
    """Sensor readings of this node. Raises ImportError without psutil; GPUs need NVML."""

    def __init__(self, gpus: Sequence[str], folder: Path) -> None:
        import psutil

        self._psutil: Any = psutil
        self._folder = str(folder)
        self._network = psutil.net_io_counters()
        self._nvml: Any = None
        self._gpus: list[Any] = []
        if gpus:
            self._open_gpus(gpus)

    def _open_gpus(self, gpus: Sequence[str]) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._gpus = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in gpus]
        except Exception as error:
            log.info("GPUs are not measured: %s", error)
            self._gpus = []

    def begin(self) -> None:
        """Start measuring CPU utilization in the calling thread."""
        self._psutil.cpu_percent()

    def read(self) -> dict[str, float]:
        memory, disk = self._psutil.virtual_memory(), self._psutil.disk_usage(self._folder)
        values = {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100.0 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
        }
        network = self._psutil.net_io_counters()
        if network is not None and self._network is not None:
            values["network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / 1e6
            values["network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / 1e6
        for i, gpu in enumerate(self._gpus):
            values |= {f"gpu_{i}_{name}": value for name, value in self._read_gpu(gpu).items()}
        return values

    def _read_gpu(self, gpu: Any) -> dict[str, float]:
        values: dict[str, float] = {}
        with contextlib.suppress(self._nvml.NVMLError):
            memory = self._nvml.nvmlDeviceGetMemoryInfo(gpu)
            values["memory_usage_percentage"] = 100.0 * memory.used / memory.total
            values["memory_usage_megabytes"] = memory.used / 1e6
        with contextlib.suppress(self._nvml.NVMLError):
            values["utilization_percentage"] = float(self._nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
        with contextlib.suppress(self._nvml.NVMLError):
            watts = self._nvml.nvmlDeviceGetPowerUsage(gpu) / 1000.0
            values["power_usage_watts"] = watts
            limit = self._nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000.0
            values["power_usage_percentage"] = 100.0 * watts / limit
        return values
