"""Run by test_ranks.py: fork gloo groups of 1, 2 and 3 processes and write a JSON report per rank."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from dl2pa.config import merge, parse_config
from dl2pa.errors import TrainingFailure
from dl2pa.methods import METHODS, Targets
from dl2pa.model.model import build_model, init_prototypes
from dl2pa.training.distributed import World
from dl2pa.training.train_state import TrainState
from pipelines.sampler import TrainSampler
from pipelines.synthetic import SyntheticPipeline
from support.process_groups import fork_groups

CPU = torch.device("cpu")
CLASSES, DIM, BATCH = 6, 5, 24
OF_ONE_RANK = ("method.statistic.", "method.pooled.")
TRAININGS: dict[str, dict[str, Any]] = {
    "dnc": {"name": "dnc", "centroid_momentum": 0.9},
    "goto": {"name": "goto", "learn_scale": True, "margin": 0.1},
    "ebv": {
        "name": "ebv",
        "assignment": "dynamic",
        "learn_scale": True,
        "match": {"warmup_epochs": 1, "every_steps": 1},
    },
    "sampled": {
        "name": "dl2pa",
        "loss": "cross_entropy",
        "scale": 8.0,
        "negatives": {"neighbors": 2, "random": 2},
        "release_epoch": 1,
        "match": {
            **{"statistic": "pooled", "refit_cosine": 1.0, "rotate": True},
            **{"warmup_epochs": 1, "last_epoch": 1},
        },
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
        {k: digest(v) for k, v in train_state.model.state_dict().items() if not k.startswith(OF_ONE_RANK)}
        for train_state in (uninterrupted, resumed)
    )
    initial = build_model(config, CLASSES).state_dict()
    return {
        "state": {k: v for k, v in expected.items() if "running" not in k and "num_batches" not in k},
        "resumed_differs": sorted(k for k in expected if expected[k] != actual[k]),
        "learned": sorted(k for k in expected if k in initial and digest(initial[k]) != expected[k]),
    }


def report(world: World) -> dict[str, Any]:
    return {
        "clustering": clustering(world.rank, world.size),
        "drifting": drifting(world.rank, world.size),
        "training": {name: training(method, world) for name, method in TRAININGS.items()},
    }


if __name__ == "__main__":
    for chosen in TRAININGS.values():  # the forked ranks find the prototypes in memory
        init_prototypes(parse_config({"model": {"embedding_dim": DIM}, "method": chosen}), CLASSES)
    fork_groups(report, (1, 2, 3))
