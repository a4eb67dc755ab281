"""Submit runs to SLURM through submitit: request, checks, script and job numbers."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dl2pa import envvars
from dl2pa.errors import UserError
from dl2pa.records import check_record
from dl2pa.rundir import RunDirectory
from launcher.containers import Container
from launcher.jobs import COMMENT, states
from launcher.node import run_task
from launcher.partition import default_cpus_per_process, partition_fields

SUPERVISE = Path(__file__).with_name("supervise.sh")
_TIME = re.compile(r"(?:(\d{1,6})-)?(\d{1,9})(?::(\d{1,6}))?(?::(\d{1,6}))?")
_PLAIN = re.compile(r"[\w.,:@+\[\]*&|()/=-]{1,500}", re.ASCII)
_NO_LIMIT = ("0", "UNLIMITED", "INFINITE")
_LINGER_S = 120
_START_UP_S = 60
"""Minimum time for the start and the first step; a shorter time limit would never make progress."""


@dataclass(frozen=True)
class Request:
    """Resources requested for a job; None keeps the default of the cluster.

    Args:
        gpus_per_node: also the number of processes per node; 0 trains on CPUs.
        time: time limit in SLURM's format: minutes, or [days-]hours:minutes:seconds.
        cpus_per_gpu: cores per process; see `with_cores` for the default.
        after: job that must have succeeded before.
        stop_before: seconds before the time limit at which the run saves and requeues.
    """

    nodes: int = 1
    gpus_per_node: int = 1
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    mem: str | None = None
    cpus_per_gpu: int | None = None
    container: str | None = None
    after: str | None = None
    stop_before: int = 180

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Request:
        """Read the request of an earlier submission, perhaps of another version; unknown fields are dropped.

        Raises:
            ValueError: a value of the wrong type.
        """
        kinds = {f.name: int if f.type.startswith("int") else str for f in fields(cls)}
        checked = check_record(dict(stored), kinds)
        return cls(**{name: checked[name] for name in kinds if checked.get(name) is not None})

    def merged(self, changes: Mapping[str, Any]) -> Request:
        """Return this request with the values of `changes` that are not None."""
        return replace(self, **{k: v for k, v in changes.items() if v is not None})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def with_cores(request: Request, nproc: int, threads: int) -> Request:
    """Return the request with its default number of cores; see `default_cpus_per_process`.

    Args:
        nproc: processes per node.
        threads: threads of a process on CPUs.
    """
    if request.cpus_per_gpu is not None or shutil.which("scontrol") is None:
        return request
    cores = default_cpus_per_process(request.partition, request.gpus_per_node, nproc, threads)
    return replace(request, cpus_per_gpu=cores)


def check_request(request: Request) -> None:
    """Refuse a request that the cluster cannot run.

    Raises:
        UserError: naming the invalid option.
    """
    if shutil.which("sbatch") is None:
        remedy = "Submit from a SLURM host, outside the image, or train here with `dl2pa train`."
        raise UserError("sbatch", None, "SLURM's commands are not on this machine", remedy)
    check_texts(request)
    for name, value, least in (
        ("--nodes", request.nodes, 1),
        ("--gpus-per-node", request.gpus_per_node, 0),
        ("--cpus-per-gpu", request.cpus_per_gpu, 1),
        ("--stop-before", request.stop_before, 10),
    ):
        if value is not None and value < least:
            raise UserError(name, value, f"must be at least {least}", f"Give {least} or more.")
    if request.after is not None:
        _check_after(request.after)
    _check_time(request)


def _check_time(request: Request) -> None:
    """Refuse a time limit that is invalid, exceeds the limit of the partition or leaves no time to train."""
    time, limit = request.time, None
    if time is not None and time.upper() not in _NO_LIMIT:
        limit = seconds_of(time)
        if limit is None:
            remedy = "Write minutes, H:MM:SS or D-HH:MM:SS."
            raise UserError("--time", time, "is not a valid time limit", remedy)
    default, longest = _partition_limits(request.partition)
    if limit is not None and longest is not None and limit > longest:
        message = (
            f"exceeds the limit of the partition ({longest // 60} minutes), so the job would never start"
        )
        raise UserError("--time", time, message, "Give a shorter time: the job requeues itself.")
    allowed = limit if time is not None else default or longest
    if allowed is not None and allowed < request.stop_before + _START_UP_S:
        value = time or f"{allowed // 60} minutes, the default of the partition"
        message = f"leaves no time to train: the run saves {request.stop_before} s before the limit"
        raise UserError("--time", value, message, "Give more time, or a shorter --stop-before.")


def check_texts(request: Request) -> None:
    """Refuse texts that are unsafe in the sbatch script.

    Raises:
        UserError: naming the invalid option.
    """
    for name in ("time", "partition", "account", "qos", "constraint", "exclude", "mem", "after"):
        text = getattr(request, name)
        if text is not None and not _PLAIN.fullmatch(text):
            remedy = "Use letters, digits and . _ , : @ + - [ ] * & | ( ) / = only."
            raise UserError(f"--{name}", text, "contains characters that SLURM does not accept", remedy)
    image = request.container
    if image is not None and (not image.isprintable() or image.startswith("-")):
        remedy = "Give a file or REGISTRY/IMAGE:TAG."
        raise UserError("--container", image, "is not a valid image name", remedy)


def _check_after(job: str) -> None:
    """Refuse an unknown job, because SLURM ignores a dependency on one."""
    if not re.fullmatch(r"\d{1,10}(_\d{1,10})?", job):
        raise UserError("--after", job, "is not a job number", "Give N, or N_K for a task of an array.")
    known = subprocess.run(["scontrol", "show", "job", job], capture_output=True, check=False).returncode == 0
    if not known and states([job])[job].state != "COMPLETED":
        raise UserError("--after", job, "is not known to SLURM", "See `squeue` or `sacct`.")


def _partition_limits(name: str | None) -> tuple[int | None, int | None]:
    """Default and maximum time limit of a partition in seconds; None if unlimited or unknown."""
    partition = partition_fields(name)
    return seconds_of(partition.get("DefaultTime", "")), seconds_of(partition.get("MaxTime", ""))


def seconds_of(time: str) -> int | None:
    """Seconds of a SLURM time limit: minutes[:seconds], hours:minutes:seconds or days-hours[:minutes[:seconds]]."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    days, first, second, third = (None if g is None else int(g) for g in match.groups())
    assert first is not None
    if days is not None:
        return ((days * 24 + first) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return (first * 60 + (second or 0)) * 60 + third
    return first * 60 + (second or 0)


def script(request: Request, run_dirs: Sequence[Path], folder: Path, name: str, *, nproc: int = 1) -> str:
    """Return the exact script that `submit` gives to sbatch; the arguments are those of `submit`."""
    executor = _executor(request, run_dirs, folder, name, nproc)
    if len(run_dirs) > 1:
        executor.parameters["map_count"] = len(run_dirs)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


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
        if "Unable to contact" in done.stderr:
            raise ConnectionError("SLURM does not answer (sbatch): nothing was queued")
        lines = [line.partition("error: ")[2] or line for line in done.stderr.splitlines() if line.strip()]
        reason = "; ".join(line.removeprefix("allocation failure: ") for line in lines)
        raise UserError("resources", _summary(text), f"SLURM rejects the request: {reason}", "See `sinfo`.")


def submit(
    request: Request, run_dirs: Sequence[Path], folder: Path, name: str, *, nproc: int = 1
) -> list[str]:
    """Queue the runs, several as one array; return the job numbers, `N` or `N_K`.

    Args:
        run_dirs: run directories; each contains the configuration that its job uses.
        folder: folder of submitit's files and the logs.
        nproc: processes per node if the request has no GPUs.

    Raises:
        UserError: sbatch fails.
    """
    from submitit.core.utils import FailedJobError

    executor = _executor(request, run_dirs, folder, name, nproc)
    try:
        with _clean_environment():
            if len(run_dirs) == 1:
                return [executor.submit(run_task, _arguments(run_dirs[0])).job_id]
            with executor.batch():
                jobs = [executor.submit(run_task, _arguments(run_dir)) for run_dir in run_dirs]
            return [job.job_id for job in jobs]
    except (FailedJobError, subprocess.CalledProcessError, OSError, RuntimeError) as error:
        raise UserError("sbatch", name, f"failed: {error}", "Try again, or ask your administrator.") from None


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


def _executor(request: Request, run_dirs: Sequence[Path], folder: Path, name: str, nproc: int) -> Any:
    from submitit.slurm.slurm import SlurmExecutor

    container = Container.find(request.container, run_dirs) if request.container else None
    processes = max(1, request.gpus_per_node or nproc)
    executor = SlurmExecutor(folder=folder, python=_task_command(request, container, processes))
    # SLURM expands % in log names.
    log = log_of("%A_%a" if len(run_dirs) > 1 else "%j", Path(str(folder).replace("%", "%%")))
    names = ("partition", "account", "qos", "constraint", "exclude", "mem")
    options: dict[str, Any] = {
        **{name: getattr(request, name) for name in names},
        "gpus_per_node": request.gpus_per_node or None,
        "cpus_per_task": request.cpus_per_gpu * processes if request.cpus_per_gpu else None,
        "dependency": f"afterok:{request.after}" if request.after else None,
    }
    extra: dict[str, Any] = {
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
        setup=_setup(run_dirs),
        use_srun=False,  # the command contains srun
        additional_parameters=extra,
        # Override submitit's defaults, so that those of the cluster apply.
        time=None,
        wckey=None,
        **{k: v for k, v in options.items() if v is not None},
    )
    return executor


def _setup(run_dirs: Sequence[Path]) -> list[str]:
    paths = " ".join(shlex.quote(str(run_dir)) for run_dir in run_dirs)
    return [
        SUPERVISE.read_text(encoding="utf-8"),
        'guard "$@"',
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
    if request.cpus_per_gpu:
        # Since SLURM 22.05, srun does not inherit this from sbatch.
        srun.append(f"--cpus-per-task={request.cpus_per_gpu * processes}")
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
    }
    options = re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, re.MULTILINE)
    return " ".join(f"--{key}={value}" for key, value in options if key in names)
