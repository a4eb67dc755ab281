"""Two processes that join, use and leave their world as on GPUs; gloo replaces NCCL, and there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
RANK = """
import torch
from torch import distributed as dist
from dl2pa.config import parse_config
from dl2pa.training import distributed

calls = []
distributed.choose_device = lambda name, local_rank: torch.device("cuda", local_rank)
torch.cuda.set_device = calls.append
init_process_group = dist.init_process_group


def init_with_gloo(backend, **options):
    calls.append(backend)
    init_process_group(backend.replace("nccl", "gloo"), **options)


dist.init_process_group = init_with_gloo
world = distributed.join_world(parse_config({"launch": {"device": "cuda", "threads": 1}}))
# The device is set before NCCL starts: otherwise every rank would create a context on the first GPU.
assert calls == [torch.device("cuda", world.local_rank), "cpu:gloo,cuda:nccl"], calls
assert (world.size, world.device.index) == (2, world.rank)
# Plain values are exchanged on the host, never through a tensor of the device.
assert dist.get_backend(world.side_group) == "gloo"
assert distributed.from_rank_zero({"step": 7} if world.is_main else None, world) == {"step": 7}
assert distributed.gather_objects([world.rank] * (1 + world.rank), world) == [[0], [1, 1]]
distributed.set_collective_timeout(world, 60)
total = torch.ones(1)
dist.all_reduce(total)
dist.barrier(group=world.side_group)
assert total.item() == 2
distributed.leave_world()
assert not dist.is_initialized()
distributed.leave_world()
"""


def test_a_world_is_joined_and_left_as_on_gpus(tmp_path: Path) -> None:
    ranks: list[subprocess.Popen[str]] = []
    for rank in range(2):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        env["DL2PA_STORE"] = str(tmp_path / "store")
        command = [sys.executable, "-c", RANK]
        ranks.append(subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
