"""`dl2pa submit`: check a training, leave its snapshot in the run directory, and queue it."""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dl2pa import envvars
from dl2pa.commands.check import check_trainings
from dl2pa.commands.expand import Element, check_distinct, expand, run_name
from dl2pa.commands.output import note, say
from dl2pa.config import (
    Config,
    dump_config,
    fingerprint,
    load_config,
    load_recorded_config,
    merge,
    parse_config,
)
from dl2pa.config.identity import run_title
from dl2pa.errors import EXIT_DONE, UserError
from dl2pa.osutil import open_private
from dl2pa.redaction import redact, redact_tree
from launcher import jobs, slurm, submissions
from launcher.submissions import Submission

OPTIONS = tuple(slurm.Request.__dataclass_fields__)
"""The request's fields, each an option of `submit` and of `resume`."""


@dataclass(frozen=True)
class Job:
    """A run to be: where, under what configuration, called what."""

    config: Config
    run_dir: Path
    name: str


def run(args: argparse.Namespace) -> int:
    elements = expand(args.config, args.overrides, args.array or [])
    planned = plan(elements, args, len(elements) > 1)
    submit(planned, args, args.config.stem)
    return EXIT_DONE


def plan(elements: Sequence[Element], args: argparse.Namespace, is_array: bool) -> list[Job]:
    """The runs to be, each with the configuration the job runs and its directory.

    Args:
        is_array: `--run-dir` names the folder of the runs.

    Raises:
        UserError: a wrong configuration, or two runs that are the same.
    """
    request = request_of(args)
    planned = [_plan(element, request, args.run_dir, is_array) for element in elements]
    check_distinct([job.run_dir for job in planned])
    return planned


def submit(planned: Sequence[Job], args: argparse.Namespace, name: str, sweep: str | None = None) -> None:
    """Check and queue the runs, several as one array, and tell; with `--dry-run` print the script.

    Args:
        sweep: the tag that the runs share; by default arrays have one of their own.
    """
    request = request_of(args)
    slurm.check_request(request)
    check_runs(planned, request)
    finished = [job for job in planned if is_finished(job)]
    for job in finished:
        note(f"{job.run_dir} is finished; for another run give another --run-dir or configuration")
    planned = [job for job in planned if job not in finished]
    if not planned:
        if args.json:
            say({"job_id": None, "run_dir": str(finished[0].run_dir), "log": None}, True, "")
        return
    if args.dry_run:
        folder = _folder_of(planned, name)
        print(slurm.script(request, [_planned(j) for j in planned], folder, f"dl2pa-{name}"))  # noqa: T201
        return
    if sweep is None and len(planned) > 1:
        sweep = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    submitted = queue(planned, request, name, sweep)
    _tell(submitted, planned, sweep, args.json)
    note_duration(planned[0].run_dir, request)


def request_of(args: argparse.Namespace) -> slurm.Request:
    """What the command line asks of the cluster."""
    return slurm.Request().merged({k: getattr(args, k) for k in OPTIONS})


def _plan(element: Element, request: slurm.Request, run_dir: Path | None, is_array: bool) -> Job:
    config = load_config(element.config, element.overrides)
    default = run_name(element.config, config)
    place = Path("runs") / default if run_dir is None else run_dir / default if is_array else run_dir
    stem = element.config.stem
    return Job(_for_job(config, request, stem), place.absolute(), stem)


def _for_job(config: Config, request: slurm.Request, name: str) -> Config:
    """The configuration as the job runs it: its processes and its name."""
    changes = {
        "launch": {"nproc": request.gpus_per_node or config.launch.nproc},
        "tracking": {"run_name": config.tracking.run_name or run_title(config, name)},
    }
    return parse_config(merge(config.model_dump(mode="json"), changes))


def check_runs(planned: Sequence[Job], request: slurm.Request) -> None:
    """Everything that would end a job on the cluster, found before it queues.

    Raises:
        UserError: naming the field at fault.
    """
    from dl2pa.training.distributed import choose_backend

    for job in planned:
        config = job.config
        if config.launch.device == "cuda" and request.gpus_per_node == 0:
            remedy = "Give --gpus-per-node, or launch.device=cpu."
            raise UserError("launch.device", "cuda", "the job asks for no GPU", remedy)
        if config.launch.device == "cpu":
            import torch

            choose_backend(config.launch.backend, torch.device("cpu"))
        _check_name(job)
        _check_continues(job)
    _check_free([job.run_dir for job in planned])
    check_trainings([(job.config, request.nodes * job.config.launch.nproc) for job in planned])
    first = planned[0]
    runs = [_planned(job) for job in planned]
    text = slurm.script(request, runs, _folder_of(planned, first.name), f"dl2pa-{first.name}")
    slurm.check_with_cluster(text)


