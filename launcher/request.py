"""Resources that a submission requests from SLURM, and their checks."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from dl2pa.errors import UserError
from dl2pa.records import check_record
from launcher.jobs import LIVE, UNKNOWN, states
from launcher.partition import default_cpus_per_process, partition_fields
from launcher.sbatch import check_options, gpus_of_gres, parse_options

_TIME = re.compile(r"(?:(\d{1,6})-)?(\d{1,9})(?::(\d{1,6}))?(?::(\d{1,6}))?")
_PLAIN = re.compile(r"[\w.,:@+\[\]*&|()/=-]{1,500}", re.ASCII)
_NO_LIMIT = ("0", "UNLIMITED", "INFINITE")
_START_UP_S = 60
"""Minimum time for the start and the first step; a shorter time limit would never make progress."""


AUTO, SITE = "auto", "site"
"""CPU policies: the cores per GPU of the partition, or those that SLURM grants by itself."""


@dataclass(frozen=True)
class Setup:
    """What a job does before the training, from the site file only: a stored request may be another user's.

    Args:
        lines: lines of bash, in the batch script.
        environment: variables of the job.
        container_engine: `pyxis`, `apptainer` or `singularity`; None takes the one that is available.
        container_mounts: folders to mount in addition.
    """

    lines: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    container_engine: str | None = None
    container_mounts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """Resources requested for a job; None keeps the default of the cluster.

    Args:
        gpus_per_node: also the number of processes per node; 0 trains on CPUs.
        time: time limit in SLURM's format: minutes, or [days-]hours:minutes:seconds.
        cpus_per_gpu: cores per process, `auto` (None) or `site`; see `with_cores`.
        after: job that must have succeeded before.
        stop_before: seconds before the time limit at which the run saves and requeues.
        gpu_type: type of the GPUs; None or empty: any.
        sbatch: further options of sbatch, `KEY=VALUE` or `KEY`.
        profile: profile of the site file that the request was made with.
        setup: from the site file; not stored.
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
    cpus_per_gpu: int | str | None = None
    container: str | None = None
    after: str | None = None
    stop_before: int = 180
    gpu_type: str | None = None
    sbatch: tuple[str, ...] = ()
    profile: str | None = None
    setup: Setup = field(default_factory=Setup)

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Request:
        """Read the request of an earlier submission, perhaps of another version; unknown fields are dropped.

        Raises:
            ValueError: a value of the wrong type.
        """
        kinds: dict[str, type] = {f.name: int if f.type.startswith("int") else str for f in fields(cls)}
        del kinds["setup"]
        kinds["sbatch"] = list
        if isinstance(stored.get("cpus_per_gpu"), str):
            kinds["cpus_per_gpu"] = str
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in stored.items()}
        checked = check_record(plain, kinds)
        values: dict[str, Any] = {name: checked[name] for name in kinds if checked.get(name) is not None}
        words: list[Any] = values.pop("sbatch", [])
        if not all(isinstance(word, str) for word in words):
            raise ValueError("sbatch is not a list of texts")
        return cls(**values, sbatch=tuple(words))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that a submission records."""
        return {
            name: value for name, value in asdict(replace(self, setup=Setup())).items() if name != "setup"
        }

    @property
    def sbatch_options(self) -> dict[str, str]:
        """Further options of sbatch, to their values."""
        return parse_options(self.sbatch)

    @property
    def gpus(self) -> str | None:
        """Value of sbatch's `--gpus-per-node`; None without GPUs, or if `gres` requests them."""
        if not self.gpus_per_node or gpus_of_gres(self.sbatch_options) is not None:
            return None
        return f"{self.gpu_type}:{self.gpus_per_node}" if self.gpu_type else str(self.gpus_per_node)

    @property
    def cores(self) -> int | None:
        """Cores per process, if the request has a number."""
        return self.cpus_per_gpu if isinstance(self.cpus_per_gpu, int) else None


