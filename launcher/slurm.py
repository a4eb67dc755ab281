"""Submission to SLURM through submitit: the request, its checks, the script, and the job's number."""

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
from launcher.containers import Container
from launcher.jobs import COMMENT, states
from launcher.node import run_task

SUPERVISE = Path(__file__).with_name("supervise.sh")
_TIME = re.compile(r"(?:(\d{1,6})-)?(\d{1,9})(?::(\d{1,6}))?(?::(\d{1,6}))?")
_PLAIN = re.compile(r"[\w.,:@+\[\]*&|()/=-]{1,500}", re.ASCII)
_NO_LIMIT = ("0", "UNLIMITED", "INFINITE")
_LINGER_S = 120
_START_UP_S = 60
"""What a start and a first step take at the least: a time limit without room for them never gets anywhere."""


@dataclass(frozen=True)
class Request:
    """What a job asks of the cluster; None leaves the cluster's default.

    Args:
        gpus_per_node: also the processes a node; 0 asks for none and starts `processes_per_node` on processors.
        time: limit as SLURM writes it: minutes, or [days-]hours:minutes:seconds.
        cpus_per_gpu: cores of each process.
        after: job that must have ended well before.
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
        """What an earlier submission asked for, as far as it can be read."""
        kinds = {f.name: int if f.type.startswith("int") else str for f in fields(cls)}
        kept: dict[str, Any] = {k: v for k, v in stored.items() if k in kinds and type(v) is kinds[k]}
        return cls(**kept)

    def merged(self, given: Mapping[str, Any]) -> Request:
        """This request with what was given changed; for a run submitted again."""
        return replace(self, **{k: v for k, v in given.items() if v is not None})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Planned:
    """A run about to be submitted: its directory and its snapshot of the configuration."""

    run_dir: Path
    config: Path
    processes: int


def check_request(request: Request) -> None:
    """Refuse what no cluster could run.

    Raises:
        UserError: naming the option at fault.
    """
    if shutil.which("sbatch") is None:
        remedy = "Submit on a host that has them (--container there, not in the image), or train here: `dl2pa train`."
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
    limit = None if request.time is None or request.time.upper() in _NO_LIMIT else seconds_of(request.time)
    if request.time is not None and limit is None and request.time.upper() not in _NO_LIMIT:
        raise UserError("--time", request.time, "is no time limit", "Write minutes, H:MM:SS or D-HH:MM:SS.")
    default, longest = _partition_limits(request.partition)
    if limit is not None and longest is not None and limit > longest:
        message = f"longer than the partition allows ({longest // 60} minutes): it would wait for ever"
        raise UserError(
            "--time", request.time, message, "Give less: the job requeues itself until it is done."
        )
    allowed = limit if request.time is not None else default or longest
    if allowed is not None and allowed < request.stop_before + _START_UP_S:
        shown = request.time or f"{allowed // 60} minutes, the partition's default"
        message = f"leaves no time to train: the run saves {request.stop_before} s before the limit"
        raise UserError("--time", shown, message, "Give more time, or a shorter --stop-before.")


def check_texts(request: Request) -> None:
    """Refuse a text that the script would not keep as it is, or that would add a line to it.

    Raises:
        UserError: naming the option at fault.
    """
    for name in ("time", "partition", "account", "qos", "constraint", "exclude", "mem", "after"):
        text = getattr(request, name)
        if text is not None and not _PLAIN.fullmatch(text):
            remedy = "Use letters, digits and . _ , : @ + - [ ] * & | ( ) / = only."
            raise UserError(f"--{name}", text, "is nothing that SLURM could mean", remedy)
    image = request.container
    if image is not None and (not image.isprintable() or image.startswith("-")):
        raise UserError("--container", image, "is no image's name", "Give a file or REGISTRY/IMAGE:TAG.")


def _check_after(job: str) -> None:
    """A job that is not there would be no condition at all, as SLURM takes it."""
    if not re.fullmatch(r"\d{1,10}(_\d{1,10})?", job):
        raise UserError("--after", job, "is no job's number", "Give N, or N_K of an array.")
    found = subprocess.run(["scontrol", "show", "job", job], capture_output=True, check=False).returncode == 0
    if not found and states([job])[job].state != "COMPLETED":
        raise UserError("--after", job, "is no job that SLURM knows", "See `squeue` or `sacct`.")


def _partition_limits(name: str | None) -> tuple[int | None, int | None]:
    """Seconds of a partition's default and longest time limit; None where there is none or it is not known."""
    done = subprocess.run(
        ["scontrol", "show", "partition", "-o"], capture_output=True, text=True, check=False
    )
    for line in done.stdout.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if fields.get("PartitionName") == name or (name is None and fields.get("Default") == "YES"):
            return seconds_of(fields.get("DefaultTime", "")), seconds_of(fields.get("MaxTime", ""))
    return None, None


def seconds_of(time: str) -> int | None:
    """A SLURM time limit in seconds: minutes[:seconds], hours:minutes:seconds or days-hours[:minutes[:seconds]]."""
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


