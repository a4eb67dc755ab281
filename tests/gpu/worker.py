"""One rank of a small world: join it as a training does, take steps, print the results as one line of JSON.

Arguments: JSON with device, backend, nodes (world size), steps, hold_s (seconds that rank 0 spends in an assignment
update while the others wait).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from typing import Any

import torch
from torch import distributed as dist

from dl2pa.assignment import AssignmentSolver
from dl2pa.config import parse_config
from dl2pa.model.model import build_model
from dl2pa.training.distributed import gather_objects, join_world, leave_world, set_collective_timeout
from dl2pa.training.train_state import TrainState
from pipelines.batch import Batch

GLOBAL_BATCH = 32


def batch_of(rank: int, size: int, device: torch.device) -> Batch:
    """This rank's part of a global batch of noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=generator)
    part = slice(rank * GLOBAL_BATCH // size, (rank + 1) * GLOBAL_BATCH // size)
    indices = torch.arange(GLOBAL_BATCH)[part].to(device)
    return Batch(images[part].to(device), indices % 10, indices, len(indices))


def hold_solver(seconds: float) -> None:
    """Delay assignment updates of this process."""
    solve = AssignmentSolver.solve

    def held(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return solve(*args, **kwargs)

    AssignmentSolver.solve = held


def main() -> None:
    options = json.loads(sys.argv[1])
    config = parse_config(
        {
            "data": {"dataset": "cifar10", "crop": "pad", "image_size": 32},
            "model": {"backbone": "resnet8", "embedding_dim": 5},
            "method": {"name": "dl2pa"},
            "train": {"batch_size": GLOBAL_BATCH},
            "launch": {"device": options["device"], "backend": options["backend"], "threads": 1},
            "optim": {"lr": 0.1},
        }
    )
    world = join_world(config)
    if world.is_main and options["hold_s"]:
        hold_solver(options["hold_s"])
    torch.manual_seed(0)
    state = TrainState(config, build_model(config, 10), world, 100)
    state.wrap()
    state.model.train()
    batch = batch_of(world.rank, world.size, world.device)
    for number in range(options["steps"]):
        state.step(batch, number)
    set_collective_timeout(world, 600)
    state.rematch()
    state.step(batch, options["steps"])
    state.check_finite(options["steps"] + 1, "none")
    total = torch.ones(1, device=world.device)
    dist.all_reduce(total)
    weights = torch.cat([p.detach().float().cpu().flatten() for p in state.model.parameters()])
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    digests = gather_objects(digest, world)
    backend = dist.get_backend_config()
    leave_world()
    result = {"rank": world.rank, "device": str(world.device), "backend": backend, "total": total.item()}
    result |= {"norm": weights.norm().item(), "digests": digests, "joined": dist.is_initialized()}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