def with_cores(request: Request, nproc: int, threads: int) -> Request:
    """Return the request with its default number of cores; see `default_cpus_per_process`.

    Args:
        nproc: processes per node.
        threads: threads of a process on CPUs.
    """
    if request.cpus_per_gpu not in (None, AUTO) or shutil.which("scontrol") is None:
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
    check_form(request)
    if request.after is not None:
        _check_after(request.after)
    _check_time(request)


def check_form(request: Request) -> None:
    """Refuse numbers and texts that no cluster accepts.

    Raises:
        UserError: naming the invalid option.
    """
    check_texts(request)
    check_options(request.sbatch)
    if isinstance(request.cpus_per_gpu, str) and request.cpus_per_gpu not in (AUTO, SITE):
        remedy = f"Give a number, {AUTO} or {SITE}."
        raise UserError("--cpus-per-gpu", request.cpus_per_gpu, "is not a number of cores", remedy)
    for name, value, least in (
        ("--nodes", request.nodes, 1),
        ("--gpus-per-node", request.gpus_per_node, 0),
        ("--cpus-per-gpu", request.cores, 1),
        ("--stop-before", request.stop_before, 10),
    ):
        if value is not None and value < least:
            raise UserError(name, value, f"must be at least {least}", f"Give {least} or more.")
    if request.time is not None:
        _seconds_of_limit(request.time)


def _check_time(request: Request) -> None:
    """Refuse a time limit that is invalid, exceeds the limit of the partition or leaves no time to train."""
    time = request.time
    limit = None if time is None else _seconds_of_limit(time)
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


def _seconds_of_limit(time: str) -> int | None:
    """Seconds of a time limit; None for no limit."""
    if time.upper() in _NO_LIMIT:
        return None
    limit = seconds_of(time)
    if limit is None:
        remedy = "Write minutes, H:MM:SS or D-HH:MM:SS."
        raise UserError("--time", time, "is not a valid time limit", remedy)
    return limit


def check_texts(request: Request) -> None:
    """Refuse texts that are unsafe in the sbatch script.

    Raises:
        UserError: naming the invalid option.
    """
    for name in ("time", "partition", "account", "qos", "constraint", "exclude", "mem", "after", "profile"):
        text = getattr(request, name)
        if text is not None and not _PLAIN.fullmatch(text):
            remedy = "Use letters, digits and . _ , : @ + - [ ] * & | ( ) / = only."
            raise UserError(f"--{name}", text, "contains characters that SLURM does not accept", remedy)
    if request.gpu_type and not re.fullmatch(r"[A-Za-z][\w.-]{0,100}", request.gpu_type, re.ASCII):
        remedy = "Write TYPE:N, for example h100:8."
        raise UserError("--gpus-per-node", request.gpu_type, "is not a type of GPU", remedy)
    image = request.container
    if image is not None and (not image.isprintable() or image.startswith("-")):
        remedy = "Give a file or REGISTRY/IMAGE:TAG."
        raise UserError("--container", image, "is not a valid image name", remedy)


def _check_after(job: str) -> None:
    """Refuse an unknown job, because SLURM ignores a dependency on one, and one that has ended without success."""
    if not re.fullmatch(r"\d{1,10}(_\d{1,10})?", job):
        raise UserError("--after", job, "is not a job number", "Give N, or N_K for a task of an array.")
    command = ["scontrol", "show", "job", "-o", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.findall(r" JobState=(\w+)", done.stdout) if done.returncode == 0 else []
    found = found or [states([job])[job].state]
    if found == [UNKNOWN.state]:
        raise UserError("--after", job, "is not known to SLURM", "See `squeue` or `sacct`.")
    failed = next((state for state in found if state != "COMPLETED" and state not in LIVE), None)
    if failed is not None:
        message = f"has ended without success ({failed}), so the job would never start"
        raise UserError("--after", job, message, "Give a job that waits, runs or has succeeded, or omit it.")


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
