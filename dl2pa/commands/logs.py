"""`dl2pa logs`: a job's log, with what went wrong on top."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from dl2pa.commands.output import note
from dl2pa.errors import EXIT_DONE, UserError
from launcher import jobs, submissions

_POLL_S = 0.5
_ASK_SLURM_S = 10.0


def run(args: argparse.Namespace) -> int:
    submission = submissions.find_one(args.job)
    run_dir, job_id = submission.run_dir, submission.job_id
    path = _rank_log(run_dir, args.rank) if args.rank is not None else submission.log
    if path is None:
        raise UserError("job", args.job, f"{submissions.JOB_FILE} names no log", "See RUN/slurm/.")
    for text in failures(run_dir):
        print(text)  # noqa: T201
    if not path.exists() and not args.follow:
        state = jobs.states([job_id])[job_id]
        remedy = "Wait with --follow." if state.is_live else "See `dl2pa jobs`."
        raise UserError("log", str(path), f"not written yet (job {job_id}: {state.state})", remedy)
    try:
        for line in _follow(path, job_id) if args.follow else _lines(path):
            sys.stdout.write(line)
    except KeyboardInterrupt:
        note("the job goes on")
    sys.stdout.flush()
    return EXIT_DONE


def _rank_log(run_dir: Path, rank: int) -> Path:
    there = sorted(int(p.stem.removeprefix("rank-")) for p in (run_dir / "logs").glob("rank-*.log"))
    if rank < 0 or (there and rank not in there):
        shown = f"there are logs of ranks {there[0]} to {there[-1]}" if there else "ranks count from 0"
        raise UserError("--rank", rank, shown, "Choose one of them.")
    return run_dir / f"logs/rank-{rank}.log"


def failures(run_dir: Path) -> list[str]:
    """What ranks and nodes of the last launch reported before they failed, the first first."""
    from dl2pa.osutil import read_json

    reports = [read_json(path) for path in (run_dir / "logs").glob("*.error.json")]
    reports = [r for r in reports if r.get("message") and isinstance(r.get("time"), int | float)]
    if not reports or read_json(run_dir / "status.json").get("state") in ("finished", "stopped"):
        return []
    last = max(reports, key=lambda r: r.get("time", 0.0)).get("launch")
    found: list[str] = []
    for report in sorted((r for r in reports if r.get("launch") == last), key=lambda r: r.get("time", 0.0)):
        who = f"rank {report['rank']}" if "rank" in report else f"node {report.get('node')}"
        what = report.get("traceback") or report["message"]
        found.append(f"=== {who} on {report.get('host')} failed:\n{str(what).rstrip()}\n===")
    return found


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from file


def _follow(path: Path, job_id: str) -> Iterator[str]:
    """Lines as they are written, until the job has ended."""
    file: TextIO | None = None
    asked = 0.0
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
            if time.monotonic() - asked > _ASK_SLURM_S:
                with suppress(ConnectionError):  # the controller is away: the job is not
                    live = jobs.states([job_id])[job_id].is_live
                asked = time.monotonic()
            else:
                time.sleep(_POLL_S)
    finally:
        if file is not None:
            file.close()
