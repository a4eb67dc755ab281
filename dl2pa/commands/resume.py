"""`dl2pa resume`: submit a run again from its snapshot, on the same or other resources."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

from dl2pa.commands.options import add_overrides, add_run, add_slurm_request
from dl2pa.commands.output import say
from dl2pa.commands.submit import check_runs, note_duration, queue, request_of
from dl2pa.errors import EXIT_DONE, UserError
from dl2pa.finished import FinishedRuns
from dl2pa.rundir import RunDirectory
from dl2pa.runplan import RunSpec, plan_runs
from launcher import submissions
from launcher.request import Request, check_request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, help="run directory, or number of its last job")
    add_overrides(parser, "train.epochs=200")
    add_slurm_request(parser, resumes=True)


def run(args: argparse.Namespace) -> int:
    last = submissions.find_one(str(args.run))
    if last.cwd.is_dir():
        os.chdir(last.cwd)  # relative paths in the snapshot refer to this folder
    # The job that `after` names has ended.
    request = request_of(args, Request.of({k: v for k, v in last.request.items() if k != "after"}))
    spec = RunSpec(RunDirectory(last.run_dir).submitted_config, tuple(args.overrides))
    (plan,) = plan_runs([spec], last.run_dir, gpus=request.gpus_per_node)
    plan = replace(plan, label=last.name)
    if FinishedRuns().contains(plan):
        remedy = "Train longer, for example train.epochs=200."
        if plan.directory.read_result().get("stopped_early"):
            remedy = f"Train longer with a train.patience of more than {plan.config.train.patience}."
        raise UserError("run", str(last.run_dir), "is finished", remedy)
    check_request(request)
    check_runs([plan], request)
    (submission,) = queue([plan], request, plan.label)
    result = {
        "job_id": submission.job_id,
        "run_dir": str(submission.run_dir),
        "log": str(submission.log),
    }
    say(result, args.json, "submitted again:")
    note_duration(plan.directory, request)
    return EXIT_DONE
