"""Several trainings at a time on this machine, each a process of its own, stopped together."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dl2pa.process import environment_without_ranks

_POLL_S = 0.1
_IMPATIENT = 3
"""Ctrl-C so often does not wait for a save."""
CANNOT_START = 126
"""As a shell says it of a command that cannot be executed."""
_STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Task:
    """A command whose output goes to the end of a file.

    Args:
        env: what its environment has beyond this process's.
    """

    command: Sequence[str]
    log: Path
    env: Mapping[str, str]


class Pool:
    """Runs tasks, so many at once. A stop signal is passed on to all of them, and no further one starts.

    Args:
        places: what the environment has beyond a task's own in each of the places, of which there are as many as
            tasks that run at once.
    """

    def __init__(self, places: Sequence[Mapping[str, str]]) -> None:
        self._free = list(range(len(places)))[::-1]
        self._places = places
        self._running: dict[int, tuple[subprocess.Popen[bytes], int]] = {}
        self._interrupts = 0
        self.stopping = False

    def run(
        self,
        tasks: Sequence[Task],
        started: Callable[[int], None] = lambda task: None,
        ended: Callable[[int, int], None] = lambda task, code: None,
    ) -> list[int | None]:
        """Run the tasks in their order; returns each one's exit code, None where a stop came before its start.

        A task that cannot be started counts as ended with ``CANNOT_START``; the others go on.

        Args:
            started: told of a task that is about to start.
            ended: told of one that has ended, and of its exit code.
        """
        codes: list[int | None] = [None] * len(tasks)
        waiting = list(range(len(tasks)))[::-1]
        previous = {number: signal.signal(number, self._on_signal) for number in _STOP_SIGNALS}
        try:
            while self._running or (waiting and not self.stopping):
                while waiting and self._free and not self.stopping:
                    number = waiting.pop()
                    started(number)
                    try:
                        self._start(number, tasks[number])
                    except OSError:
                        codes[number] = CANNOT_START
                        ended(number, CANNOT_START)
                for number, code in self._collect():
                    codes[number] = code
                    ended(number, code)
                time.sleep(_POLL_S)
        finally:
            for process, _ in self._running.values():
                process.kill()
                process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return codes

    def _start(self, number: int, task: Task) -> None:
        place = self._free[-1]
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("ab") as log:
            process = subprocess.Popen(
                task.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**environment_without_ranks(), **task.env, **self._places[place]},
                process_group=0,  # a terminal's Ctrl-C reaches this process alone, which passes it on once
            )
        self._running[number] = (process, self._free.pop())
        if self.stopping:  # the signal came while it started
            process.terminate()

    def _collect(self) -> list[tuple[int, int]]:
        """Take up what has ended: numbers and exit codes."""
        codes = [(number, process.poll()) for number, (process, _) in self._running.items()]
        done = [(number, code) for number, code in codes if code is not None]
        for number, _ in done:
            self._free.append(self._running.pop(number)[1])
        return done

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        first, self.stopping = not self.stopping, True
        if self._interrupts >= _IMPATIENT:
            self._pass_on(signal.SIGKILL)
        elif first:
            self._pass_on(signal.SIGTERM)

    def _pass_on(self, number: int) -> None:
        for process, _ in list(self._running.values()):
            with suppress(ProcessLookupError):
                process.send_signal(number)
