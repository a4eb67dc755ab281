"""`python -m dl2pa.notify`: the process that sends the messages of one run for its supervisor.

The supervisor is `dl2pa train` on one machine, and the batch script of a SLURM job (`launcher/supervise.sh`). When the
run has ended it writes one line to standard input, `EVENT MESSAGE`, and closes it. Until then this process watches for
a stall. An error in this process is printed as one line on standard error and does not affect the training.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from dl2pa import envvars
from dl2pa.config import Config, load_config, load_recorded_config, parse_config
from dl2pa.console import safe_output
from dl2pa.errors import UserError
from dl2pa.notify.events import announce
from dl2pa.notify.message import EVENTS, FAILED, FINISHED, STALLED
from dl2pa.notify.stall import StallWatch
from dl2pa.ownership import seems_alive
from dl2pa.rundir import RunDirectory

_MAX_POLL_S = 10.0
_ENDING_S = 10.0
_DIED = "its process ended without an error message: it was killed, or the machine had no memory left"


def main(argv: Sequence[str] | None = None) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, _ignore)  # the supervisor decides when this process ends
    parser = argparse.ArgumentParser(prog="python -m dl2pa.notify")
    parser.add_argument("config", nargs="?", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument(
        "--local", action="store_true", help="the first line of the input is the configuration"
    )
    args = parser.parse_args(argv)
    with safe_output():
        try:
            _serve(args)
        except Exception as error:
            print(f"dl2pa: no more messages are sent: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
    return 0


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Handler in place of SIG_IGN, which the program of `notify.command` would inherit."""


def _serve(args: argparse.Namespace) -> None:
    run = RunDirectory(args.run_dir)
    lines = _Lines()
    given: dict[str, Any] = {}
    if args.local:
        given = json.loads(next(lines.until(None), None) or "{}")
    config = _load(args, given)
    if config is None or not config.notify.is_active:
        return
    sender = _Sender(run, config, local=args.local, before=int(given.get("attempt", 0)))
    sender.serve(lines)


def _load(args: argparse.Namespace, given: dict[str, Any]) -> Config | None:
    """The configuration; None if the training, which reports the reason, cannot load it either."""
    try:
        if args.local:
            return parse_config(given.get("config", {}))
        if args.config is None:
            return load_recorded_config(RunDirectory(args.run_dir).submitted_config)
        return load_config(args.config, args.overrides)
    except UserError:
        return None


class _Lines:
    """Lines of standard input, read without blocking longer than asked for."""

    def __init__(self) -> None:
        self._rest = b""
        self._ended = False

    def until(self, seconds: float | None) -> Generator[str | None]:
        """Yield each line, and None whenever none has come for a time; ends at the end of the input."""
        while True:
            line, separator, rest = self._rest.partition(b"\n")
            if separator or (self._ended and line):
                self._rest = rest
                yield line.decode(errors="replace")
            elif self._ended:
                return
            elif select.select([0], [], [], seconds)[0]:
                data = os.read(0, 65536)
                self._rest += data
                self._ended = not data
            else:
                yield None


class _Sender:
    """Sends the messages of one run.

    Args:
        local: the supervisor is `dl2pa train`; if it is killed, this process announces that.
        before: number of attempts before this one.
    """

    def __init__(self, run: RunDirectory, config: Config, *, local: bool, before: int) -> None:
        self._run = run
        self._notify = config.notify
        self._name = config.tracking.run_name or run.root.absolute().name
        self._local = local
        self._before = before
        self._parent = os.getppid()

    def serve(self, lines: _Lines) -> None:
        """Send messages until the supervisor has closed the input or has died."""
        after = self._notify.stalled_after_s
        watch = StallWatch(self._run, after)
        pause = min(_MAX_POLL_S, max(0.05, after / 10)) if after else _MAX_POLL_S
        ended = False
        for line in lines.until(pause):
            if line is None:
                self._report_stall(watch)
                if os.getppid() != self._parent:  # a process that it forked may keep the input open
                    break
                continue
            event, _, detail = line.partition(" ")
            ended = True
            if event in EVENTS:
                self._announce(event, detail)
        if self._local and not ended:
            self._report_death()

    def _report_stall(self, watch: StallWatch) -> None:
        seconds = watch.check()
        if seconds is not None:
            status = self._run.status()
            step, total = status.get("step", 0), status.get("total_steps", "?")
            minutes = f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
            self._announce(STALLED, f"no progress for {minutes}, at step {step} of {total}")

    def _report_death(self) -> None:
        """Announce the end of a run whose supervisor was killed, unless it had stopped or another one owns it."""
        deadline = time.monotonic() + _ENDING_S  # its processes end with it, but not in the same moment
        while seems_alive(self._run) and time.monotonic() < deadline:
            time.sleep(0.1)
        status = self._run.status()
        if (
            status.get("attempt", 0) <= self._before
            or status.get("state") == "stopped"
            or seems_alive(self._run)
        ):
            return
        if status.get("state") == "finished":
            self._announce(FINISHED, "")
        else:
            self._announce(FAILED, str(status.get("error") or _DIED))

    def _announce(self, event: str, detail: str) -> None:
        status = self._run.status()
        key = f"{event}-{status.get('attempt', 0)}"
        if event == STALLED:
            key += f"-{status.get('step', 0)}"
        elif event != FINISHED and "SLURM_JOB_ID" in os.environ:
            # A job can fail before its attempt is counted. A requeue keeps the number of the job.
            key += f"-{os.environ['SLURM_JOB_ID']}"
            detail = self._with_error(detail)
        for problem in announce(self._run, self._notify, event, detail, self._name, key):
            print(f"dl2pa: the message {event!r} was not delivered: {problem}", file=sys.stderr)  # noqa: T201

    def _with_error(self, detail: str) -> str:
        """Add the first error that a rank or node of this launch reported."""
        launch = os.environ.get(envvars.LAUNCH)
        reports = [r for r in self._run.error_reports() if r.get("launch") == launch]
        first = min(reports, key=lambda report: report.get("time") or 0.0, default=None)
        return f"{detail}: {first['message']}" if first else detail


if __name__ == "__main__":
    sys.exit(main())
