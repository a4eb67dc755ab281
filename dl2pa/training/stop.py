"""Stop on request: signals and a stop file set a flag, and all ranks agree on the step at which to stop."""

from __future__ import annotations

import logging
import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import distributed as dist

from dl2pa import fence
from dl2pa.osutil import start_thread
from dl2pa.training.distributed import World

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_FILE_POLL_S = 0.2


class StopMonitor:
    """Lets all ranks agree on stopping without a host sync per step.

    The signal handler only sets a flag. ``poll`` starts an asynchronous all-reduce of the flags on the side group
    and returns the result of the one started a step earlier, so that every rank gets the same answer.
    """

    def __init__(self, world: World, stop_file: Path) -> None:
        self._world = world
        self._stop_file = stop_file
        self._requested = threading.Event()
        self._closing = threading.Event()
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._agreed = False
        self._previous: dict[int, Any] = {}
        self._watcher: threading.Thread | None = None

    def install(self) -> None:
        """Install the signal handlers and watch for the stop file."""
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        if self._world.local_rank == 0:
            self._watcher = start_thread(self._watch_file, "dl2pa-stop")

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop; the other ranks may not have been."""
        return self._requested.is_set()

    def poll(self) -> bool:
        """Whether all ranks have agreed to stop; a collective."""
        if self._agreed:
            return True
        if self._world.size == 1:
            self._agreed = self._requested.is_set()
            return self._agreed
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            self._agreed = bool(flag.item())
            self._pending = None
        if not self._agreed:
            flag = torch.tensor([int(self._requested.is_set())])
            work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._world.side_group, async_op=True)
            self._pending = (work, flag)
        return self._agreed

    def close(self) -> None:
        """Wait for the pending all-reduce and restore the previous signal handlers."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
        self._closing.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._requested.is_set():
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the third Ctrl-C interrupts at once
        self._requested.set()
        fence.check(self._stop_file)
        with suppress(OSError):
            self._stop_file.touch()  # a process that waits for this run directory sees that the run is stopping

    def _watch_file(self) -> None:
        while not self._closing.wait(_FILE_POLL_S if not self._requested.is_set() else 1.0):
            with suppress(MemoryError):
                if self._stop_file.exists():
                    self._requested.set()
