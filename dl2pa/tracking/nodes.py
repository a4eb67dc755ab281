"""What each node does while the run goes on: processor, memory, disk, network, GPUs, in MLflow's own names.

A thread of each node's first rank measures. Rank 0's points go into the run's spool; every other node appends
to ``RUN/events/system-N.jsonl``, and rank 0 takes them over from there, with the times they were measured at.
The spool keeps each (name, step) once, so taking them over again changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dl2pa.rundir import RunDirectory
from dl2pa.tracking.spool import now_ms, read_events

log = logging.getLogger(__name__)

_READINGS = 5
"""Of which a point is the mean."""
_SLOWER_AFTER = 1000
"""Points after which the interval doubles: a run of weeks stays small."""


class Write(Protocol):
    """Takes the values measured at a step and a time (ms)."""

    def __call__(self, step: int, values: Mapping[str, Any], time_ms: int) -> None: ...


class OtherNodes:
    """Takes over what other nodes have left, each line once."""

    def __init__(self, run_dir: Path) -> None:
        self._pattern = RunDirectory(run_dir).node_metrics("*")
        self._offsets: dict[Path, int] = {}

    def collect(self, write: Write) -> None:
        """Hand on the lines that are new since the last call."""
        for path in sorted(self._pattern.parent.glob(self._pattern.name)):
            for event, end in read_events(path, self._offsets.get(path, 0)):
                self._offsets[path] = end
                if event is not None and event["e"] == "metrics":
                    write(event["step"], event["v"], event["t"])


class NodeFile:
    """Appends one node's points; a disk that refuses them is said once."""

    def __init__(self, run_dir: Path, node: int, attempt: int) -> None:
        self._path = RunDirectory(run_dir).node_metrics(node)
        self._attempt = attempt
        self._refused = False

    def write(self, step: int, values: Mapping[str, Any], time_ms: int) -> None:
        event = {"e": "metrics", "t": time_ms, "a": self._attempt, "step": step, "v": dict(values)}
        line = json.dumps(event, separators=(",", ":")) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                # A line that a kill or a full disk cut short ends here and is passed over by the reader.
                torn = file.tell() > 0 and not _ends_a_line(self._path)
                file.write((b"\n" if torn else b"") + line.encode())
        except OSError as error:
            if not self._refused:
                log.warning("%s takes no points (%s); training goes on", self._path, error)
            self._refused = True


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


class NodeWatch(threading.Thread):
    """Measures a node every so often until stopped. A daemon; whatever fails in it ends only itself.

    Args:
        node: number of the node.
        write: takes the points; ``system/node-N/...``.
        also: called after each point; rank 0 takes over the other nodes' there.
        started_ms: when the run began; a point's step is the whole seconds since, so that attempts follow on.
        every: seconds between points, at first.
        gpus: UUIDs of the GPUs that the run uses on this node.
        folder: the run's, whose disk is measured.
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
        # A thread that imports while another forks would leave the child a lock that nobody opens.
        self._machine = _Machine(gpus, folder)
        self._node = node
        self._write = write
        self._also = also
        self._started_ms = started_ms
        self._every = every
        self._end = threading.Event()

    def run(self) -> None:
        try:
            self._machine.begin()
            points = 0
            pause = min(1.0, self._every)  # a short run has a point too
            while not (points and self._end.is_set()):  # one point at least, however late the thread begins
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
            log.warning("the node is no longer measured (%s); training goes on", error)

    def _record(self, readings: Sequence[Mapping[str, float]]) -> None:
        time_ms = now_ms()
        step = max(0, time_ms - self._started_ms) // 1000
        prefix = f"system/node-{self._node}/"
        self._write(step, {prefix + k: v for k, v in _means(readings).items()}, time_ms)
        self._also()

    def stop(self) -> None:
        """Take a last point and end; waits a moment for it."""
        self._end.set()
        if self.is_alive():
            self.join(timeout=5)


def _means(readings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    found: defaultdict[str, list[float]] = defaultdict(list)
    for reading in readings:
        for name, value in reading.items():
            found[name].append(value)
    # What was carried over the network is a total, not a level.
    return {
        name: values[-1] if name.startswith("network") else round(sum(values) / len(values), 2)
        for name, values in found.items()
    }


class _Machine:
    """Readings of this node. Raises ImportError without psutil; GPUs need NVML."""

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
        """The processor's share is counted from here on, for the thread that asks."""
        self._psutil.cpu_percent()

    def read(self) -> dict[str, float]:
        memory, disk = self._psutil.virtual_memory(), self._psutil.disk_usage(self._folder)
        found = {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": 100.0 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
        }
        network = self._psutil.net_io_counters()
        if network is not None and self._network is not None:
            found["network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / 1e6
            found["network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / 1e6
        for i, gpu in enumerate(self._gpus):
            found |= {f"gpu_{i}_{name}": value for name, value in self._read_gpu(gpu).items()}
        return found

    def _read_gpu(self, gpu: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        with contextlib.suppress(self._nvml.NVMLError):
            memory = self._nvml.nvmlDeviceGetMemoryInfo(gpu)
            found["memory_usage_percentage"] = 100.0 * memory.used / memory.total
            found["memory_usage_megabytes"] = memory.used / 1e6
        with contextlib.suppress(self._nvml.NVMLError):
            found["utilization_percentage"] = float(self._nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
        with contextlib.suppress(self._nvml.NVMLError):
            watts = self._nvml.nvmlDeviceGetPowerUsage(gpu) / 1000.0
            found["power_usage_watts"] = watts
            limit = self._nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000.0
            found["power_usage_percentage"] = 100.0 * watts / limit
        return found
