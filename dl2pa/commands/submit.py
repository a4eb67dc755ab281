"""`dl2pa submit`: plan and validate runs, write their snapshots and queue them as SLURM jobs."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dl2pa import envvars
from dl2pa.commands.options import (
    add_config,
    add_grid,
    add_run_dir,
    add_slurm_request,
    check_not_varied,
    check_output_file,
    nonempty_path,
)
from dl2pa.commands.output import note, say
from dl2pa.commands.setting_warnings import note_warnings
from dl2pa.config import dump_config, merge, parse_config
from dl2pa.config.identity import RECIPE_TAG, run_title
from dl2pa.config.places import finder, placed
from dl2pa.config.tracking import sync_command
from dl2pa.errors import EXIT_DONE, UserError
from dl2pa.finished import FinishedRuns
from dl2pa.osutil import LockResult, open_and_lock, open_private, remove_locked
from dl2pa.redaction import redact, redact_tree
from dl2pa.rundir import RunDirectory
from dl2pa.runplan import (
    RunPlan,
    RunSpec,
    check_initial_weights,
    check_resume,
    check_trainings,
    expand,
    plan_runs,
)
from launcher import jobs, site, slurm, submissions
from launcher.request import Request, check_request, seconds_of, with_cores
from launcher.submissions import Submission

REQUEST_OPTIONS = tuple(name for name in Request.__dataclass_fields__ if name not in ("gpu_type", "setup"))
"""Fields of a SLURM request; each is an option of `submit`, `resume` and `sweep`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_run_dir(parser)
    add_grid(parser, "--array")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the sbatch script")
    parser.add_argument(
        "--write-script",
        type=nonempty_path,
        metavar="FILE",
        help="check everything and write a script for `sbatch FILE` by hand; queue nothing",
    )
    add_slurm_request(parser)


def run(args: argparse.Namespace) -> int:
    script = args.write_script
    if script is not None and not os.access(script, os.W_OK):  # an existing file is written in place
        check_output_file("--write-script", script)
    check_not_varied(args.overrides, args.grid or [], "--array")
    specs = expand(args.config, args.overrides, args.grid or [], "--array")
    plans = plan_jobs(specs, args, in_folder=len(specs) > 1, option="--array")
    if args.write_script is not None and len(plans) > 1:
        remedy = "Omit one of them."
        raise UserError("--write-script", str(args.write_script), "cannot be combined with --array", remedy)
    submit(plans, args, args.config.stem, script_file=args.write_script)
    return EXIT_DONE


def plan_jobs(
    specs: Sequence[RunSpec], args: argparse.Namespace, *, in_folder: bool, option: str
) -> list[RunPlan]:
    """Plan runs with the processes per node and the run name that their jobs use.

    Args:
        in_folder, option: as for `plan_runs`.

    Raises:
        UserError: an invalid configuration, or two identical runs.
    """
    gpus = request_of(args).gpus_per_node
    plans = plan_runs(specs, args.run_dir, in_folder=in_folder, gpus=gpus, option=option)
    # The job reads a snapshot with another file name: it needs the run's name and the name of the configuration.
    tags = [{RECIPE_TAG: plan.label} | plan.config.tracking.tags for plan in plans]
    return [
        _with_tracking(plan, run_name=_run_name(plan), tags=tag)
        for plan, tag in zip(plans, tags, strict=True)
    ]


def _run_name(plan: RunPlan) -> str:
    return plan.config.tracking.run_name or run_title(plan.config, plan.label)


def _with_tracking(plan: RunPlan, **changes: Any) -> RunPlan:
    tree = merge(plan.config.model_dump(mode="json"), {"tracking": changes})
    return replace(plan, config=parse_config(tree))


