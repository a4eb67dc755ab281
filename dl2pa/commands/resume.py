"""`dl2pa resume`: submit a run again, from its snapshot, on the same or other resources."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dl2pa.commands.output import say
from dl2pa.commands.submit import OPTIONS, Job, check_runs, note_duration, queue
from dl2pa.config import load_config, merge, parse_config
from dl2pa.errors import EXIT_DONE, UserError
from launcher import jobs, slurm


def run(args: argparse.Namespace) -> int:
    from dl2pa.training.rundir import RunDirectory

    run_dir = jobs.find_run(str(args.run))
    last = jobs.read_job(run_dir)
    if RunDirectory(run_dir).status().get("state") == "finished" and not args.overrides:
        raise UserError("run", str(run_dir), "is finished", "Give more, for example train.epochs=…")
    snapshot = run_dir / "slurm/config.yaml"
    cwd = Path(last.get("cwd", "."))
    if cwd.is_dir():
        os.chdir(cwd)  # relative paths in the snapshot mean what they meant
    request = slurm.Request(**last["request"]).merged({k: getattr(args, k) for k in OPTIONS})
    config = load_config(snapshot, args.overrides)
    nproc = request.gpus_per_node or config.launch.nproc
    config = parse_config(merge(config.model_dump(mode="json"), {"launch": {"nproc": nproc}}))
    job = Job(config, run_dir, str(last.get("name", run_dir.name)))
    slurm.check_request(request)
    check_runs([job], request)
    (fields,) = queue([job], request, job.name)
    note_duration(run_dir, request)
    say({k: fields[k] for k in ("job_id", "run_dir", "log")}, args.json, "submitted again:")
    return EXIT_DONE
