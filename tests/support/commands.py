"""Run a dl2pa command in the test process, to avoid importing torch again."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


@dataclass(frozen=True)
class Completed:
    """Exit code and captured text of a command."""

    code: int
    output: str
    error: str

    @property
    def result(self) -> Any:
        """The JSON value on the last line of standard output."""
        return json.loads(self.output.splitlines()[-1])


def run_here(
    *arguments: object, env: Mapping[str, str] | None = None, folder: Path | None = None
) -> Completed:
    """Call ``dl2pa.cli.main`` with these arguments.

    Args:
        env: environment variables set for the command.
        folder: current directory of the command.
    """
    from dl2pa.cli import main

    words = [str(argument) for argument in arguments]
    output, error = io.StringIO(), io.StringIO()
    with (
        process_state_restored(),
        contextlib.chdir(folder or Path.cwd()),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(error),
    ):
        os.environ.update(env or {})
        sys.argv = ["dl2pa", *words]
        try:
            code = main(words)
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return Completed(code, output.getvalue(), error.getvalue())


@contextlib.contextmanager
def process_state_restored() -> Generator[None]:
    """Restore the process state that a command changes: log handlers, threads, environment, signals."""
    import torch

    root = logging.getLogger()
    handlers, level, threads = list(root.handlers), root.level, torch.get_num_threads()
    deterministic = torch.get_deterministic_debug_mode()
    environment, arguments = dict(os.environ), list(sys.argv)
    signals = {number: signal.getsignal(number) for number in _SIGNALS}
    root.handlers = []
    try:
        yield
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers = handlers
        root.setLevel(level)
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(deterministic)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = arguments
        for number, handler in signals.items():
            signal.signal(number, handler)
