"""Pool of concurrent processes on this machine."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dl2pa.process import dl2pa_arguments, environment_without_ranks, private_command, private_input

_POLL_S = 0.1
_MAX_INTERRUPTS = 3
"""Number of Ctrl-C that kills the tasks without waiting for a checkpoint."""
CANNOT_START = 126
"""Exit code of a task that cannot be started, as in a shell."""
_STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Task:
    """A command whose output is appended to a log file.

    Args:
        command: other users of the machine cannot read the arguments of a `dl2pa_command`.
        env: variables in addition to the environment of this process.
    """

    command: Sequence[str]
    log: Path
    env: Mapping[str, str]

    @contextmanager
    def opened(self) -> Generator[tuple[Sequence[str], int]]:
        """Yield the command line to start, and its standard input."""
        arguments = dl2pa_arguments(self.command)
        if arguments is None:
            yield self.command, subprocess.DEVNULL
            return
        with private_input(arguments) as standard_input:
            yield private_command(arguments), standard_input


class Pool:
    """Runs tasks concurrently. A stop signal is forwarded to the running tasks and prevents further starts.

    Args:
        workers: additional environment variables of each worker; each worker runs one task at a time.
    """

    def __init__(self, workers: Sequence[Mapping[str, str]]) -> None:
        self._free = list(range(len(workers)))[::-1]
        self._workers = workers
        self._running: dict[int, tuple[subprocess.Popen[bytes], int]] = {}
        self._interrupts = 0
        self.stopping = False

    def run(
        self,
        tasks: Sequence[Task],
        on_start: Callable[[int], None] = lambda task: None,
        on_end: Callable[[int, int], None] = lambda task, code: None,
        on_poll: Callable[[], None] = lambda: None,
    ) -> list[int | None]:
        """Run the tasks in order; return their exit codes, None for tasks that a stop prevented from starting.

        A task that cannot be started has exit code ``CANNOT_START`` and does not affect the others.

        Args:
            on_start: called with the index of a task before it starts.
            on_end: called with the index and the exit code of a task that has ended.
            on_poll: called while tasks run, several times per second.
        """
        codes: list[int | None] = [None] * len(tasks)
        waiting = list(range(len(tasks)))[::-1]
        with self.handling_signals():
            while self._running or (waiting and not self.stopping):
                while waiting and self.has_room and not self.stopping:
                    number = waiting.pop()
                    on_start(number)
                    try:
                        self.start(number, tasks[number])
                    except OSError:
                        codes[number] = CANNOT_START
                        on_end(number, CANNOT_START)
                for number, code in self.collect():
                    codes[number] = code
                    on_end(number, code)
                on_poll()
                self.wait()
        return codes

    @contextmanager
    def handling_signals(self) -> Generator[None]:
        """Forward stop signals inside; tasks that are still running at the end are killed."""
        previous = {number: signal.signal(number, self._on_signal) for number in _STOP_SIGNALS}
        try:
            yield
        finally:
            for process, _ in self._running.values():
                process.kill()
                process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)

    @property
    def has_room(self) -> bool:
        """Whether a worker is free."""
        return bool(self._free)

    def wait(self) -> None:
        """Wait until tasks may have ended."""
        time.sleep(_POLL_S)

    def start(self, number: int, task: Task) -> None:
        """Start a task on a free worker.

        Raises:
            OSError: it cannot be started.
        """
        worker = self._free[-1]
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("ab") as log, task.opened() as (command, standard_input):
            process = subprocess.Popen(
                command,
                stdin=standard_input,
                stdout=log,
                stderr=log,
                env={**environment_without_ranks(), **task.env, **self._workers[worker]},
                process_group=0,  # Ctrl-C reaches only this process, which forwards it once
            )
        self._running[number] = (process, self._free.pop())
        if self.stopping:  # the signal arrived during the start
            process.terminate()

    def collect(self) -> list[tuple[int, int]]:
        """Return the indices and exit codes of tasks that have ended."""
        codes = [(number, process.poll()) for number, (process, _) in self._running.items()]
        done = [(number, code) for number, code in codes if code is not None]
        for number, _ in done:
            self._free.append(self._running.pop(number)[1])
        return done

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        first, self.stopping = not self.stopping, True
        if self._interrupts >= _MAX_INTERRUPTS:
            self._forward(signal.SIGKILL)
        elif first:
            self._forward(signal.SIGTERM)

    def _forward(self, number: int) -> None:
        for process, _ in list(self._running.values()):
            with suppress(ProcessLookupError):
                process.send_signal(number)
