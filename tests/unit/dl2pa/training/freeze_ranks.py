"""Run by test_freeze.py: two gloo processes unfreeze a backbone, undisturbed and resumed after each step."""

from __future__ import annotations

import copy
import hashlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed as dist

from dl2pa.config import parse_config
from dl2pa.model.model import build_model
from dl2pa.training.calibrate import calibrate
from dl2pa.training.data import DataSplits
from dl2pa.training.distributed import World
from dl2pa.training.progress import Progress
from dl2pa.training.train_state import TrainState
from pipelines.dataset import SyntheticDataset
from pipelines.sampler import EvalSampler, TrainSampler
from pipelines.synthetic import SyntheticPipeline
from support.process_groups import fork_groups

CLASSES, BATCH, STEPS = 6, 16, 6
CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "data": {"dataset": "synthetic", "num_classes": CLASSES, "image_size": 8},
    "model": {
        **{"backbone": "resnet8", "embedding_dim": 5, "widths": [4, 4, 4]},
        **{"freeze_epochs": 1, "freeze_before": "blocks.0"},
    },
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


def report(world: World) -> dict[str, Any]:
    _, expected = run(world, None, 0, STEPS)
    resumed: dict[int, str] = {}
    for stop in range(1, STEPS):
        state, _ = run(world, None, 0, stop)
        resumed[stop] = run(world, state, stop, STEPS)[1]
    return {"expected": expected, "resumed": resumed, "calibrated": calibrated(world)}


def calibrated(world: World) -> bool:
    """Whether a run that was stopped in its final calibration finishes after a resume."""
    config, dataset = parse_config(CONFIG), SyntheticDataset(BATCH, tuple(map(str, range(CLASSES))))
    train_state = TrainState(config, build_model(config, CLASSES), world, 2)
    train_state.wrap()
    trainer: Any = SimpleNamespace(
        train_state=train_state,
        progress=Progress(epoch=3),
        world=world,
        config=config,
        stop=SimpleNamespace(poll=lambda: False),
        display=SimpleNamespace(evaluating=lambda *_: None),
        eval_pipeline=SyntheticPipeline(
            CLASSES, 8, EvalSampler(BATCH, BATCH, world.rank, world.size), 0, CPU
        ),
    )
    finished, _ = calibrate(trainer, DataSplits(dataset, dataset, dataset.classes))
    return finished and not train_state.model.embedder.frozen


if __name__ == "__main__":
    fork_groups(report, (2,))
