"""`dl2pa train`: plan and validate a run, then train in this process or under torchrun.

torchrun starts the same command once per rank. In a SLURM job the command runs once per node, and the torchruns of all
nodes form one training.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from dl2pa import envvars
from dl2pa.commands.next_steps import next_steps
from dl2pa.commands.options import add_config, add_run_dir
from dl2pa.commands.output import note, say
from dl2pa.config.places import finder, placed
from dl2pa.config.prototypes import check_source
from dl2pa.errors import (
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    TRANSIENT_FIELDS,
    TakenOver,
    TrainingFailure,
    UserError,
)
from dl2pa.finished import FinishedRuns
from dl2pa.gpus import visible_gpus
from dl2pa.process import die_with_parent, note_command, torchrun_ranks
from dl2pa.recorded_run import restore_submission
from dl2pa.rundir import RunDirectory
from dl2pa.runplan import (
    RunPlan,
    RunSpec,
    check_contents,
    check_initial_weights,
    check_resume,
    facts_of,
    plan_runs,
)
from launcher.meeting import NodesMissing, meet
from launcher.node import Node, listen_again, shared_secret, this_node

if TYPE_CHECKING:
    from dl2pa.training.data import DataSplits


_RANK_MODULES = (
    *("dl2pa.cli", "dl2pa.commands.train", "dl2pa.training.run", "dl2pa.reporting.finished_run"),
    "torch._dynamo",
)
"""Modules that the agent imports before it forks; the first one has `main`. torch's optimizers need torch._dynamo."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--nproc",
        type=_nproc,
        metavar="N",
        help="processes on this machine, or auto: one per GPU (launch.nproc)",
    )
    add_run_dir(parser)


def _nproc(value: str) -> int | str:
    """Argument type: a number or `auto`."""
    try:
        return value if value == "auto" else int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid value: {value!r}; give a number or auto") from None


def run(args: argparse.Namespace) -> int:
    if os.environ.get(envvars.AGENT_PID) or "SLURM_STEP_ID" in os.environ:
        die_with_parent()  # before the imports, which take seconds
    if torchrun_ranks():
        code = _train_as_rank(_plan(args))
        if code == EXIT_STOPPED:
            code = EXIT_DONE
        if code or multiprocessing.parent_process() is None:  # failed, or started by torchrun itself
            _exit_at_once(code)
        return code
    note_command()
    if not os.environ.get(envvars.SUPERVISED):
        try:
            return _run_here(args, _plan(args))
        except (UserError, NodesMissing) as error:
            final = isinstance(error, UserError) and error.field not in TRANSIENT_FIELDS
            if final or not os.environ.get(envvars.NODES):
                raise
            note(f"dl2pa: {error}")
            return EXIT_STOPPED  # the launcher of the nodes starts the same command again
    try:
        code = _run_here(args, _plan(args))
    except (UserError, TrainingFailure) as error:
        if args.run_dir is not None and not isinstance(error, TakenOver):
            directory = RunDirectory(args.run_dir.absolute())
            _report_to_supervisor(directory, error)
            if isinstance(error, UserError) and error.field not in TRANSIENT_FIELDS:
                restore_submission(directory)
        raise
    # The batch script reads the run directory. A nonzero exit code would make srun kill the other nodes.
    return EXIT_DONE if code == EXIT_STOPPED else code


def _plan(args: argparse.Namespace) -> RunPlan:
    spec = RunSpec(args.config, tuple(args.overrides))
    (plan,) = plan_runs([spec], args.run_dir, nproc=args.nproc)
    return plan


