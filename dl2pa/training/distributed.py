"""This process's place among the others: rank, device, threads, process groups."""

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
from dl2pa.errors import UserError
from dl2pa.osutil import usable_cores
from dl2pa.process import die_with_parent, inside_torchrun

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """Ranks, device and the side group on which ranks agree without touching the device."""

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


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """Device of this process.

    Raises:
        UserError: launch.device=cuda where there is no GPU, or fewer than local processes.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise UserError(
            "launch.device",
            wanted,
            f"local process {local_rank} finds {count} GPU(s)",
            "Set launch.device=cpu, or start at most as many processes as there are GPUs (--nproc).",
        )
    return torch.device("cuda", local_rank)


def join_world(config: Config) -> World:
    """Join the process group torchrun describes, or stand alone; set threads and device."""
    env = os.environ
    rank, size = int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1"))
    local_rank, local_size = int(env.get("LOCAL_RANK", "0")), int(env.get("LOCAL_WORLD_SIZE", "1"))
    device = choose_device(config.launch.device, local_rank)
    allocated = env.get("SLURM_GPUS_ON_NODE", "0")
    if device.type == "cpu" and config.launch.device == "auto" and allocated != "0" and rank == 0:
        log.warning(
            "%s GPU(s) were allocated on this node and torch sees none: training on the CPU", allocated
        )
    threads = config.launch.threads or max(1, usable_cores() // local_size)
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    side_group = None
    if inside_torchrun():
        die_with_parent()
        timeout = datetime.timedelta(seconds=config.launch.timeout_s)
        place: dict[str, Any] = {}
        if envvars.STORE in env:  # one machine: nothing listens beyond loopback
            store = dist.FileStore(env[envvars.STORE], size)
            store.set_timeout(timeout)
            place = {"store": store, "rank": rank, "world_size": size}
        elif config.launch.interface:
            env["NCCL_SOCKET_IFNAME"] = env["GLOO_SOCKET_IFNAME"] = config.launch.interface
        dist.init_process_group(choose_backend(config.launch.backend, device), timeout=timeout, **place)
        side_group = dist.new_group(backend="gloo", timeout=timeout)
    return World(rank, size, local_rank, local_size, device, threads, side_group)


def choose_backend(wanted: str, device: torch.device) -> str:
    """torch's name of the backend.

    Raises:
        UserError: launch.backend=nccl without GPUs.
    """
    if wanted == "nccl" and device.type == "cpu":
        remedy = "Use auto or gloo, or launch.device=cuda."
        raise UserError("launch.backend", wanted, "nccl needs GPUs", remedy)
    return "gloo" if device.type == "cpu" or wanted == "gloo" else "cpu:gloo,cuda:nccl"


def set_collective_timeout(world: World, seconds: int) -> None:
    """From now on no process waits longer than `seconds` for the others."""
    if world.size == 1:
        return
    change: Any = getattr(dist, "set_timeout", None) or vars(dist.distributed_c10d)["_set_pg_timeout"]
    for group in (dist.group.WORLD, world.side_group):
        change(datetime.timedelta(seconds=seconds), group)


def leave_world() -> None:
    """Leave the process group in good order."""
    if dist.is_initialized():
        dist.destroy_process_group()


def from_rank_zero(value: Any, world: World) -> Any:
    """Rank 0's value on every rank; a collective.

    Args:
        value: texts, numbers, None, tensors, and lists, tuples and dictionaries of them.
    """
    if world.size == 1:
        return value
    message = _packed(value) if world.is_main else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([len(message)])
    dist.broadcast(size, src=0, group=world.side_group)
    if not world.is_main:
        message = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(message, src=0, group=world.side_group)
    return value if world.is_main else _unpacked(message)


def gather_objects(value: Any, world: World) -> list[Any]:
    """Every rank's value on every rank, in the order of the ranks; a collective. Values as in `from_rank_zero`."""
    if world.size == 1:
        return [value]
    message = _packed(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(message)]), group=world.side_group)
    longest = int(max(sizes))
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    padded = torch.cat([message, torch.zeros(longest - len(message), dtype=torch.uint8)])
    dist.all_gather(parts, padded, group=world.side_group)
    return [_unpacked(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]


def _packed(value: Any) -> Tensor:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _unpacked(message: Tensor) -> Any:
    """What another process sent. torch's own object collectives would run code that a message holds."""
    return torch.load(io.BytesIO(message.numpy().tobytes()), map_location="cpu", weights_only=True)