def note_duration(run_dir: Path, request: slurm.Request) -> None:
    """Say how many attempts the rest will take, where an earlier attempt showed how fast it goes."""
    from dl2pa.commands.jobs import seconds_left
    from dl2pa.rundir import RunDirectory

    left = seconds_left(RunDirectory(run_dir).status(), run_dir)
    limit = slurm.seconds_of(request.time) if request.time else None
    if left is None or limit is None:
        return
    attempts = -(-left // (limit - request.stop_before))
    if attempts > 1:
        hours = f"about {left / 3600:.1f} h at the speed of its last attempt"
        note(f"the rest takes {hours}: {attempts:.0f} attempts of {request.time}, requeued in between")


def _check_name(job: Job) -> None:
    """SLURM and submitit expand % in the names of files, and \\ and control characters do not survive a script."""
    for field, text in (("run-dir", str(job.run_dir)), ("config", job.name), ("folder", str(Path.cwd()))):
        bad = next((c for c in text if c in "%\\" or not c.isprintable()), None)
        if bad is not None:
            remedy = "Choose another name with --run-dir." if field == "run-dir" else f"Rename the {field}."
            raise UserError(field, text, f"holds {bad!r}, which SLURM does not keep as it is", remedy)


def _check_free(run_dirs: Sequence[Path]) -> None:
    from dl2pa.ownership import is_owned
    from dl2pa.rundir import RunDirectory

    last = {run_dir: submissions.read(run_dir) for run_dir in run_dirs}
    known = jobs.states(s.job_id for s in last.values() if s is not None)
    for run_dir, submission in last.items():
        RunDirectory(run_dir).check_place()
        if submission is not None and known[submission.job_id].is_live:
            remedy = f"Wait for it, `dl2pa cancel {submission.job_id}`, or choose another --run-dir."
            raise UserError("run-dir", str(run_dir), f"job {submission.job_id} has it", remedy)
        if run_dir.exists() and is_owned(RunDirectory(run_dir)):
            remedy = "Wait for it, stop it, or choose another --run-dir."
            raise UserError("run-dir", str(run_dir), "a process is training in it", remedy)


def _check_continues(job: Job) -> None:
    """A directory that holds another training is refused here, not by the job."""
    from dl2pa.rundir import RunDirectory
    from dl2pa.training.checkpoint import CheckpointStore
    from dl2pa.training.compatibility import check_resumable, identity_of

    run = RunDirectory(job.run_dir)
    steps = CheckpointStore(run.checkpoints, 1, False).steps()
    if not run.config.is_file() or not steps:
        return
    check_resumable(identity_of(load_recorded_config(run.config)), identity_of(job.config))
    limit = job.config.train.max_steps
    if limit is not None and limit < steps[-1]:
        remedy = f"Give at least {steps[-1]}."
        raise UserError("train.max_steps", limit, f"the run is at step {steps[-1]}", remedy)


def is_finished(job: Job) -> bool:
    """Whether the run is done and its configuration asks for nothing beyond."""
    from dl2pa.rundir import RunDirectory

    run = RunDirectory(job.run_dir)
    status = run.status()
    done = status.get("state") == "finished" and status.get("fingerprint") == fingerprint(job.config)
    return done and run.model.exists()


def _folder_of(planned: Sequence[Job], name: str) -> Path:
    """Where submitit and the job's log go: in the run, or beside an array's runs."""
    if len(planned) == 1:
        return planned[0].run_dir / "slurm"
    return planned[0].run_dir.parent / f"{name}-array"


def _planned(job: Job) -> slurm.Planned:
    return slurm.Planned(job.run_dir, job.run_dir / "slurm/config.yaml", job.config.launch.nproc)


def queue(
    planned: Sequence[Job], request: slurm.Request, name: str, sweep: str | None = None
) -> list[Submission]:
    """Write the snapshots and queue the jobs.

    Args:
        sweep: the tag that the runs share, if they do.

    Raises:
        UserError: somebody else submits the same run, or SLURM refuses.
    """
    from dl2pa.training.environment import code_version

    folder = _folder_of(planned, name)
    if sweep is not None:
        planned = [_tagged(job, sweep) for job in planned]
    code = code_version()
    with ExitStack() as locks:
        for job in planned:
            locks.enter_context(_submitting(job.run_dir))
        _check_free([job.run_dir for job in planned])
        for job in planned:
            _snapshot(job, code)
        ids = slurm.submit(request, [_planned(job) for job in planned], folder, f"dl2pa-{name}")
        try:
            return [
                _noted(job, job_id, request, folder, code) for job, job_id in zip(planned, ids, strict=True)
            ]
        except BaseException:
            jobs.cancel(ids)  # nobody would find them
            raise


def _noted(job: Job, job_id: str, request: slurm.Request, folder: Path, code: dict[str, Any]) -> Submission:
    log = slurm.log_of(job_id, folder)
    submission = Submission(job_id, job.run_dir, log, request.as_dict(), job.name, Path.cwd())
    submissions.write(submission, code={k: v for k, v in code.items() if k != "diff"})
    return submission


def _tagged(job: Job, sweep: str) -> Job:
    tree = merge(job.config.model_dump(mode="json"), {"tracking": {"tags": {"sweep": sweep}}})
    return Job(parse_config(tree), job.run_dir, job.name)


@contextmanager
def _submitting(run_dir: Path) -> Generator[None]:
    """Only one submission of a run at a time."""
    place = run_dir / "slurm"
    try:
        place.mkdir(parents=True, exist_ok=True)
        file = (place / "submit.lock").open("a+", encoding="utf-8")
    except OSError as error:
        message = f"cannot be written ({error.strerror})"
        raise UserError("run-dir", str(run_dir), message, "Choose another with --run-dir.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            remedy = "Wait for it."
            raise UserError(
                "run-dir", str(run_dir), "is being submitted by another process", remedy
            ) from None
        yield


def _without_secret_tags(config: Config) -> Config:
    """The configuration as the job needs it: the server's address whole, the tags as they will be recorded."""
    tree = config.model_dump(mode="json")
    tree["tracking"]["tags"] = redact_tree(tree["tracking"]["tags"])
    return parse_config(tree)


def _snapshot(job: Job, code: dict[str, Any]) -> None:
    """What the job runs: the resolved configuration (readable by its owner only: it may name a server with its
    password) and the code's version."""
    place = job.run_dir / "slurm"
    with open_private(place / "config.yaml", "w") as file:
        file.write(dump_config(_without_secret_tags(job.config)))
    with open_private(place / "code.diff", "w") as file:
        file.write(redact(code["diff"] or ""))
    (job.run_dir / "cancelled").unlink(missing_ok=True)
    for counter in place.glob("without-progress.*"):
        counter.unlink()


def _tell(submitted: Sequence[Submission], planned: Sequence[Job], sweep: str | None, as_json: bool) -> None:
    shown = [{"job_id": s.job_id, "run_dir": str(s.run_dir), "log": str(s.log)} for s in submitted]
    tracking = planned[0].config.tracking
    uri = tracking.uri or os.environ.get(envvars.TRACKING_URI) or "none"
    spools = not tracking.enabled or uri == "none"
    result: dict[str, Any] = dict(shown[0])
    if len(shown) > 1:
        result = {
            "job_id": shown[0]["job_id"].partition("_")[0],
            "run_dir": str(planned[0].run_dir.parent),
            "log": str(Path(shown[0]["log"]).parent),
            "jobs": shown,
        }
    if sweep is not None:
        result["sweep"] = sweep
    result["mlflow"] = None if spools else redact(uri)
    if as_json:
        say(result, True, "")
        return
    listed = {k: v for k, v in result.items() if k != "jobs"}
    if spools:
        listed["mlflow"] = f"events are spooled; `dl2pa sync {planned[0].run_dir}` sends them"
    else:
        listed["mlflow"] = f"{listed['mlflow']}, experiment {tracking.experiment}"
    say(listed, False, "submitted:" if len(shown) == 1 else f"submitted {len(shown)} runs:")
    for fields in shown if len(shown) > 1 else []:
        note(f"  {fields['job_id']:<12} {fields['run_dir']}")
    sys.stdout.flush()
