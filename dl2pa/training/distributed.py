"""Process groups, rank, device and threads of this process; collectives for plain values."""

from __future__ import annotations

import datetime
import io
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from dl2pa import envvars
from dl2pa.config import Config
from dl2pa.config.schema import TrainConfig
from dl2pa.errors import UserError
from dl2pa.gpus import gpu_files
from dl2pa.osutil import usable_cores
from dl2pa.process import Ranks, die_with_parent, torchrun_ranks

log = logging.getLogger(__name__)

_CORES_PER_GPU = 4


@dataclass(frozen=True)
class World:
    """Rank, sizes, device and threads of this process, and a gloo group for collectives on the host."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    threads: int
    side_group: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def choose_device(name: str, local_rank: int) -> torch.device:
    """Choose this process's device: `auto`, `cpu` or `cuda`.

    Raises:
        UserError: launch.device=cuda with fewer GPUs than local processes, or launch.device=auto with a GPU that CUDA
            cannot use.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and (reason := unusable_gpu()):
            remedy = "Update the NVIDIA driver or install a torch for it, or set launch.device=cpu."
            raise UserError(
                "launch.device", "auto", f"a GPU is present, but CUDA does not start: {reason}", remedy
            )
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise UserError(
            "launch.device",
            name,
            f"local process {local_rank} finds {count} GPU(s)",
            "Set launch.device=cpu, or start at most one process per GPU (--nproc).",
        )
    return torch.device("cuda", local_rank)


