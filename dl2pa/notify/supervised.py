"""Start the process that sends the messages of a run, and pass it the outcome."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

from dl2pa.config import Config
from dl2pa.errors import EXIT_DONE, EXIT_STOPPED, TakenOver
from dl2pa.notify.deliver import longest_delivery_s
from dl2pa.notify.message import FAILED, FINISHED, NO_EVENT
from dl2pa.process import environment_without_ranks
from dl2pa.rundir import RunDirectory

log = logging.getLogger(__name__)


def train_announced(config: Config, run: RunDirectory, train: Callable[[], int]) -> int:
    """Train and have the messages of `notify.*` sent by a process of its own; returns the exit code of `train`.

    A message that cannot be sent only prints a line.
    """
    before = int(run.status().get("attempt", 0))
    process = _start(config, run, before)
    if process is None:
        return train()
    verdict = NO_EVENT
    try:
        code = train()
        verdict = _verdict_of(code)
        return code
    except Exception as error:
        verdict = f"{FAILED} {error}"
        if isinstance(error, TakenOver) or run.status().get("attempt", 0) <= before:
            verdict = NO_EVENT  # refused before the attempt began: the run is as it was
        raise
    finally:
        _end(process, verdict, longest_delivery_s(config.notify) + 5.0)


def _verdict_of(code: int) -> str:
    if code == EXIT_DONE:
        return FINISHED
    return NO_EVENT if code == EXIT_STOPPED else f"{FAILED} exit code {code}; see the logs"


def _start(config: Config, run: RunDirectory, before: int) -> subprocess.Popen[bytes] | None:
    """Start the process; the configuration goes through its standard input, because others can see its arguments."""
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dl2pa.notify", "--local", "--run-dir", str(run.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment_without_ranks(),
            start_new_session=True,  # Ctrl-C must not end it before it has sent its message
        )
        _write(process, json.dumps({"config": config.model_dump(mode="json"), "attempt": before}))
        return process
    except OSError as error:
        log.warning("no messages are sent (%s); training continues", error)
        return None


def _write(process: subprocess.Popen[bytes], text: str) -> None:
    assert process.stdin is not None
    process.stdin.write(" ".join(text.splitlines()).encode(errors="replace") + b"\n")
    process.stdin.flush()


def _end(process: subprocess.Popen[bytes], verdict: str, wait_s: float) -> None:
    """Write the outcome to the process and wait for the delivery, for a limited time."""
    with suppress(OSError):
        _write(process, verdict)
    with suppress(OSError):
        assert process.stdin is not None
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(wait_s)