def script(request: Request, runs: Sequence[Planned], folder: Path, name: str) -> str:
    """The exact text given to sbatch."""
    executor = _executor(request, runs, folder, name)
    if len(runs) > 1:
        executor.parameters["map_count"] = len(runs)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def check_with_cluster(text: str) -> None:
    """Let SLURM itself say whether it could ever run the script; queues nothing.

    Raises:
        UserError: with SLURM's words.
        ConnectionError: SLURM does not answer.
    """
    command = ["sbatch", "--test-only"]
    with _own_environment():
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if "Unable to contact" in done.stderr:
            raise ConnectionError("SLURM does not answer (sbatch): nothing was queued")
        lines = [line.partition("error: ")[2] or line for line in done.stderr.splitlines() if line.strip()]
        said = "; ".join(line.removeprefix("allocation failure: ") for line in lines)
        raise UserError("resources", _summary(text), f"SLURM refuses it: {said}", "See `sinfo`.")


def submit(request: Request, runs: Sequence[Planned], folder: Path, name: str) -> list[str]:
    """Queue the runs, several as one array; returns the jobs' numbers, `N` or `N_K`.

    Raises:
        UserError: sbatch refuses.
    """
    from submitit.core.utils import FailedJobError

    executor = _executor(request, runs, folder, name)
    try:
        with _own_environment():
            if len(runs) == 1:
                return [executor.submit(run_task, _arguments(runs[0])).job_id]
            with executor.batch():
                jobs = [executor.submit(run_task, _arguments(run)) for run in runs]
            return [job.job_id for job in jobs]
    except (FailedJobError, subprocess.CalledProcessError, OSError, RuntimeError) as error:
        raise UserError("sbatch", name, f"failed: {error}", "Ask the cluster, or try again.") from None


def log_of(job_id: str, folder: Path) -> Path:
    """Where the job's log goes: the batch shell's words, rank 0's and whatever a node met."""
    return folder / f"job-{job_id}.log"


@contextmanager
def _own_environment() -> Generator[None]:
    """Without variables that sbatch would prefer to the script, or hand on from the job this may run in."""
    foreign: tuple[str, ...] = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_")
    if envvars.SUPERVISED in os.environ:  # otherwise it was the user who set DL2PA_HEAD
        foreign += (envvars.SUPERVISED, envvars.LAUNCH, envvars.HEAD, envvars.PORT)
    inherited = {k: v for k, v in os.environ.items() if k.startswith(foreign) and k != "SLURM_CONF"}
    for name in inherited:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(inherited)


def _arguments(run: Planned) -> list[str]:
    return ["train", str(run.config), "--run-dir", str(run.run_dir)]


def _executor(request: Request, runs: Sequence[Planned], folder: Path, name: str) -> Any:
    from submitit.slurm.slurm import SlurmExecutor

    container = Container.find(request.container, runs) if request.container else None
    processes = max(1, request.gpus_per_node or runs[0].processes)
    executor = SlurmExecutor(folder=folder, python=_task_command(request, container, processes))
    # SLURM expands % in the name of a log.
    log = log_of("%A_%a" if len(runs) > 1 else "%j", Path(str(folder).replace("%", "%%")))
    given: dict[str, Any] = {
        "partition": request.partition,
        "account": request.account,
        "qos": request.qos,
        "constraint": request.constraint,
        "exclude": request.exclude,
        "mem": request.mem,
        "gpus_per_node": request.gpus_per_node or None,
        "cpus_per_task": request.cpus_per_gpu * processes if request.cpus_per_gpu else None,
        "dependency": f"afterok:{request.after}" if request.after else None,
    }
    extra: dict[str, Any] = {
        "requeue": True,
        # To the batch shell only: it leaves the stop file in the run directory, which no container can hide.
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
        setup=_setup(runs),
        use_srun=False,  # ours stands in the command
        additional_parameters=extra,
        # submitit's own defaults, which are not this cluster's.
        time=None,
        wckey=None,
        **{k: v for k, v in given.items() if v is not None},
    )
    return executor


def _setup(runs: Sequence[Planned]) -> list[str]:
    paths = " ".join(shlex.quote(str(run.run_dir)) for run in runs)
    return [
        SUPERVISE.read_text(encoding="utf-8"),
        'guard "$@"',
        f"runs=({paths})",
        "run=${runs[${SLURM_ARRAY_TASK_ID:-0}]}",
    ]


def _task_command(request: Request, container: Container | None, processes: int) -> str:
    """What stands before `-u -m submitit.core._submit FOLDER`: the supervisor, srun, the container, Python."""
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
        srun.append("--gpu-bind=none")  # every process of a node may reach every GPU of the node
    if request.cpus_per_gpu:
        # Since 22.05 srun does not take this over from sbatch.
        srun.append(f"--cpus-per-task={request.cpus_per_gpu * processes}")
    python = [sys.executable, "-P"]  # a module of the working directory is not ours
    if container is not None:
        srun, python = [*srun, *container.srun_options()], [*container.prefix(), "python", "-P"]
    return f'supervise "$run" {shlex.join([*srun, *python])}'


def _summary(text: str) -> str:
    """The request in the script's own words."""
    wanted = (
        "nodes",
        "gpus-per-node",
        "partition",
        "time",
        "mem",
        "cpus-per-task",
        "qos",
        "account",
        "constraint",
    )
    found = re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, re.MULTILINE)
    return " ".join(f"--{key}={value}" for key, value in found if key in wanted)
