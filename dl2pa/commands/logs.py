"""`dl2pa logs`: print a job's log, errors first."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from dl2pa.commands.options import nonempty_text
from dl2pa.commands.output import note
from dl2pa.errors import EXIT_DONE, UserError
from dl2pa.rundir import RunDirectory
from launcher import jobs, submissions

_POLL_S = 0.5
_QUERY_SLURM_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", type=nonempty_text, help="job number or run directory")
    parser.add_argument("--rank", type=int, metavar="R", help="show the log of one process")
    parser.add_argument("--follow", action="store_true", help="print new lines until the job has ended")


def run(args: argparse.Namespace) -> int:
    submission = submissions.find_one(args.job)
    run, job_id = RunDirectory(submission.run_dir), submission.job_id
    path = _rank_log(run, args.rank) if args.rank is not None else submission.log
    if path is None:
        raise UserError("job", args.job, f"{run.job} names no log", f"Search {run.submission} for logs.")
    for text in failures(run):
        print(text)  # noqa: T201
    if not path.exists() and not args.follow:
        state = jobs.states([job_id])[job_id]
        remedy = "Wait for it with --follow." if state.is_live else "See `dl2pa jobs`."
        raise UserError("log", str(path), f"is not written yet (job {job_id}: {state.state})", remedy)
    try:
        for line in _follow(path, job_id) if args.follow else _lines(path):
            sys.stdout.write(line)
    except KeyboardInterrupt:
        note("the job continues")
    sys.stdout.flush()
    return EXIT_DONE


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


def _follow(path: Path, job_id: str) -> Iterator[str]:
    """Yield lines as they are written, until the job has ended."""
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
                    live = jobs.states([job_id])[job_id].is_live
                queried = time.monotonic()
            else:
                time.sleep(_POLL_S)
    finally:
        if file is not None:
            file.close()