def unusable_gpu() -> str | None:
    """Why CUDA does not start although a GPU is accessible; None if there is no GPU or the user hides it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not gpu_files() or (hidden is not None and not hidden[:1].isalnum()) or hidden == "NoDevFiles":
        return None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())
    return "torch finds no device"


def join_world(config: Config) -> World:
    """Join the process group that torchrun describes, if any; set device, threads and numerics.

    Raises:
        UserError: invalid rank variables, a missing GPU, or a setting that needs GPUs.
    """
    env = os.environ
    described = torchrun_ranks()
    ranks = described or Ranks(0, 1, 0, 1)
    device = choose_device(config.launch.device, ranks.local_rank)
    allocated = env.get("SLURM_GPUS_ON_NODE", "0")
    if device.type == "cpu" and config.launch.device == "auto" and allocated != "0" and ranks.rank == 0:
        log.warning(
            "%s GPU(s) are allocated on this node, but torch finds none: training on the CPU", allocated
        )
    set_numerics(config.train, device, ranks.size)
    cores = int(env.get(envvars.CORES) or usable_cores())
    threads = config.launch.threads or max(1, cores // ranks.local_size)
    if ranks.local_rank == 0:
        warn_of_few_cores(device, cores, ranks.local_size)
    if usable_cores() < cores:
        log.info("bound to %d of %d CPU cores (launch.numa_binding)", usable_cores(), cores)
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    side_group = None
    if described:
        die_with_parent()
        timeout = datetime.timedelta(seconds=config.launch.timeout_s)
        rendezvous: dict[str, Any] = {}
        if envvars.STORE in env:  # one machine: no port is opened beyond loopback
            store = dist.FileStore(env[envvars.STORE], ranks.size)
            store.set_timeout(timeout)
            rendezvous = {"store": store, "rank": ranks.rank, "world_size": ranks.size}
        elif config.launch.interface:
            env["NCCL_SOCKET_IFNAME"] = env["GLOO_SOCKET_IFNAME"] = config.launch.interface
        backend = choose_backend(config.launch.backend, device)
        if rendezvous or env.get(envvars.LAUNCH):
            dist.init_process_group(backend, timeout=timeout, **rendezvous)
        else:
            _join_foreign_group(backend, timeout, ranks)
        side_group = dist.new_group(backend="gloo", timeout=timeout)
    return World(ranks.rank, ranks.size, ranks.local_rank, ranks.local_size, device, threads, side_group)


def warn_of_few_cores(device: torch.device, cores: int, processes: int) -> None:
    """Log a warning if the processes of this machine have too few cores to feed GPUs."""
    if device.type == "cuda" and cores < _CORES_PER_GPU * processes:
        log.warning(
            "%d process(es) on GPUs share %d usable CPU core(s); decoding needs at least %d per process. "
            "Request more, under SLURM with --cpus-per-gpu",
            *(processes, cores, _CORES_PER_GPU),
        )


def set_numerics(train: TrainConfig, device: torch.device, world_size: int) -> None:
    """Choose deterministic algorithms, or the fastest of cuDNN; the same for training, evaluation and benchmarks.

    Raises:
        UserError: train.sync_bn without GPUs.
    """
    if train.sync_bn and device.type == "cpu" and world_size > 1:
        raise UserError("train.sync_bn", True, "needs GPUs", "Set train.sync_bn=false or launch.device=cuda.")
    deterministic = device.type == "cpu" if train.deterministic is None else train.deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _join_foreign_group(backend: str, timeout: datetime.timedelta, ranks: Ranks) -> None:
    """Join the process group of a torchrun that dl2pa did not start.

    Raises:
        UserError: the other processes do not arrive; the variables may be left over from another program.
    """
    names = (*envvars.RANKS, *envvars.RENDEZVOUS)
    values = " ".join(f"{name}={os.environ[name]}" for name in names)
    log.info(
        "waiting up to %d s for %d other processes (%s)", timeout.total_seconds(), ranks.size - 1, values
    )
    try:
        dist.init_process_group(backend, timeout=timeout)
    except dist.DistError as error:
        remedy = f"Start all {ranks.size} processes, or run `unset {' '.join(envvars.RANKS)}` to train alone."
        raise UserError(
            "environment", values, f"the other processes did not arrive: {error}", remedy
        ) from error


def choose_backend(name: str, device: torch.device) -> str:
    """Backend argument for `init_process_group`.

    Raises:
        UserError: launch.backend=nccl without GPUs.
    """
    if name == "nccl" and device.type == "cpu":
        remedy = "Use auto or gloo, or launch.device=cuda."
        raise UserError("launch.backend", name, "needs GPUs", remedy)
    return "gloo" if device.type == "cpu" or name == "gloo" else "cpu:gloo,cuda:nccl"


def set_collective_timeout(world: World, seconds: int) -> None:
    """Set how long collectives wait for other processes before they fail."""
    if world.size == 1:
        return
    change: Any = getattr(dist, "set_timeout", None) or vars(dist.distributed_c10d)["_set_pg_timeout"]
    for group in (dist.group.WORLD, world.side_group):
        change(datetime.timedelta(seconds=seconds), group)


def leave_world() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def from_rank_zero(value: Any, world: World) -> Any:
    """Broadcast rank 0's value to every rank; a collective.

    Args:
        value: strings, numbers, None, tensors, and lists, tuples and dictionaries of them.
    """
    if world.size == 1:
        return value
    message = _pack(value) if world.is_main else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([len(message)])
    dist.broadcast(size, src=0, group=world.side_group)
    if not world.is_main:
        message = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(message, src=0, group=world.side_group)
    return value if world.is_main else _unpack(message)


def gather_objects(value: Any, world: World) -> list[Any]:
    """Gather every rank's value on every rank, in rank order; a collective. Values as in `from_rank_zero`."""
    if world.size == 1:
        return [value]
    message = _pack(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(message)]), group=world.side_group)
    max_size = int(max(sizes))
    parts = [torch.empty(max_size, dtype=torch.uint8) for _ in sizes]
    padded = torch.cat([message, torch.zeros(max_size - len(message), dtype=torch.uint8)])
    dist.all_gather(parts, padded, group=world.side_group)
    return [_unpack(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]


def _pack(value: Any) -> Tensor:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _unpack(message: Tensor) -> Any:
    """Decode a message. Unlike torch's object collectives this never executes code from the message."""
    return torch.load(io.BytesIO(message.numpy().tobytes()), map_location="cpu", weights_only=True)