def _run_here(args: argparse.Namespace, plan: RunPlan) -> int:
    """Run this node's part of the training; return the exit code."""
    node = this_node()
    directory = plan.directory
    if FinishedRuns().contains(plan):
        note(f"{plan.run_dir} is finished. For another run, use another --run-dir or configuration.")
        _print_result(directory, args.json)
        return EXIT_DONE
    _warn_of_idle_gpus(plan)
    code = _launch(plan, node)
    if node.index > 0:
        return code
    if code == EXIT_DONE:
        _print_result(directory, args.json)
    elif code == EXIT_STOPPED:
        step = directory.status().get("step")
        note(f"stopped at step {step}; the same command resumes")
        if args.json:
            stopped = {"stopped": True, "step": step, "run_dir": str(plan.run_dir)}
            print(json.dumps(stopped), flush=True)  # noqa: T201
    return code


def _warn_of_idle_gpus(plan: RunPlan) -> None:
    count = len(visible_gpus())
    if plan.config.launch.device != "cpu" and count > plan.nproc:
        note(f"{count - plan.nproc} of {count} visible GPUs stay idle; --nproc auto uses all of them")


def _report_to_supervisor(directory: RunDirectory, error: Exception) -> None:
    """Write an error that occurred before any rank started to the run directory, where the batch script reads it."""
    from dl2pa.training.run import report_node_error

    if not directory.errors(os.environ.get(envvars.LAUNCH, "")):
        report_node_error(directory, os.environ.get("SLURM_NODEID", "0"), error)


def _train_as_rank(plan: RunPlan) -> int:
    """Train as one rank. Errors are in the run directory, from where our own launcher prints them."""
    from dl2pa.reporting.finished_run import report_run
    from dl2pa.training.run import train

    try:
        return train(plan.config, plan.run_dir, plan.label, on_finished=report_run)
    except Exception as error:
        if not os.environ.get(envvars.LAUNCH):
            raise
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE


def _exit_at_once(code: int) -> NoReturn:
    """End a rank that has written everything, without waiting for the threads of libraries or for other ranks."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _launch(plan: RunPlan, node: Node) -> int:
    """Validate, then train in this process or start torchrun."""
    from dl2pa.ownership import Ownership

    world_size = node.count * plan.nproc
    supervised = bool(os.environ.get(envvars.SUPERVISED))
    data = None
    directory = plan.directory
    directory.check_place()
    _check_scratch()
    if world_size == 1 or not supervised:  # under SLURM `submit` has checked, and the ranks check again
        data = _check_before_start(plan, world_size)
    if world_size == 1:
        return _announced(plan, node, partial(_train_here, plan, data))
    del data  # each rank opens the data itself
    directory.create()
    before = directory.status()
    if node.index == 0:
        owner = Ownership(directory)
        owner.acquire()
        try:
            if not supervised:
                directory.stop_file.unlink(missing_ok=True)
            before = directory.status()
        finally:
            owner.release()
    return _announced(plan, node, partial(_launch_torchrun, plan, before, node))


def _announced(plan: RunPlan, node: Node, train: Callable[[], int]) -> int:
    """Train; send the messages of `notify.*` unless the batch script of a SLURM job does."""
    if node.index > 0 or os.environ.get(envvars.SUPERVISED) or not plan.config.notify.is_active:
        return train()
    from dl2pa.notify.supervised import train_announced

    return train_announced(plan.config, plan.directory, train)


def _check_before_start(plan: RunPlan, world_size: int) -> DataSplits:
    """Check data, prototypes, earlier attempts, device, model and initial weights; return the open data set."""
    from dl2pa.training.data import open_data

    config = plan.config
    with placed(finder([plan.source])):
        check_resume(plan)
        data = open_data(config, world_size)
        check_source(config, len(data.classes))
        check_resume(plan, facts_of(data))

    from dl2pa.training.distributed import choose_device  # imports torch, so it comes last

    choose_device(config.launch.device, plan.nproc - 1)
    check_contents(config, len(data.classes))
    check_initial_weights([plan])
    return data


def _check_scratch() -> None:
    """Refuse a machine without a temporary folder, where torchrun would end with a traceback."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        remedy = "In a container give --tmpfs /tmp:exec; elsewhere set TMPDIR."
        message = "no temporary folder can be written"
        raise UserError("TMPDIR", os.environ.get("TMPDIR"), message, remedy) from None


