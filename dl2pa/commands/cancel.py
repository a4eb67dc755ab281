"""`dl2pa cancel`: end jobs, their runs saved first or not."""

from __future__ import annotations

import argparse
from contextlib import suppress

from dl2pa.commands.output import note, say
from dl2pa.errors import EXIT_DONE
from launcher import jobs, submissions
from launcher.submissions import Submission


def run(args: argparse.Namespace) -> int:
    found = [submission for job in args.job for submission in submissions.find(job)]
    known = jobs.states(submission.job_id for submission in found)
    done = {s.job_id: _end(s, known[s.job_id], now=args.now) for s in found}
    if args.json:
        say({"jobs": [{"job_id": k, "outcome": v} for k, v in done.items()]}, True, "")
    for job_id, outcome in done.items():
        note(f"{job_id}: {outcome}")
    return EXIT_DONE


def _end(submission: Submission, state: jobs.JobState, *, now: bool) -> str:
    """End one job; returns what was done."""
    run_dir, job_id = submission.run_dir, submission.job_id
    if not state.is_live:
        return f"had ended ({state.state})"
    with suppress(OSError):  # the directory may be gone; the job is ended all the same
        (run_dir / "cancelled").touch()  # first: the batch shell looks for it after it has cleared `stop`
        if state.state == "RUNNING" and not now:
            (run_dir / "stop").touch()
            return "saving and stopping"
    if now:
        jobs.kill_steps([job_id])
    jobs.cancel([job_id])
    return "cancelled"
