"""Messages between ranks contain values, never code."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dl2pa.training.distributed import _unpack

ROOT = Path(__file__).resolve().parents[4]
RANK = """
import os, sys, torch
from torch import distributed as dist
from dl2pa.training.distributed import World, from_rank_zero, gather_objects
rank, size, place = int(sys.argv[1]), 3, sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(place, size), rank=rank, world_size=size)
world = World(rank, size, rank, size, torch.device("cpu"), 1, dist.new_group(backend="gloo"))
value = {"step": 7, "name": "größe", "points": torch.arange(4.0), "none": None, "list": [1, (2, "x")]}
received = from_rank_zero(value if rank == 0 else None, world)
assert torch.equal(received.pop("points"), torch.arange(4.0)), received
assert received == {"step": 7, "name": "größe", "none": None, "list": [1, (2, "x")]}, received
assert from_rank_zero(None, world) is None
assert gather_objects(["a" * 1000 * rank] * rank, world) == [["a" * 1000 * r] * r for r in range(size)]
dist.barrier()
dist.destroy_process_group()
"""


class Command:
    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> object:
        return subprocess.getoutput, (f"touch '{self._trace}'",)


def test_ranks_exchange_values(tmp_path: Path) -> None:
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")], env=env, cwd=ROOT)
        for rank in range(3)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0, 0]


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
def test_a_message_with_code_is_rejected(tmp_path: Path, form: str) -> None:
    """Every user of the machine can connect to gloo's ports on loopback."""
    trace = tmp_path / "TRACE"
    file = io.BytesIO()
    if form == "pickle":
        file.write(pickle.dumps(Command(trace)))
    else:
        torch.save({"x": Command(trace)}, file)
    with pytest.raises(pickle.UnpicklingError):
        _unpack(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8))
    assert not trace.exists()