def _train_here(plan: RunPlan, data: DataSplits | None) -> int:
    """Train in this process. A stop signal before or after the step loop ends the process without an error."""
    from dl2pa.reporting.finished_run import report_run
    from dl2pa.training.run import train

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(EXIT_STOPPED)

    stop_signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    for number in stop_signals:
        signal.signal(number, leave)
    listen_again()
    try:
        return train(plan.config, plan.run_dir, plan.label, data, report_run)
    except SystemExit:
        return EXIT_STOPPED
    finally:
        for number in stop_signals:
            signal.signal(number, signal.SIG_IGN)


def _launch_torchrun(plan: RunPlan, before: dict[str, Any], node: Node) -> int:
    """Train under torchrun; return the exit code.

    Args:
        before: status before this attempt.

    Raises:
        UserError, TrainingFailure: the first error of this node's ranks, or another process owns the run now.
        NodesMissing: the nodes did not connect after they had met.
    """
    from launcher.local import run_local
    from launcher.numa import binding_mode

    directory, nproc = plan.directory, plan.nproc
    overrides = [*plan.overrides, f"launch.nproc={plan.config.launch.nproc}"]  # the user's value is recorded
    arguments = ["train", str(plan.config_file), *overrides, "--run-dir", str(plan.run_dir)]
    launch = os.environ.get(envvars.LAUNCH) or (
        meet(node, shared_secret()) if node.count > 1 else uuid.uuid4().hex
    )
    owner = directory.owner()

    def request_stop() -> None:
        if not directory.is_taken_over(owner, launch):
            directory.stop_file.touch()

    node = replace(node, rendezvous=launch) if node.count > 1 and envvars.NODES in os.environ else node
    extra = {envvars.LAUNCH: launch, envvars.NUMA: binding_mode(plan.config.launch, nproc)}
    code = run_local(nproc, _RANK_MODULES, arguments, request_stop, extra, node)
    errors = directory.errors(launch)
    if node.count > 1:  # each node reports the errors of its own ranks
        first = node.index * nproc
        errors = [e for e in errors if first <= e.get("rank", -1) < first + nproc]
    if errors:
        if node.index == 0 and errors[0].get("error") and not directory.is_accepted():
            directory.withdraw_attempt(
                before, str(errors[0]["message"])
            )  # rank 0 may not have known the reason
        _raise_reported(errors[0])
    if directory.is_taken_over(owner, launch):
        raise TakenOver(f"{plan.run_dir} was taken over by another process while this one did not respond")
    if code == EXIT_STOPPED and node.count > 1:
        message = "node 0 and the other nodes met, but could not connect for the training; repeat the command"
        raise NodesMissing(message)
    status = directory.status()
    if node.index > 0:
        unfinished = EXIT_STOPPED if status.get("state") != "finished" else EXIT_DONE
        return unfinished if code == 0 else EXIT_FAILURE
    outcome = {"finished": EXIT_DONE, "stopped": EXIT_STOPPED}.get(str(status.get("state")))
    if outcome is not None and status.get("attempt", 0) > before.get("attempt", 0):
        return outcome  # the status is the last file that a run writes
    note(
        f"the training processes exited with code {code} before the run was finished; see {directory.logs}. "
        "The same command resumes."
    )
    return EXIT_FAILURE


def _raise_reported(report: dict[str, object]) -> NoReturn:
    """Raise the error that a rank reported; print the traceback of an unexpected one."""
    error = report.get("error")
    if isinstance(error, dict):
        raise UserError.from_dict(error)
    if report.get("traceback"):
        note(str(report["traceback"]).rstrip())
    raise TrainingFailure(f"rank {report['rank']}: {report['message']}")


def _print_result(directory: RunDirectory, as_json: bool) -> None:
    result = directory.read_result()
    say(result, as_json, "finished:")
    if not as_json and result:
        sys.stdout.write(f"\n{next_steps(directory, result)}\n")
