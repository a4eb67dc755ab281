"""Program of test_ranks.py: fork gloo groups of 1 to 4 processes and write a JSON report per rank."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch.nn import functional as F

from dl2pa.assignment import (
    AssignmentSolver,
    ClassStatistic,
    QuadraticSolver,
    match,
    refit,
    rotate,
    verify_same,
)
from dl2pa.assignment.solve import ALL_PAIRS
from dl2pa.config import parse_config
from dl2pa.errors import TrainingFailure
from dl2pa.methods import METHODS, Targets
from dl2pa.methods.losses import dot_regression
from dl2pa.model.model import build_model
from dl2pa.training.distributed import World
from dl2pa.training.evaluate import evaluate
from dl2pa.training.meter import TrainMeter
from dl2pa.training.train_state import TrainState
from pipelines.sampler import EvalSampler, TrainSampler
from pipelines.synthetic import SyntheticPipeline
from support.process_groups import fork_groups

CPU = torch.device("cpu")
CLASSES, DIM, SAMPLES = 9, 4, 60


def updates(rank: int, size: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    points = F.normalize(torch.randn(CLASSES, DIM, generator=generator), dim=1)
    sigma, statistic = torch.arange(CLASSES), ClassStatistic(CLASSES, DIM)
    results: list[Any] = []
    diagnostics: list[Any] = []
    for _ in range(2):
        features = torch.randn(SAMPLES, DIM, generator=generator)
        labels = torch.randint(0, CLASSES - 1, (SAMPLES,), generator=generator)
        part = slice(rank, None, size)
        statistic.add(features[part], labels[part])
        result = match(statistic, points, sigma, momentum=0.3)
        results.append([sigma.tolist(), result.moved, result.objective_before, result.objective_after])
        results[-1] += [result.own_cosine, result.classes_seen, [list(move) for move in result.moves]]
        diagnostics.append(result.diagnostics and result.diagnostics.metrics())
    stayed = refit(points, sigma, statistic.rows + rank, 0.9)  # rank 0's directions are used
    moved = {"stayed": stayed, "points": points.tolist()}
    return {
        "pooled": pooled_update(rank, size),
        "updates": results,
        "rows": statistic.rows.tolist(),
        "diagnostics": diagnostics,
        "refit": moved,
    }


def pooled_update(rank: int, size: int) -> dict[str, Any]:
    """A quadratic update by features of another dimension, and a rotation."""
    generator = torch.Generator().manual_seed(1)
    points = F.normalize(torch.randn(CLASSES, DIM, generator=generator), dim=1)
    sigma, statistic, pooled = torch.arange(CLASSES), ClassStatistic(CLASSES, DIM), ClassStatistic(CLASSES, 7)
    features, wide = (torch.randn(SAMPLES, dim, generator=generator) for dim in (DIM, 7))
    labels, part = torch.arange(SAMPLES) % CLASSES, slice(rank, None, size)
    statistic.add(features[part], labels[part])
    pooled.add(wide[part], labels[part])
    result = match(statistic, points, sigma, solver=QuadraticSolver(), pooled=pooled)
    stayed = rotate(points, sigma, statistic.rows + rank)  # rank 0's directions are used
    return {"sigma": sigma.tolist(), "moved": result.moved, "points": points.tolist(), "stayed": stayed}


def many_classes(rank: int, size: int) -> list[list[int]]:
    """Assignments of two updates with more classes than `ALL_PAIRS`, some without samples."""
    generator = torch.Generator().manual_seed(0)
    count, samples = 2 * ALL_PAIRS, 6 * ALL_PAIRS
    points = F.normalize(torch.randn(count, DIM, generator=generator), dim=1)
    sigma, statistic, solver = torch.arange(count), ClassStatistic(count, DIM), AssignmentSolver()
    assignments: list[list[int]] = []
    for _ in range(2):
        features = torch.randn(samples, DIM, generator=generator) + 2.0
        labels = torch.randint(0, count - 9, (samples,), generator=generator)
        part = slice(rank, None, size)
        statistic.add(features[part], labels[part])
        match(statistic, points, sigma, solver=solver)
        assignments.append(sigma.tolist())
    return assignments


def differing_ranks(rank: int, size: int) -> str | None:
    verify_same(torch.arange(5), "assignment")
    try:
        verify_same(torch.arange(5) + (rank == size - 1 > 0), "assignment")
    except TrainingFailure as error:
        return str(error)
    return None


def weighted_loss(rank: int, size: int) -> list[float]:
    """Mean over the ranks of dot_regression's loss and gradient of a global batch."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(12, DIM, generator=generator)
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 3])[torch.randperm(12, generator=generator)]
    weights = F.normalize(torch.randn(5, DIM, generator=generator), dim=1)
    share = 12 // size
    part = features[rank * share : (rank + 1) * share].clone().requires_grad_()
    loss = dot_regression(part, weights, Targets(labels[rank * share : (rank + 1) * share]))
    loss.backward()
    gradient = torch.zeros(12, DIM)
    gradient[rank * share : (rank + 1) * share] = part.grad / size  # type: ignore[operator]
    values = torch.cat([loss.detach().view(1) / size, gradient.flatten()])
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def training(rank: int, world: World) -> dict[str, Any]:
    """Train with DDP; report the statistic of this rank before and after, and the saved state."""
    config = parse_config(
        {
            "data": {"dataset": "synthetic", "num_classes": 6, "image_size": 8},
            "model": {"backbone": "resnet8", "embedding_dim": 3, "widths": [4, 4, 4]},
            "train": {"batch_size": 12, "virtual_shards": 6},
            "optim": {"lr": 0.1, "schedule": "constant"},
        }
    )
    train_state = TrainState(config, build_model(config, 6), world, 2)
    statistic = train_state.model.method.statistic
    statistic.add(torch.full((rank + 1, 3), 1.0), torch.full((rank + 1,), rank))
    before = statistic.counts.tolist()
    train_state.wrap()
    after_wrap = statistic.counts.tolist()
    order = TrainSampler(24, 12, 0, rank, world.size)
    pipeline = SyntheticPipeline(6, 8, order, 0, CPU)
    seen = statistic.counts.clone()
    for step, batch in enumerate(pipeline):
        train_state.step(batch, step)
        seen += 2**32 * torch.bincount(batch.targets, minlength=6)
    kept = torch.equal(seen, statistic.counts)
    state = train_state.state()
    saved = state["model"]["method.statistic.counts"].tolist() if state else None
    train_state.release_gathered()
    weights = torch.cat([p.detach().flatten() for p in train_state.model.parameters()])
    return {
        "before": before,
        "after_wrap": after_wrap,
        "kept": kept,
        "saved": saved,
        "released": statistic.counts.tolist(),
        "weights": weights.sum().item(),
        "weights_agree": _agree(weights),
        "buffers_agree": all(_agree(b) for b in train_state.model.embedder.buffers()),
    }


