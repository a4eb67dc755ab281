"""Run by test_ranks.py: fork gloo groups of 1, 2 and 3 processes and write a JSON report per rank."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from dl2pa.config import merge, parse_config
from dl2pa.errors import TrainingFailure
from dl2pa.methods import METHODS, Targets
from dl2pa.model.model import build_model
from dl2pa.training.distributed import World
from dl2pa.training.train_state import TrainState
from pipelines.sampler import TrainSampler
from pipelines.synthetic import SyntheticPipeline

CPU = torch.device("cpu")
CLASSES, DIM, BATCH = 6, 5, 24
WORLDS = (1, 2, 3)
TRAININGS: dict[str, dict[str, Any]] = {
    "dnc": {"name": "dnc", "centroid_momentum": 0.9},
    "goto": {"name": "goto", "learn_scale": True, "margin": 0.1},
    "ebv": {
        "name": "ebv",
        "assignment": "dynamic",
        "learn_scale": True,
        "match": {"warmup_epochs": 1, "every_steps": 1},
    },
    "kasarla": {"name": "kasarla", "assignment": "dynamic", "match": {"every_steps": 1}},
}


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def clustering(rank: int, size: int) -> list[str]:
    """Return hashes of DNC's sub-centroids after each of 4 global batches, split over the ranks."""
    torch.manual_seed(0)
    method = METHODS["dnc"].build(CLASSES, DIM, METHODS["dnc"].options(centroid_momentum=0.8))
    generator = torch.Generator().manual_seed(1)
    digests = []
    share = BATCH // size
    for _ in range(4):
        f, y = (
            torch.randn(BATCH, DIM, generator=generator),
            torch.randint(0, CLASSES, (BATCH,), generator=generator),
        )
        y[::2] = method.logits(f).argmax(dim=1)[::2]
        part = slice(rank * share, (rank + 1) * share)
        method.observe(f[part], Targets(y[part]))
        digests.append(digest(method.state_dict()["centroids"]))
    return digests


def drifting(rank: int, size: int) -> str | None:
    """Return the error of a save when the sub-centroids of one rank differ."""
    torch.manual_seed(0)
    method = METHODS["dnc"].build(CLASSES, DIM, METHODS["dnc"].options())
    method.gather_state()
    if rank == size - 1:
        method.state_dict()["centroids"][0, 0, 0] += 1e-7
    try:
        method.gather_state()
    except TrainingFailure as error:
        return str(error)
    return None


def training(method: dict[str, Any], world: World) -> dict[str, Any]:
    """Train 4 steps in 2 epochs with DDP, and repeat the second epoch from a checkpoint."""
    tree = {
        "data": {"dataset": "synthetic", "num_classes": CLASSES, "image_size": 8},
        "model": {"backbone": "resnet8", "embedding_dim": DIM, "widths": [4, 4, 4]},
        "train": {"batch_size": BATCH, "virtual_shards": 12},
        "optim": {"lr": 0.1, "schedule": "constant"},
    }
    config = parse_config(merge(tree, {"method": method}))
    pipeline = SyntheticPipeline(
        CLASSES, 8, TrainSampler(2 * BATCH, BATCH, 0, world.rank, world.size), 0, CPU
    )

    def epoch(train_state: TrainState, number: int) -> None:
        train_state.begin_epoch(number)
        train_state.model.train()
        pipeline.start(number)
        for step, batch in enumerate(pipeline, start=2 * number):
            train_state.step(batch, step)
            if train_state.model.method.due_after_step(number, step + 1):
                train_state.rematch()
        if train_state.model.method.due_after_epoch(number):
            train_state.rematch()

    uninterrupted = TrainState(config, build_model(config, CLASSES), world, 2)
    uninterrupted.wrap()
    epoch(uninterrupted, 0)
    state = copy.deepcopy(uninterrupted.state())
    uninterrupted.release_gathered()
    if world.size > 1:
        states = [state]
        dist.broadcast_object_list(states, src=0)
        (state,) = states
    epoch(uninterrupted, 1)
    resumed = TrainState(config, build_model(config, CLASSES), world, 2)
    resumed.load(copy.deepcopy(state))
    resumed.wrap()
    resumed.release_gathered()
    epoch(resumed, 1)
    expected, actual = (
        {k: digest(v) for k, v in train_state.model.state_dict().items() if "statistic" not in k}
        for train_state in (uninterrupted, resumed)
    )
    initial = build_model(config, CLASSES).state_dict()
    return {
        "state": {k: v for k, v in expected.items() if "running" not in k and "num_batches" not in k},
        "resumed_differs": sorted(k for k in expected if expected[k] != actual[k]),
        "learned": sorted(k for k in expected if k in initial and digest(initial[k]) != expected[k]),
    }


def one_rank(rank: int, size: int, out: Path) -> None:
    torch.set_num_threads(1)
    side = None
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}/store-{size}", rank=rank, world_size=size)
        side = dist.new_group(backend="gloo")
    world = World(rank, size, rank, size, CPU, 1, side)
    report = {
        "clustering": clustering(rank, size),
        "drifting": drifting(rank, size),
        "training": {name: training(method, world) for name, method in TRAININGS.items()},
    }
    (out / f"{size}-{rank}.json").write_text(json.dumps(report), encoding="utf-8")


def main(out: Path) -> int:
    """Fork each group after the imports, which take most of the time."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    failed = 0
    for size in WORLDS:
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                try:
                    one_rank(rank, size, out)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        failed += sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
