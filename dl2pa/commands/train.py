"""`dl2pa train`: check everything, then run here, under torchrun, or as the rank torchrun started.

As the one task of a SLURM step's node it is that node's part of the training, and torchrun meets the others'.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
import uuid
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from dl2pa import envvars
from dl2pa.commands.output import note, say
from dl2pa.config import Config, fingerprint, load_config, load_recorded_config, merge, parse_config
from dl2pa.container import in_container
from dl2pa.errors import EXIT_DONE, EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR, TrainingFailure, UserError
from dl2pa.process import die_with_parent, inside_torchrun, note_command
from launcher.node import Node, listen_again, this_node

if TYPE_CHECKING:
    from dl2pa.rundir import RunDirectory
    from dl2pa.training.data import DataSplits


_RANK_MODULES = (
    *("dl2pa.cli", "dl2pa.commands.train", "dl2pa.training.run", "dl2pa.reporting.finished_run"),
    "torch._dynamo",
)
"""Modules that the agent imports before it forks. The first has `main`; torch's optimizers need torch._dynamo."""


def run(args: argparse.Namespace) -> int:
    if os.environ.get(envvars.AGENT_PID) or "SLURM_STEP_ID" in os.environ:
        die_with_parent()  # before the imports, which take seconds
    if inside_torchrun():
        config, run_dir = _plan(args)
        code = _train_as_rank(config, run_dir, args.config.stem)
        if multiprocessing.parent_process() is None:  # started by another torchrun than our agent
            _leave_at_once(code)
        return EXIT_DONE if code == EXIT_STOPPED else code
    note_command()
    if not os.environ.get(envvars.SUPERVISED):
        return _run_here(args, *_plan(args))
    try:
        code = _run_here(args, *_plan(args))
    except (UserError, TrainingFailure) as error:
        if args.run_dir is not None:
            _leave_word(args.run_dir.absolute(), error)
        raise
    # The batch shell reads the run directory; a code that is not 0 would have srun kill the other nodes.
    return EXIT_DONE if code == EXIT_STOPPED else code


def _plan(args: argparse.Namespace) -> tuple[Config, Path]:
    """The configuration and the run directory that the command line means."""
    recorded = args.run_dir is not None and args.config.absolute().is_relative_to(args.run_dir.absolute())
    load = load_recorded_config if recorded else load_config
    config = load(args.config, args.overrides)
    if args.nproc is not None:
        config = parse_config(merge(config.model_dump(mode="json"), {"launch": {"nproc": args.nproc}}))
    run_dir: Path = args.run_dir or Path("runs") / f"{args.config.stem}-{fingerprint(config)}"
    return config, run_dir.absolute()


def _run_here(args: argparse.Namespace, config: Config, run_dir: Path) -> int:
    """This machine's part of the training, which may be all of it; returns the exit code."""
    node = this_node()
    if already_finished(config, run_dir):
        note(f"{run_dir} is finished; for another run give another --run-dir or configuration")
        _report(run_dir, args.json)
        return EXIT_DONE
    code = _launch(args, config, run_dir, args.config.stem, node)
    if node.index > 0:
        return code
    if code == EXIT_DONE:
        _report(run_dir, args.json)
    elif code == EXIT_STOPPED:
        status = _status(run_dir)
        note(f"stopped at step {status.get('step')}; the same command goes on from there")
        if args.json:
            stopped = {"stopped": True, "step": status.get("step"), "run_dir": str(run_dir)}
            print(json.dumps(stopped), flush=True)  # noqa: T201
    return code


def _leave_word(run_dir: Path, error: Exception) -> None:
    """Tell the batch shell of an error met before any rank could: it decides by what is in the run directory."""
    from dl2pa.rundir import RunDirectory
    from dl2pa.training.run import report_node_error

    run = RunDirectory(run_dir)
    if not run.errors(os.environ.get(envvars.LAUNCH, "")):
        report_node_error(run, os.environ.get("SLURM_NODEID", "0"), error)


def _train_as_rank(config: Config, run_dir: Path, name: str) -> int:
    """Train; what goes wrong under our own launcher is left in the run directory for it to tell."""
    from dl2pa.reporting.finished_run import report_run
    from dl2pa.training.run import train

    try:
        return train(config, run_dir, name, on_finished=report_run)
    except Exception as error:
        if not os.environ.get(envvars.LAUNCH):
            raise
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE


def _leave_at_once(code: int) -> NoReturn:
    """End a worker whose work is done and written, without tearing down libraries that still hold threads."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if code != EXIT_STOPPED else EXIT_DONE)


def _launch(args: argparse.Namespace, config: Config, run_dir: Path, name: str, node: Node) -> int:
    """Check what can be checked before any process starts, then start it or them."""
    from dl2pa.ownership import Ownership
    from dl2pa.rundir import RunDirectory

    world_size = node.count * config.launch.nproc
    supervised = bool(os.environ.get(envvars.SUPERVISED))
    data = None
    RunDirectory(run_dir).check_place()
    _check_scratch()
    if world_size == 1 or not supervised:  # else the ranks find the same, and `submit` has looked already
        data = _check_before_start(config, world_size)
    if world_size == 1:
        return _train_here(config, run_dir, name, data)
    del data  # each process opens its own
    directory = RunDirectory(run_dir)
    directory.create()
    attempt = directory.status().get("attempt", 0)
    if node.index == 0:
        owner = Ownership(directory)
        owner.acquire()
        try:
            if not supervised:
                directory.stop_file.unlink(missing_ok=True)
            attempt = directory.status().get("attempt", 0)
        finally:
            owner.release()
    return _launch_torchrun(args, config, directory, attempt, node)


def _check_before_start(config: Config, world_size: int) -> DataSplits:
    """Device, data and prototypes; the data set is returned open."""
    from dl2pa.model.model import check_prototypes
    from dl2pa.training.data import open_data
    from dl2pa.training.distributed import choose_device

    choose_device(config.launch.device, config.launch.nproc - 1)
    data = open_data(config, world_size)
    check_prototypes(config, len(data.classes))
    return data


def _check_scratch() -> None:
    """torchrun ends with a traceback where it has no place for temporary files."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        remedy = "In a container give --tmpfs /tmp; elsewhere set TMPDIR."
        given = os.environ.get("TMPDIR")
        raise UserError("TMPDIR", given, "no temporary folder can be written", remedy) from None


def _train_here(config: Config, run_dir: Path, name: str, data: DataSplits | None) -> int:
    """Train in this process; a stop signal before the loop listens, or after it has ended, does no harm."""
    from dl2pa.reporting.finished_run import report_run
    from dl2pa.training.run import train

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(EXIT_STOPPED)

    stop_signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    for number in stop_signals:
        signal.signal(number, leave)
    listen_again()
    try:
        return train(config, run_dir, name, data, report_run)
    except SystemExit:
        return EXIT_STOPPED
    finally:
        for number in stop_signals:
            signal.signal(number, signal.SIG_IGN)


def _launch_torchrun(
    args: argparse.Namespace, config: Config, directory: RunDirectory, attempt: int, node: Node
) -> int:
    from launcher.local import run_local

    overrides = [*args.overrides, f"launch.nproc={config.launch.nproc}"]
    arguments = ["train", str(args.config), *overrides, "--run-dir", str(directory.root)]
    launch = os.environ.get(envvars.LAUNCH) or uuid.uuid4().hex
    extra = {envvars.LAUNCH: launch}
    code = run_local(config.launch.nproc, _RANK_MODULES, arguments, directory.stop_file, extra, node)
    errors = directory.errors(launch)
    if node.count > 1:  # each node tells of its own; the first sees everything
        first = node.index * config.launch.nproc
        errors = [e for e in errors if first <= e.get("rank", -1) < first + config.launch.nproc]
    if errors:
        _retell(errors[0])
    if node.index > 0:
        return EXIT_DONE if code == 0 else EXIT_FAILURE
    status = directory.status()
    outcome = {"finished": EXIT_DONE, "stopped": EXIT_STOPPED}.get(str(status.get("state")))
    if outcome is not None and status.get("attempt", 0) > attempt:
        return outcome  # written last, after everything else was
    note(
        f"the processes ended with code {code} before the run did; see {directory.logs}. The same command resumes."
    )
    return EXIT_FAILURE


def _retell(report: dict[str, object]) -> NoReturn:
    """Raise what a worker met as our own error; one that nobody foresaw is shown with its traceback."""
    error = report.get("error")
    if isinstance(error, dict):
        raise UserError(error["field"], error["value"], error["message"], error["remedy"])
    if report.get("traceback"):
        note(str(report["traceback"]).rstrip())
    raise TrainingFailure(f"rank {report['rank']}: {report['message']}")


def _status(run_dir: Path) -> dict[str, object]:
    from dl2pa.rundir import RunDirectory

    return RunDirectory(run_dir).status()


def already_finished(config: Config, run_dir: Path) -> bool:
    """Finished, and the configuration asks for nothing beyond what it was finished under."""
    status = _status(run_dir)
    return (
        status.get("state") == "finished"
        and status.get("fingerprint") == fingerprint(config)
        and (run_dir / "model.safetensors").exists()
    )


def _report(run_dir: Path, as_json: bool) -> None:
    from dl2pa.osutil import read_json

    result = read_json(run_dir / "result.json")
    say(result, as_json, "finished:")
    if not as_json and result.get("mlflow_run_id") and (run_dir.parent / "mlflow.db").exists():
        program, more = str(Path(sys.executable).parent / "dl2pa"), ""
        if in_container():
            program, more = "docker run -p 5000:5000 … IMAGE", " --host 0.0.0.0 --allow-others localhost"
        where = shlex.quote(str(run_dir.parent))
        sys.stdout.write(f"\nsee it in MLflow:  {program} ui --runs {where}{more}\n")