def _agree(tensor: torch.Tensor) -> bool:
    try:
        verify_same(tensor, "weights")
    except TrainingFailure:
        return False
    return True


def metering(rank: int, world: World) -> dict[str, Any]:
    meter = TrainMeter(world)
    for step in range(3):
        meter.add(torch.tensor(1.0 + rank + step), step)
    mean = meter.read()
    failure = None
    meter.add(torch.tensor(float("nan") if rank == world.size - 1 else 1.0), 17 + rank)
    try:
        meter.check("step-9")
    except TrainingFailure as error:
        failure = str(error)
    return {"mean": mean, "failure": failure}


def validating(rank: int, size: int) -> list[dict[str, Any]]:
    """Validate with sizes that neither the batch size nor the world size divides."""
    records = []
    for samples, batch in ((1, 4), (7, 4), (103, 10)):
        pipeline = SyntheticPipeline(6, 4, EvalSampler(samples, batch, rank, size), 0, CPU)
        method = METHODS["psc"].build(6, 48, METHODS["psc"].options(scale=5.0))
        with torch.no_grad():
            method.weight.copy_(torch.randn(6, 48, generator=torch.Generator().manual_seed(0)))
        result = evaluate(lambda images, m=method: m.logits(images.flatten(1)), pipeline, 6)
        assert result is not None
        records.append(result.record())
    return records


def report(world: World) -> dict[str, Any]:
    rank, size = world.rank, world.size
    result: dict[str, Any] = {**updates(rank, size), "many_classes": many_classes(rank, size)}
    if size < 4:
        result.update(
            differing=differing_ranks(rank, size),
            dot_regression=weighted_loss(rank, size),
            training=training(rank, world),
            meter=metering(rank, world),
            evaluations=validating(rank, size),
        )
    np.testing.assert_equal(json.loads(json.dumps(result)), result)
    return result


if __name__ == "__main__":
    fork_groups(report, (1, 2, 3, 4))
