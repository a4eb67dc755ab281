"""Submit runs to SLURM through submitit: script, test and job numbers."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dl2pa import envvars
from dl2pa.errors import UserError
from dl2pa.rundir import RunDirectory
from launcher.containers import Container
from launcher.jobs import COMMENT
from launcher.node import run_task
from launcher.refusals import Refusal, kind_of
from launcher.request import Request, Setup

SUPERVISE = Path(__file__).with_name("supervise.sh")
_LINGER_S = 120
_NOTIFIER = (sys.executable, "-P", "-m", "dl2pa.notify")
"""Command that sends messages about a run; it runs in the batch shell, outside any container."""


def script(
    request: Request,
    run_dirs: Sequence[Path],
    folder: Path,
    name: str,
    *,
    nproc: int = 1,
    parallel: int | None = None,
    notify: bool = False,
) -> str:
    """Return the exact script that `submit` gives to sbatch; the arguments are those of `submit`."""
    executor = _executor(request, run_dirs, folder, name, nproc, _NOTIFIER if notify else ())
    executor.update_parameters(array_parallelism=parallel or len(run_dirs))
    if len(run_dirs) > 1:
        executor.parameters["map_count"] = len(run_dirs)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def hand_script(
    request: Request,
    run_dir: Path,
    folder: Path,
    name: str,
    train: Sequence[str],
    *,
    nproc: int = 1,
    notify: Sequence[str] = (),
) -> str:
    """Return a script for `sbatch FILE` by hand, with the options and the supervision of a submission.

    Args:
        folder: existing folder of the job log.
        train: arguments of `dl2pa train`.
        nproc: processes per node if the request has no GPUs.
        notify: configuration and overrides that say how messages about the run are sent; empty for none.
    """
    notifier = (*_NOTIFIER, *notify) if notify else ()
    executor = _executor(request, [run_dir], folder, name, nproc, notifier)
    command = f"{executor.python} -u -m dl2pa {shlex.join(['train', *train])}"
    return str(executor._make_submission_file_text(command, "by-hand"))


def check_with_cluster(text: str) -> None:
    """Ask SLURM whether it can ever run the script, without queueing it.

    Raises:
        UserError: SLURM rejects the script; the message contains SLURM's reason.
        ConnectionError: SLURM does not answer.
    """
    command = ["sbatch", "--test-only"]
    with _clean_environment():
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if kind_of(done.stderr) is Refusal.OUTAGE:
            raise ConnectionError("SLURM does not answer (sbatch): nothing was queued")
        lines = [line.partition("error: ")[2] or line for line in done.stderr.splitlines() if line.strip()]
        reason = "; ".join(line.removeprefix("allocation failure: ") for line in lines)
        raise UserError("resources", _summary(text), f"SLURM rejects the request: {reason}", "See `sinfo`.")


def submit(
    request: Request,
    run_dirs: Sequence[Path],
    folder: Path,
    name: str,
    *,
    nproc: int = 1,
    parallel: int | None = None,
    notify: bool = False,
) -> list[str]:
    """Queue the runs, several as one array; return the job numbers, `N` or `N_K`.

    Args:
        run_dirs: run directories; each contains the configuration that its job uses.
        folder: folder of submitit's files and the logs.
        nproc: processes per node if the request has no GPUs.
        parallel: maximum number of concurrent tasks of an array; None: no maximum.
        notify: send messages about the runs, as their configurations say.

    Raises:
        UserError: sbatch fails.
    """
    from submitit.core.utils import FailedJobError

    executor = _executor(request, run_dirs, folder, name, nproc, _NOTIFIER if notify else ())
    executor.update_parameters(array_parallelism=parallel or len(run_dirs))
    try:
        with _clean_environment():
            if len(run_dirs) == 1:
                return [executor.submit(run_task, _arguments(run_dirs[0])).job_id]
            with executor.batch():
                jobs = [executor.submit(run_task, _arguments(run_dir)) for run_dir in run_dirs]
            return [job.job_id for job in jobs]
    except (FailedJobError, subprocess.CalledProcessError, OSError, RuntimeError) as error:
        raise UserError("sbatch", name, f"failed: {error}", "Try again, or ask your administrator.") from None


def submit_script(text: str) -> str:
    """Queue a script of one job; return the job number.

    Raises:
        UserError: sbatch fails.
    """
    with _clean_environment():
        done = subprocess.run(
            ["sbatch", "--parsable"], input=text, capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        message = f"failed: {' '.join(done.stderr.split())}"
        raise UserError("sbatch", _summary(text), message, "Try again, or ask your administrator.")
    return done.stdout.strip().partition(";")[0]


def is_submitted(job_id: str, folder: Path) -> bool:
    """Return whether the files that the job reads are in the folder of its submission.

    They are missing if sbatch failed but SLURM had queued the job, or if the submission was killed before its end.
    """
    from submitit.core.utils import JobPaths

    return JobPaths(folder, job_id).submitted_pickle.exists()


def log_of(job_id: str, folder: Path) -> Path:
    """Path of the job log: output of the batch shell, of rank 0, and errors of the nodes."""
    return folder / f"job-{job_id}.log"


@contextmanager
def _clean_environment() -> Generator[None]:
    """Remove environment variables that override options of the script or belong to an enclosing job."""
    foreign: tuple[str, ...] = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_")
    if envvars.SUPERVISED in os.environ:  # otherwise the user has set DL2PA_HEAD
        foreign += (envvars.SUPERVISED, envvars.LAUNCH, envvars.HEAD, envvars.PORT)
    inherited = {k: v for k, v in os.environ.items() if k.startswith(foreign) and k != "SLURM_CONF"}
    for name in inherited:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(inherited)


def _arguments(run_dir: Path) -> list[str]:
    return ["train", str(RunDirectory(run_dir).submitted_config), "--run-dir", str(run_dir)]


def _executor(
    request: Request,
    run_dirs: Sequence[Path],
    folder: Path,
    name: str,
    nproc: int,
    notifier: Sequence[str] = (),
) -> Any:
    from submitit.slurm.slurm import SlurmExecutor

    container = _container(request, run_dirs)
    processes = max(1, request.gpus_per_node or nproc)
    executor = SlurmExecutor(folder=folder, python=_task_command(request, container, processes))
    # SLURM expands % in log names.
    log = log_of("%A_%a" if len(run_dirs) > 1 else "%j", Path(str(folder).replace("%", "%%")))
    names = ("partition", "account", "qos", "constraint", "exclude", "mem")
    options: dict[str, Any] = {
        **{name: getattr(request, name) for name in names},
        "gpus_per_node": request.gpus,
        "cpus_per_task": request.cores * processes if request.cores else None,
        "dependency": f"afterok:{request.after}" if request.after else None,
    }
    extra: dict[str, Any] = {
        **{key: value or True for key, value in request.sbatch_options.items()},
        "requeue": True,
        # B: signal only the batch shell, which writes the stop file to the run directory.
        "signal": f"B:USR2@{request.stop_before}",
        "output": str(log),
        "error": str(log),
        "chdir": str(Path.cwd()),
    }
    if request.time is not None:
        extra["time"] = request.time
    executor.update_parameters(
        job_name=name,
        nodes=request.nodes,
        ntasks_per_node=1,
        comment=COMMENT,
        setup=[
            *_setup(run_dirs, request.setup),
            *([f"notifier=({shlex.join(notifier)})"] if notifier else []),
        ],
        use_srun=False,  # the command contains srun
        additional_parameters=extra,
        # Override submitit's defaults, so that those of the cluster apply.
        time=None,
        wckey=None,
        **{k: v for k, v in options.items() if v is not None},
    )
    return executor


def _container(request: Request, run_dirs: Sequence[Path]) -> Container | None:
    if not request.container:
        return None
    setup = request.setup
    return Container.find(request.container, run_dirs, setup.container_mounts, setup.container_engine)


def _setup(run_dirs: Sequence[Path], site: Setup) -> list[str]:
    """Lines before the command; those of the site run first, so that they cannot replace the run directory."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    lines = [*exports, *site.lines]
    paths = " ".join(shlex.quote(str(run_dir)) for run_dir in run_dirs)
    return [
        SUPERVISE.read_text(encoding="utf-8"),
        'guard "$@"',
        *(["trap '' USR2", *lines] if lines else []),  # an early warning must not end the batch shell
        f"runs=({paths})",
        "run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}",
    ]


