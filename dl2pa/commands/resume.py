"""`dl2pa resume`: submit a run again, from its snapshot, on the same or other resources."""

from __future__ import annotations

import argparse
import os

from dl2pa.commands.output import say
from dl2pa.commands.submit import OPTIONS, Job, check_runs, is_finished, note_duration, queue
from dl2pa.config import load_recorded_config, merge, parse_config
from dl2pa.errors import EXIT_DONE, UserError
from launcher import slurm, submissions


def run(args: argparse.Namespace) -> int:
    last = submissions.find_one(str(args.run))
    snapshot = last.run_dir / "slurm/config.yaml"
    if last.cwd.is_dir():
        os.chdir(last.cwd)  # relative paths in the snapshot mean what they meant
    given = {k: getattr(args, k) for k in OPTIONS}
    # What the first submission waited for is over.
    request = slurm.Request.of({k: v for k, v in last.request.items() if k != "after"}).merged(given)
    config = load_recorded_config(snapshot, args.overrides)
    nproc = request.gpus_per_node or config.launch.nproc
    config = parse_config(merge(config.model_dump(mode="json"), {"launch": {"nproc": nproc}}))
    job = Job(config, last.run_dir, last.name)
    if is_finished(job):
        raise UserError("run", str(last.run_dir), "is finished", "Give more, for example train.epochs=…")
    slurm.check_request(request)
    check_runs([job], request)
    (new,) = queue([job], request, job.name)
    told = {"job_id": new.job_id, "run_dir": str(new.run_dir), "log": str(new.log)}
    say(told, args.json, "submitted again:")
    note_duration(last.run_dir, request)
    return EXIT_DONE
