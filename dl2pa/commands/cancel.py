"""`dl2pa cancel`: end jobs, their runs saved first or not."""

from __future__ import annotations

import argparse

from dl2pa.commands.output import note, say
from dl2pa.errors import EXIT_DONE
from launcher import jobs


def run(args: argparse.Namespace) -> int:
    runs = [run_dir for job in args.job for run_dir in jobs.find_runs(job)]
    ids = {run_dir: str(jobs.read_job(run_dir)["job_id"]) for run_dir in runs}
    known = jobs.states(ids.values())
    done: dict[str, str] = {}
    for run_dir, job_id in ids.items():
        state = known[job_id]
        if not state.is_live:
            done[job_id] = f"had ended ({state.state})"
            continue
        (run_dir / "cancelled").touch()  # first: the batch shell looks for it after it has cleared `stop`
        if state.state == "RUNNING" and not args.now:
            (run_dir / "stop").touch()
            done[job_id] = "saving and stopping"
            continue
        if args.now:
            jobs.kill_steps([job_id])
        jobs.cancel([job_id])
        done[job_id] = "cancelled"
    if args.json:
        say({"jobs": [{"job_id": k, "outcome": v} for k, v in done.items()]}, True, "")
    for job_id, outcome in done.items():
        note(f"{job_id}: {outcome}")
    return EXIT_DONE