def submit(
    plans: Sequence[RunPlan],
    args: argparse.Namespace,
    name: str,
    sweep: str | None = None,
    parallel: int | None = None,
    script_file: Path | None = None,
) -> None:
    """Validate and queue runs, several as one job array, and print the jobs; with `--dry-run` print the script.

    Args:
        sweep: tag of all runs; by default an array gets a tag with the current time.
        parallel: maximum number of concurrent runs of an array.
        script_file: write a script for one run there instead of queueing it.
    """
    request = request_of(args)
    check_request(request)
    finished = FinishedRuns().among(plans)
    for plan in finished:
        note(f"{plan.run_dir} is finished. For another run, use another --run-dir or configuration.")
    plans = [plan for plan in plans if plan not in finished]
    if not plans:
        if args.json:
            say({"job_id": None, "run_dir": str(finished[0].run_dir), "log": None}, True, "")
        return
    check_runs(plans, request)
    if args.dry_run:
        script = _script(plans, request, name, parallel)
        if args.json:
            say({"run_dirs": [str(plan.run_dir) for plan in plans], "script_text": script}, True, "")
        else:
            print(script)  # noqa: T201
        return
    if script_file is not None:
        _write_hand_script(script_file, plans[0], request, name)
        say({"script": str(script_file)}, args.json, "written; submit it with sbatch:")
        return
    if sweep is None and len(plans) > 1:
        sweep = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    submitted = queue(plans, request, name, sweep, parallel)
    _print_jobs(submitted, plans[0], sweep, args.json)
    note_duration(plans[0].directory, request)


def request_of(args: argparse.Namespace, last: Request | None = None) -> Request:
    """Return the SLURM request of the command line and the site file.

    Args:
        last: request of the last submission of the run.
    """
    return site.resolve(options_of(args), last)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a SLURM request that the command line gives; None if it does not."""
    return {key: getattr(args, key) for key in REQUEST_OPTIONS}


def check_runs(plans: Sequence[RunPlan], request: Request) -> None:
    """Check for every error that would end a job after it has queued; print warnings about settings.

    Raises:
        UserError: naming the invalid field.
    """
    for plan in plans:
        launch = plan.config.launch
        if launch.device == "cuda" and request.gpus_per_node == 0:
            remedy = "Give --gpus-per-node, or launch.device=cpu."
            raise UserError("launch.device", "cuda", "the job requests no GPU", remedy)
        _check_names(plan)
        check_resume(plan)
    with placed(finder([plan.source for plan in plans])):
        data = check_trainings([(plan.config, request.nodes * plan.nproc) for plan in plans])
    for plan in plans:
        check_resume(plan, data[plan.config.data.model_dump_json()])
    check_initial_weights(plans)
    _check_unused(plans)
    slurm.check_with_cluster(_script(plans, request, plans[0].label))
    note_warnings(plans, data)


def note_duration(run: RunDirectory, request: Request) -> None:
    """Print the number of attempts that the rest of the run takes, if an earlier attempt measured its speed."""
    from dl2pa.commands.jobs import seconds_left

    left = seconds_left(run.status(), run)
    limit = seconds_of(request.time) if request.time else None
    if left is None or limit is None:
        return
    attempts = -(-left // (limit - request.stop_before))
    if attempts > 1:
        hours = f"about {left / 3600:.1f} h at the speed of the last attempt"
        note(f"remaining time: {hours}: {attempts:.0f} attempts of {request.time}, requeued automatically")


def _check_names(plan: RunPlan) -> None:
    """Refuse characters in paths that SLURM and submitit expand (%) or that a batch script does not preserve."""
    for field, text in (("run-dir", str(plan.run_dir)), ("config", plan.label), ("folder", str(Path.cwd()))):
        bad = next((c for c in text if c in "%\\" or not c.isprintable()), None)
        if bad is not None:
            remedy = "Choose another name with --run-dir." if field == "run-dir" else f"Rename the {field}."
            raise UserError(field, text, f"contains {bad!r}, which SLURM does not preserve", remedy)


def _check_unused(plans: Sequence[RunPlan]) -> None:
    """Refuse a run directory that cannot be written or that a live job or process uses."""
    from dl2pa.ownership import is_owned

    last = [submissions.last(plan.run_dir) for plan in plans]
    states = jobs.states(submission.job_id for submission in last if submission is not None)
    for plan, submission in zip(plans, last, strict=True):
        plan.directory.check_place()
        if submission is not None and states[submission.job_id].is_live:
            remedy = f"Wait for it, `dl2pa cancel {submission.job_id}`, or choose another --run-dir."
            raise UserError("run-dir", str(plan.run_dir), f"job {submission.job_id} uses it", remedy)
        if plan.run_dir.exists() and is_owned(plan.directory):
            remedy = "Wait for it, stop it, or choose another --run-dir."
            raise UserError("run-dir", str(plan.run_dir), "a process is training in it", remedy)


def _log_folder(plans: Sequence[RunPlan], name: str) -> Path:
    """Folder of submitit's files and the job log: in the run directory, or next to those of an array."""
    if len(plans) == 1:
        return plans[0].directory.submission
    return plans[0].run_dir.parent / f"{name}-array"