def _task_command(request: Request, container: Container | None, processes: int) -> str:
    """Command before `-u -m submitit.core._submit FOLDER`: supervisor, srun, container and Python."""
    srun = [
        "srun",
        "--kill-on-bad-exit=1",
        f"--wait={_LINGER_S}",
        "--ntasks-per-node=1",
        f"--nodes={request.nodes}",
        f"--ntasks={request.nodes}",
        "--unbuffered",
    ]
    if request.gpus_per_node:
        srun.append("--gpu-bind=none")  # every process of a node needs all its GPUs visible
    if request.cores:
        # Since SLURM 22.05, srun does not inherit this from sbatch.
        srun.append(f"--cpus-per-task={request.cores * processes}")
    python = [sys.executable, "-P"]  # do not import from the working directory
    if container is not None:
        srun, python = [*srun, *container.srun_options()], [*container.prefix(), "python", "-P"]
    return f'supervise "$run" {shlex.join([*srun, *python])}'


def _summary(text: str) -> str:
    """Return the resource options of the script, for messages."""
    names = {
        "nodes",
        "gpus-per-node",
        "partition",
        "time",
        "mem",
        "cpus-per-task",
        "qos",
        "account",
        "constraint",
        "gres",
        "reservation",
    }
    options = re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, re.MULTILINE)
    return " ".join(f"--{key}={value}" for key, value in options if key in names)
