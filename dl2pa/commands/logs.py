"""`dl2pa logs`: print the log of a job or a run, errors first."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from dl2pa.commands.options import nonempty_text
from dl2pa.commands.output import note
from dl2pa.commands.run_states import is_local, is_running
from dl2pa.errors import EXIT_DONE, UserError
from dl2pa.rundir import ATTEMPT_LINE, RunDirectory
from launcher import jobs, submissions

_ATTEMPT = re.compile(rf".{{0,40}} dl2pa\.training\.rank_log: {ATTEMPT_LINE}(\d+): ")
_POLL_S = 0.5
_QUERY_SLURM_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", type=nonempty_text, help="job number or run directory")
    parser.add_argument("--rank", type=int, metavar="R", help="show the log of one process")
    parser.add_argument(
        "--attempt", type=int, metavar="N", help="show what one attempt has written to the log of a process"
    )
    parser.add_argument("--follow", action="store_true", help="print new lines until the job has ended")


def run(args: argparse.Namespace) -> int:
    run, path, is_live, name = _select(args)
    if args.attempt is not None and args.follow:
        raise UserError("--follow", True, "not possible with --attempt", "Omit one of them.")
    for text in failures(run) if args.attempt is None else []:
        print(text)  # noqa: T201
    if not path.exists() and not args.follow:
        state = jobs.states([name])[name] if name else None
        remedy = "Wait for it with --follow." if state and state.is_live else "See `dl2pa jobs`."
        detail = f" (job {name}: {state.state})" if state else ""
        raise UserError("log", str(path), f"is not written yet{detail}", remedy)
    if path.exists() and not path.is_file():
        raise UserError("log", str(path), "is not a file", "Remove it, or name another run.")
    line = ""
    try:
        lines = _follow(path, is_live) if args.follow else _lines(path)
        for line in lines if args.attempt is None else _of_attempt(list(lines), args.attempt, path):
            sys.stdout.write(line)
    except KeyboardInterrupt:
        note("the job continues" if name else "the run continues")
    if args.json:
        if line and not line.endswith("\n"):  # a process is writing it, or was killed
            print()  # noqa: T201
        print(json.dumps({"run_dir": str(run.root), "job_id": name, "log": str(path)}))  # noqa: T201
    sys.stdout.flush()
    return EXIT_DONE


def _select(args: argparse.Namespace) -> tuple[RunDirectory, Path, Callable[[], bool], str | None]:
    """The run, its log, whether it is still running, and its job number; None for a run without a job."""
    local = RunDirectory(Path(args.job).absolute())
    rank = 0 if args.attempt is not None else None
    if is_local(local.root):
        rank = 0 if args.rank is None else args.rank
        return local, _rank_log(local, rank), lambda: is_running(local.root), None
    submission = submissions.find_one(args.job)
    run, job_id = RunDirectory(submission.run_dir), submission.job_id
    rank = rank if args.rank is None else args.rank
    path = _rank_log(run, rank) if rank is not None else submission.log
    if path is None:
        raise UserError("job", args.job, f"{run.job} names no log", f"Search {run.submission} for logs.")
    return run, path, lambda: jobs.states([job_id])[job_id].is_live, job_id


def _of_attempt(lines: Sequence[str], attempt: int, path: Path) -> list[str]:
    """Lines that one attempt has written to the log of a rank."""
    numbers = [int(match[1]) if (match := _ATTEMPT.match(line)) else None for line in lines]
    starts = [index for index, number in enumerate(numbers) if number is not None]
    for start, end in zip(starts, [*starts, len(lines)][1:], strict=True):
        if numbers[start] == attempt:
            return list(lines[start:end])
    known = ", ".join(str(numbers[start]) for start in starts) or "none"
    message = f"is not in {path}, which has the attempts {known}"
    raise UserError("--attempt", attempt, message, "Name one of them, or omit --attempt.")


def _rank_log(run: RunDirectory, rank: int) -> Path:
    ranks = run.logged_ranks()
    if rank < 0 or (ranks and rank not in ranks):
        message = f"logs exist for ranks {ranks[0]} to {ranks[-1]}" if ranks else "ranks start at 0"
        raise UserError("--rank", rank, message, "Choose an existing rank.")
    return run.rank_log(rank)


def failures(run: RunDirectory) -> list[str]:
    """Return the error reports of the last launch's ranks and nodes, in time order."""
    reports = [r for r in run.error_reports() if r.get("message") and isinstance(r.get("time"), int | float)]
    if not reports or run.status().get("state") in ("finished", "stopped"):
        return []
    reports.sort(key=lambda r: r["time"])
    last = reports[-1].get("launch")
    texts: list[str] = []
    for report in (r for r in reports if r.get("launch") == last):
        source = f"rank {report['rank']}" if "rank" in report else f"node {report.get('node')}"
        error = str(report.get("traceback") or report["message"]).rstrip()
        texts.append(f"=== {source} on {report.get('host')} failed:\n{error}\n===")
    return texts


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from file


def _follow(path: Path, is_live: Callable[[], bool]) -> Iterator[str]:
    """Yield lines as they are written, until the job or the run has ended."""
    file: TextIO | None = None
    queried = 0.0
    live = True
    try:
        while True:
            if file is None and path.exists():
                file = path.open(encoding="utf-8", errors="replace")
            if file is not None:
                yield from iter(file.readline, "")
                sys.stdout.flush()
            if not live:
                return
            if time.monotonic() - queried > _QUERY_SLURM_S:
                with suppress(ConnectionError):  # SLURM's controller does not answer; the job may still run
                    live = is_live()
                queried = time.monotonic()
            else:
                time.sleep(_POLL_S)
    finally:
        if file is not None:
            file.close()
