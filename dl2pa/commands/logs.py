"""`dl2pa logs`: a job's log, with what went wrong on top."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from dl2pa.commands.output import note
from dl2pa.errors import EXIT_DONE, UserError
from launcher import jobs

_POLL_S = 0.5
_ASK_SLURM_S = 10.0


def run(args: argparse.Namespace) -> int:
    run_dir = jobs.find_run(args.job)
    job = jobs.read_job(run_dir)
    path = Path(job["log"]) if args.rank is None else run_dir / f"logs/rank-{args.rank}.log"
    for text in failures(run_dir):
        print(text)  # noqa: T201
    if not path.exists() and not args.follow:
        state = jobs.states([job["job_id"]])[job["job_id"]]
        remedy = "Wait with --follow." if state.is_live else "See `dl2pa jobs`."
        raise UserError("log", str(path), f"not written yet (job {job['job_id']}: {state.state})", remedy)
    try:
        for line in _follow(path, job["job_id"]) if args.follow else _lines(path):
            sys.stdout.write(line)
    except KeyboardInterrupt:
        note("the job goes on")
    sys.stdout.flush()
    return EXIT_DONE


def failures(run_dir: Path) -> list[str]:
    """What ranks and nodes of the last launch reported before they failed, the first first."""
    from dl2pa.training.rundir import read_json

    reports = [read_json(path) for path in (run_dir / "logs").glob("*.error.json")]
    reports = [r for r in reports if r.get("message")]
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
                live, asked = jobs.states([job_id])[job_id].is_live, time.monotonic()
            else:
                time.sleep(_POLL_S)
    finally:
        if file is not None:
            file.close()