def _script(plans: Sequence[RunPlan], request: Request, name: str, parallel: int | None = None) -> str:
    run_dirs, nproc = [plan.run_dir for plan in plans], _processes(plans)
    request, folder = _with_cores(request, plans), _log_folder(plans, name)
    options: dict[str, Any] = {"nproc": nproc, "parallel": parallel, "notify": _notifies(plans)}
    return slurm.script(request, run_dirs, folder, f"dl2pa-{name}", **options)


def _write_hand_script(file: Path, plan: RunPlan, request: Request, name: str) -> None:
    """Write the script of one run that reads the configuration file of the user, with `dl2pa train`."""
    options = [f"launch.nproc={plan.nproc}", "--run-dir", str(plan.run_dir)]
    train = [str(plan.config_file.absolute()), *plan.overrides, *options]
    folder = file.absolute().parent
    request = _with_cores(request, [plan])
    notify = train[: 1 + len(plan.overrides)] if _notifies([plan]) else []
    place = plan.run_dir, folder, f"dl2pa-{name}"
    text = slurm.hand_script(request, *place, train, nproc=plan.nproc, notify=notify)
    try:
        with open_private(file, "w") as script:  # an override can contain the password of a server
            script.write(text)
    except OSError as error:
        message = f"cannot be written ({error.strerror})"
        raise UserError("--write-script", str(file), message, "Choose another file.") from None


def _notifies(plans: Sequence[RunPlan]) -> bool:
    """Whether messages are sent about one of the runs."""
    return any(plan.config.notify.is_active for plan in plans)


def _processes(plans: Sequence[RunPlan]) -> int:
    """Processes per node of the job that trains the runs."""
    return max(plan.nproc for plan in plans)


def _with_cores(request: Request, plans: Sequence[RunPlan]) -> Request:
    configs = [plan.config for plan in plans]
    threads = max(max(config.launch.threads or 1, config.data.threads or 1) for config in configs)
    return with_cores(request, _processes(plans), threads)


def queue(
    plans: Sequence[RunPlan],
    request: Request,
    name: str,
    sweep: str | None = None,
    parallel: int | None = None,
) -> list[Submission]:
    """Write the snapshots and queue the jobs.

    Args:
        sweep: tag of all runs.

    Raises:
        UserError: another process is submitting one of the runs, or SLURM refuses the job.
    """
    from dl2pa.training.environment import code_version

    folder = _log_folder(plans, name)
    if sweep is not None:
        plans = [_with_tracking(plan, tags={"sweep": sweep}) for plan in plans]
    code = code_version()
    with ExitStack() as locks:
        for plan in plans:
            locks.enter_context(_submit_lock(plan.directory))
        _check_unused(plans)
        for plan in plans:
            locks.enter_context(_restored_on_error(_snapshot_files(plan.directory)))
            _write_snapshot(plan, code)
        if len(plans) == 1:
            locks.enter_context(_new_files_removed_on_error(folder))
        run_dirs, nproc = [plan.run_dir for plan in plans], _processes(plans)
        cores = _with_cores(request, plans)
        jobs_of: dict[str, Any] = {"nproc": nproc, "parallel": parallel, "notify": _notifies(plans)}
        ids = slurm.submit(cores, run_dirs, folder, f"dl2pa-{name}", **jobs_of)
        try:
            return [
                _record(plan, job_id, request, folder, code) for plan, job_id in zip(plans, ids, strict=True)
            ]
        except BaseException:
            jobs.cancel(ids)  # a job without a record cannot be found again
            raise


def _record(plan: RunPlan, job_id: str, request: Request, folder: Path, code: dict[str, Any]) -> Submission:
    log = slurm.log_of(job_id, folder)
    submission = Submission(job_id, plan.run_dir, log, request.as_dict(), plan.label, Path.cwd())
    submissions.write(submission, code={k: v for k, v in code.items() if k != "diff"})
    return submission


