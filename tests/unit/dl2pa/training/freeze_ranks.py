"""Run by test_freeze.py: two gloo processes unfreeze a backbone, undisturbed and resumed after each step."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from dl2pa.config import parse_config
from dl2pa.model.model import build_model
from dl2pa.training.distributed import World
from dl2pa.training.train_state import TrainState
from pipelines.sampler import TrainSampler
from pipelines.synthetic import SyntheticPipeline

CLASSES, BATCH, STEPS = 6, 16, 6
CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "data": {"dataset": "synthetic", "num_classes": CLASSES, "image_size": 8},
    "model": {"backbone": "resnet8", "embedding_dim": 5, "widths": [4, 4, 4], "freeze_epochs": 1},
    "train": {"batch_size": BATCH, "epochs": 3, "ema": 0.5},
    "optim": {"lr": 0.1, "layer_decay": 0.8, "head_lr_scale": 2.0},
}


def digest(train_state: TrainState) -> str:
    assert train_state.average is not None
    tensors = [*train_state.model.state_dict().values(), *train_state.average.module.parameters()]
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def run(world: World, state: dict[str, Any] | None, first: int, last: int) -> tuple[dict[str, Any], str]:
    """Train steps `first` to `last` - 1, two per epoch; returns the state and its digest."""
    config = parse_config(CONFIG)
    sampler = TrainSampler(2 * BATCH, BATCH, 0, world.rank, world.size)
    pipeline = SyntheticPipeline(CLASSES, 8, sampler, 0, CPU)
    train_state = TrainState(config, build_model(config, CLASSES), world, 2)
    if state is not None:
        train_state.load(copy.deepcopy(state))
    train_state.wrap()
    train_state.release_gathered()
    for epoch in range(first // 2, -(-last // 2)):
        train_state.begin_epoch(epoch)
        train_state.model.train()
        skip = max(0, first - 2 * epoch)
        pipeline.start(epoch, skip)
        for step, batch in enumerate(pipeline, start=2 * epoch + skip):
            if step < last:
                train_state.step(batch, step)
    saved = [copy.deepcopy(train_state.state())]
    result = digest(train_state)
    dist.broadcast_object_list(saved, src=0)
    return saved[0], result


def one_rank(rank: int, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    world = World(rank, 2, rank, 2, CPU, 1, dist.new_group(backend="gloo"))
    _, expected = run(world, None, 0, STEPS)
    report: dict[str, Any] = {"expected": expected, "resumed": {}}
    for stop in range(1, STEPS):
        state, _ = run(world, None, 0, stop)
        report["resumed"][stop] = run(world, state, stop, STEPS)[1]
    (out / f"{rank}.json").write_text(json.dumps(report), encoding="utf-8")
    dist.destroy_process_group()


def main(out: Path) -> int:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    child = os.fork()
    one_rank(0 if child else 1, out)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
