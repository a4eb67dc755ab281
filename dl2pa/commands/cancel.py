"""`dl2pa cancel`: end jobs, with or without saving first."""

from __future__ import annotations

import argparse
from contextlib import suppress

from dl2pa.commands.options import nonempty_text
from dl2pa.commands.output import note, say
from dl2pa.errors import EXIT_DONE
from dl2pa.rundir import RunDirectory
from launcher import jobs, submissions
from launcher.submissions import Submission


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "job", nargs="+", type=nonempty_text, help="job number, array number or run directory"
    )
    parser.add_argument("--now", action="store_true", help="end at once, without saving")


def run(args: argparse.Namespace) -> int:
    selected = [submission for job in args.job for submission in submissions.find(job)]
    states = jobs.states(submission.job_id for submission in selected)
    outcomes = {s.job_id: end_job(s, states[s.job_id], now=args.now) for s in selected}
    if args.json:
        say({"jobs": [{"job_id": k, "outcome": v} for k, v in outcomes.items()]}, True, "")
    for job_id, outcome in outcomes.items():
        note(f"{job_id}: {outcome}")
    return EXIT_DONE


def end_job(submission: Submission, state: jobs.JobState, *, now: bool) -> str:
    """End one job; return a description of what was done."""
    run, job_id = RunDirectory(submission.run_dir), submission.job_id
    if not state.is_live:
        return f"had already ended ({state.state})"
    with suppress(OSError):  # if the directory is deleted, only the job is ended
        run.cancelled_file.touch()  # first, because the batch script reads it after it has removed `stop`
        if state.state == "RUNNING" and not now:
            run.stop_file.touch()
            return "saving and stopping"
    if now:
        jobs.kill_steps([job_id])
    jobs.cancel([job_id])
    return "cancelled"