@contextmanager
def _submit_lock(run: RunDirectory) -> Generator[None]:
    """Refuse a second, concurrent submission of the run."""
    try:
        run.submission.mkdir(parents=True, exist_ok=True)
        descriptor, result = open_and_lock(run.submit_lock)
    except OSError as error:
        message = f"cannot be written ({error.strerror})"
        raise UserError("run-dir", str(run.root), message, "Choose another with --run-dir.") from None
    try:
        if result is LockResult.HELD:
            message = "is being submitted by another process"
            raise UserError("run-dir", str(run.root), message, "Wait for it.")
        yield
    finally:
        if result is LockResult.ACQUIRED:
            remove_locked(run.submit_lock, descriptor)
        os.close(descriptor)


def _snapshot_files(run: RunDirectory) -> list[Path]:
    """Files that a submission writes or removes."""
    return [run.submitted_config, run.submitted_diff, run.job, run.cancelled_file, *run.stall_counters()]


@contextmanager
def _restored_on_error(paths: Sequence[Path]) -> Generator[None]:
    """Restore the files, or their absence, if the block fails: a job that SLURM refuses changes no run."""
    before = {path: (path.read_bytes(), path.stat().st_mode) if path.is_file() else None for path in paths}
    try:
        yield
    except BaseException:
        for path, saved in before.items():
            path.unlink(missing_ok=True)
            if saved is not None:
                with open_private(path, "wb") as file:
                    file.write(saved[0])
                path.chmod(saved[1])
        raise


@contextmanager
def _new_files_removed_on_error(folder: Path) -> Generator[None]:
    """Remove the files that submitit has added to the folder if the block fails."""
    before = set(folder.iterdir())
    try:
        yield
    except BaseException:
        for path in set(folder.iterdir()) - before:
            path.unlink(missing_ok=True)
        raise


def _write_snapshot(plan: RunPlan, code: dict[str, Any]) -> None:
    """Write the resolved configuration and the code version of the job.

    Only the owner can read the files, because the configuration can contain the password of a server. Its tags are
    redacted.
    """
    run = plan.directory
    tree = plan.config.model_dump(mode="json")
    tree["tracking"]["tags"] = redact_tree(tree["tracking"]["tags"])
    with open_private(run.submitted_config, "w") as file:
        file.write(dump_config(parse_config(tree)))
    with open_private(run.submitted_diff, "w") as file:
        file.write(redact(code["diff"] or ""))
    run.cancelled_file.unlink(missing_ok=True)
    for counter in run.stall_counters():
        counter.unlink()


def _print_jobs(submitted: Sequence[Submission], first: RunPlan, sweep: str | None, as_json: bool) -> None:
    rows = [{"job_id": s.job_id, "run_dir": str(s.run_dir), "log": str(s.log)} for s in submitted]
    tracking = first.config.tracking
    uri = tracking.uri or os.environ.get(envvars.TRACKING_URI) or "none"
    is_sent = tracking.enabled and uri != "none"
    result: dict[str, Any] = dict(rows[0])
    if len(rows) > 1:
        result = {
            "job_id": rows[0]["job_id"].partition("_")[0],
            "run_dir": str(first.run_dir.parent),
            "log": str(Path(rows[0]["log"]).parent),
            "jobs": rows,
        }
    if sweep is not None:
        result["sweep"] = sweep
    result["mlflow"] = redact(uri) if is_sent else None
    if as_json:
        say(result, True, "")
        return
    listed = {k: v for k, v in result.items() if k != "jobs"}
    if is_sent:
        listed["mlflow"] = f"{listed['mlflow']}, experiment {tracking.experiment}"
    elif tracking.enabled:
        several = len(rows) > 1
        folder = first.run_dir.parent if several else first.run_dir
        command = sync_command(tracking.uri, folder, every_run=several)
        listed["mlflow"] = f"events are spooled; send them with `{command}`"
    else:
        listed["mlflow"] = "not recorded: tracking.enabled is false"
    say(listed, False, "submitted:" if len(rows) == 1 else f"submitted {len(rows)} runs:")
    for row in rows if len(rows) > 1 else []:
        note(f"  {row['job_id']:<12} {row['run_dir']}")
    sys.stdout.flush()
